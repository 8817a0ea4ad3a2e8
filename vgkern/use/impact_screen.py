"""The answer of `python -m vgkern impact` on one screen."""

from __future__ import annotations

import math
from typing import Any

from vgkern.costate import impact
from vgkern.train.report import aligned


def screen(told: dict[str, Any]) -> list[str]:
    rows, k = told["checkpoints"], told["k"]
    counts = sorted({row["prompts"] for row in rows})
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    lines = [
        f"vgkern impact: {len(rows)} on {told['task']}, {many} prompts x {told['group']} samples, "
        f"temperature {told['temperature']:g}, layer {_layers(rows)}",
        "  value [90 % interval over the prompts]",
        "",
        *_table(rows, [impact.SCORE, "signal/noise", f"headroom({k})"], True),
        "",
        "  what else one could choose by:",
        *_table(rows, ["pass@1", f"pass@{k}", "p(1-p)", "entropy", "gradient norm"], False),
        "",
    ]
    lines += [f"  STOP {row['name']}: {row['stop']}" for row in rows if row["stop"]]
    if any(row["stop"] for row in rows):
        lines.append("  before RL there: more supervised training, easier prompts, or more samples")
    return [*lines, *_order(told), *_cost(told)]


def _layers(rows: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({f"{row['layer']} of {row['layers']}" for row in rows}))


def _table(rows: list[dict[str, Any]], names: list[str], placed: bool) -> list[str]:
    shown = [("checkpoint", *(["place"] if placed else []), *names)]
    for row in rows:
        cells = [_interval(row["scores"][name]) for name in names]
        if placed:
            cells[0] = "no signal" if row["stop"] else cells[0]
            cells = [_place(row["place"]), *cells]
        shown.append((row["name"], *cells))
    return ["  " + line for line in aligned(shown, 36)]


def _place(place: list[int] | None) -> str:
    if place is None:
        return "-"
    return f"{place[0]}" if place[0] == place[1] else f"{place[0]} to {place[1]}"


def _interval(x: dict[str, float]) -> str:
    if not math.isfinite(x["value"]):
        return "-"
    if not math.isfinite(x["low"]):  # of one prompt
        return f"{x['value']:.3g}"
    return f"{x['value']:.3g} [{x['low']:.3g}, {x['high']:.3g}]"


def _order(told: dict[str, Any]) -> list[str]:
    rows, most = told["checkpoints"], told["prompts"]
    unclear = [pair for pair in told["pairs"] if not pair["clear"]]
    if len(rows) < 2 or rows[0]["place"] is None:
        return []
    if not unclear:
        used = max(row["prompts"] for row in rows)
        early = f" after {used} of {most} prompts" if used < most else ""
        return [f"  ranking of the score clear{early}"]
    lines = ["  ranking of the score not clear:"]
    for pair in unclear:
        more = f"about {pair['more']:.2g} times the prompts would tell them apart"
        if pair["more"] > impact.HOPELESS:
            more = f"take them as equal (more than {impact.HOPELESS:g} times the prompts)"
        lines.append(f"    {pair['upper']} / {pair['lower']}: {more}")
    return lines


def _cost(told: dict[str, Any]) -> list[str]:
    rows, group = told["checkpoints"], told["group"]
    prompts = max(row["prompts"] for row in rows)
    share = max(row["share_of_200_steps"] for row in rows)
    return [
        f"  cost: at most {prompts * group:,} samples and {max(r['seconds'] for r in rows):.1f} s "
        f"each; {share:.2%} of 200 RL steps of {told['prompts']} x {group}, by arithmetic",
        "  a short RL run is the better predictor; 10 % of a run costs "
        f"{0.1 / share:,.0f} times as much",
    ]
