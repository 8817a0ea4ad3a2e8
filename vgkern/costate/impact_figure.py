"""Checkpoints by their score, and by everything else one could choose by, as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vgkern.costate.figure import INSTALL
from vgkern.costate.impact import SCORE


def draw_impact(told: dict[str, Any], path: str | Path) -> None:
    """A dot with its 90 % interval for every checkpoint and predictor; best on top. Hollow: no
    signal. Writes a PNG. Raises ModuleNotFoundError with the remedy without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError(f"the picture needs matplotlib: {INSTALL}") from None
    rows, k = told["checkpoints"], told["k"]
    names = [SCORE, "signal/noise", f"headroom({k})", "pass@1", f"pass@{k}", "p(1-p)", "entropy",
             "gradient norm"]  # fmt: skip
    figure = Figure(figsize=(2.4 + 1.5 * len(names), 1.5 + 0.34 * len(rows)), layout="constrained")
    ratios = [1.8, *[1] * (len(names) - 1)]
    axes: Any = figure.subplots(1, len(names), sharey=True, width_ratios=ratios)
    heights = range(len(rows))[::-1]
    for axis, name in zip(axes, names, strict=True):
        colour = "tab:red" if name == SCORE else "tab:blue" if name in names[1:3] else "0.4"
        for height, row in zip(heights, rows, strict=True):
            x = row["scores"][name]
            if not math.isfinite(x["value"]):
                continue
            hollow = "white" if row["stop"] else colour
            ends = [x["low"], x["high"]] if math.isfinite(x["low"]) else [x["value"]] * 2
            error = [[max(0.0, x["value"] - ends[0])], [max(0.0, ends[1] - x["value"])]]
            axis.errorbar(x["value"], height, xerr=error, fmt="o", ms=5, capsize=2, lw=1,
                          color=colour, mfc=hollow)  # fmt: skip
        axis.set_title(name if name != SCORE else f"impact = √SNR x headroom({k})", fontsize=9)
        axis.grid(axis="y", color="0.92")
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(list(heights), [_label(row["name"]) for row in rows], parse_math=False)
    axes[0].set_ylim(-0.6, len(rows) - 0.4)
    order = "" if len(rows) < 2 else "ranking clear; " if told["clear"] else "ranking not clear; "
    figure.suptitle(
        f"Where will RL pay? {told['task'].rpartition('/')[2]} ({order}90 % intervals over "
        "prompts; hollow: no signal)",
        fontsize=10, x=0.01, ha="left", parse_math=False,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _label(name: str) -> str:
    return name if len(name) <= 30 else "…" + name[-29:]
