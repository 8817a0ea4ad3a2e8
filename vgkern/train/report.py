"""The end of a run: learning curve, completions before and after, one screen of summary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgkern.tasks import Entry

from .log import Log
from .page import page
from .update import extreme

if TYPE_CHECKING:
    from .config import Config
    from .trainer import Trainer

SHOWN = 5  # completions on screen; samples.txt has more
WRITTEN = 32


def write_report(out: Path, config: Config, trainer: Trainer, samples: list[list[str]]) -> str:
    """Write `curve.png`, `samples.txt`, `report.html` and `summary.txt`; return the summary."""
    drawn = draw_curve(trainer.log, config, out / "curve.png")
    rows = sample_rows(trainer, samples)
    table = aligned(rows)
    told = [*learned(trainer.log, config, len(trainer.held_out)), "", *speed(trainer)]
    (out / "report.html").write_text(page(config, trainer.log, told, rows), encoding="utf-8")
    (out / "samples.txt").write_text("\n".join(table[: WRITTEN + 1]) + "\n")
    text = "\n".join(
        [
            "",
            *learned(trainer.log, config, len(trainer.held_out)),
            "",
            *(f"  {row}" for row in table[: SHOWN + 1]),
            "",
            *speed(trainer),
            "",
            f"Everything is in {out}/",
            "  final/        weights, config and tokenizer: --model " + str(out / "final"),
            "  metrics.jsonl one line per step and evaluation; config.json; samples.txt",
            f"  curve.png     {drawn}; report.html has all of it on one page",
        ]
    )
    (out / "summary.txt").write_text(text + "\n")
    return text


def learned(log: Log, config: Config, prompts: int) -> list[str]:
    first, last = log.of("eval")[0], log.of("eval")[-1]
    lines = [f"{config.task}: score on {prompts} held-out prompts, before and after RL"]
    for name, what in (("sampled", "one sample"), ("greedy", "greedy")):
        change = 100 * (last[name] - first[name])
        lines.append(f"  {what:<11} {first[name]:.3f} -> {last[name]:.3f}  ({change:+.1f} points)")
    if config.teacher:
        found = [step["distill"] for step in log.of("step") if "distill" in step]
        text = f"  distilled from {config.teacher}"
        if found:  # a skipped step has none
            text += f": {found[0]:.3f} -> {found[-1]:.3f} nats per token"
        lines.append(text + ("" if config.reward_coef else "; no task reward"))
    if config.shuffle_rewards:
        lines.append("  control run: rewards were dealt to random samples")
    for end in log.of("warm_end"):
        text = f"  warm start  {end['step']} steps, {end['seconds']:.0f} s"
        if config.warm_wrong:
            share = f"{100 * config.warm_wrong:.0f} %"
            text += f"; {share} of its demonstrations were wrong in one consistent way"
            if config.warm_wrong > 0.5 and last["sampled"] > first["sampled"]:
                text += ",\n              so RL brought out a skill that was in their minority"
        lines.append(text)
    return lines


def speed(trainer: Trainer) -> list[str]:
    steps = trainer.log.of("step")
    if not steps:
        return ["No RL steps."]
    parts = {name: [s[f"ms_{name}"] for s in steps] for name in ("rollout", "score", "update")}
    total = [sum(values) for values in zip(*parts.values(), strict=True)]
    seconds = sum(total) / 1e3
    rate = sum(s["tokens"] for s in steps) / seconds
    gap = "not measured: no group had a gradient"
    if trainer.gap is not None:
        gap = f"{trainer.gap:.1e} nats"
    split = ", ".join(f"{name} {statistics.median(values):.0f}" for name, values in parts.items())
    return [
        f"{len(steps)} steps in {seconds:.1f} s, {rate:,.0f} sampled tokens/s",
        f"  median step {statistics.median(total):.0f} ms: {split}",
        f"  largest sampler/trainer gap {gap}, {trainer.skipped} steps skipped",
        *(
            []
            if trainer.replay is None
            else [
                f"  replayed noise: {trainer.replay:.2%} of the tokens chosen again, at the least"
            ]
        ),
        *_sparse(steps),
        f"  warm start, RL and evaluations {trainer.log.records[-1]['time']:.0f} s",
    ]


def _sparse(steps: list[dict[str, Any]]) -> list[str]:
    """What `sparse_tol` left out, if it was on."""
    found = [step for step in steps if "sparse_error_dh" in step]
    if not found:
        return []
    dh, dw = (statistics.median(s[f"sparse_columns_{k}"] for s in found) for k in ("dh", "dw"))
    worst = extreme(max, [s[f"sparse_error_{k}"] for s in found for k in ("dh", "dw")])
    return [
        f"  columns of the output layer multiplied: {dh:.1%} for dh, {dw:.1%} for dW (medians); "
        f"estimated error at most {worst:.1e}"
    ]


def sample_rows(trainer: Trainer, samples: list[list[str]]) -> list[tuple[str, ...]]:
    """Question, expected answer, greedy completion before and after, under their header."""
    rows: list[tuple[str, ...]] = [("question", "answer", "before", "after")]
    columns = (samples[0], samples[-1])
    for entry, before, after in zip(trainer.held_out[:WRITTEN], *columns, strict=False):
        rows.append((*asked(entry), before, after))
    return rows


def asked(entry: Entry) -> tuple[str, str]:
    """Question and answer as a table shows them: without what stands before every question."""
    text = entry.question if isinstance(entry.question, str) else entry.question[-1]["content"]
    return text.strip().rsplit("\n\n", 1)[-1], str(entry.answer)


def aligned(rows: Sequence[tuple[str, ...]], limit: int = 40) -> list[str]:
    """One line each, in columns of at most `limit` characters."""
    cells = [[_short(cell, limit) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _short(text: str, limit: int) -> str:
    text = text.strip().replace("\n", " ").encode("unicode_escape").decode()
    return text if len(text) <= limit else "..." + text[3 - limit :]


def draw_curve(log: Log, config: Config, path: Path) -> str:
    """Held-out scores and training reward over RL seconds; says so if matplotlib is absent."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: pip install matplotlib"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    evals, steps = log.of("eval"), log.of("step")
    if steps:
        axes.plot(
            [s["step"] for s in steps], [s["reward"] for s in steps],
            color="0.75", lw=1, label="training reward",
        )  # fmt: skip
    for name, color in (("sampled", "tab:blue"), ("greedy", "tab:orange")):
        axes.plot(
            [e["step"] for e in evals], [e[name] for e in evals],
            color=color, marker="o", ms=3, label=f"held out, {name}",
        )  # fmt: skip
    axes.set(xlabel="RL step", ylabel="score", title=config.task)
    seen = [e[name] for e in evals for name in ("sampled", "greedy")] + [s["reward"] for s in steps]
    seen = [x for x in seen if x == x]
    low, high = min([0.0, *seen]), max([1.0, *seen])  # a task's scores may be any numbers
    axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    axes.legend(loc="best", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return "learning curve"
