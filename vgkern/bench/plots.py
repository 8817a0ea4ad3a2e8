"""Four pictures of a report: time vs vocabulary, memory vs rows, time vs share of active rows,
and the roofline. Without matplotlib: a message with the remedy, and no pictures."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .group import GEMM
from .record import Report, Row
from .work import BOTH, FWD, differentiated

ABSENT = "not drawn: pip install matplotlib"
COLOURS = {
    "vgkern cpu": "tab:blue", "vgkern triton": "tab:blue", "vgkern cuda": "tab:cyan",
    "vgkern torch": "tab:gray", "torch eager": "tab:orange", "torch.compile": "tab:red",
    "TRL": "tab:green", "Liger": "tab:purple", "cut-cross-entropy": "tab:brown",
    "verl": "tab:pink", GEMM: "black",
}  # fmt: skip
MARKS = "osD^vPX*<>h"


def draw(report: Report, out: Path) -> str:
    """Writes the PNGs that the rows have data for; says which, or why none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ABSENT
    made = []
    for name, paint in PICTURES.items():
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes: Any = figure.subplots()
        if paint(axes, report):
            axes.grid(alpha=0.3, which="major")
            figure.supxlabel(_source(report), fontsize=7, color="0.4")
            figure.savefig(out / f"{name}.png", dpi=150)
            made.append(f"{name}.png")
    return ", ".join(made) or "no row has the data for one"


def _source(report: Report) -> str:
    m = report.machine
    name = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads"
    return f"{name}; torch {report.versions['torch']}; vgkern {report.versions['vgkern']}"


def _swept(report: Report, sweep: str) -> list[Row]:
    return [row for row in report.rows if row.sweep == sweep]


def _curves(
    axes: Any, rows: Iterable[Row], x: Callable[[Row], float], y: Callable[[Row], float | None]
) -> bool:
    """One line per variant, and its name at the legend."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = y(row)
        if value is not None:
            found.setdefault(row.variant, []).append((x(row), value))
    for name, points in found.items():
        style = {"ls": "--", "marker": "", "lw": 1.2} if name == GEMM else {"marker": "o", "ms": 4}
        axes.plot(*zip(*sorted(points), strict=True), label=name, color=COLOURS.get(name), **style)
    if found:
        axes.legend(frameon=False, fontsize=8)
    return bool(found)


def _ticks(axis: Any, values: Iterable[float]) -> None:
    """The measured values themselves, written out."""
    from matplotlib.ticker import NullLocator

    shown = sorted(set(values))
    axis.set_ticks(shown, [f"{v:,.0f}" for v in shown])
    axis.set_minor_locator(NullLocator())


def vocab(axes: Any, report: Report) -> bool:
    rows = _swept(report, "vocab")
    if not _curves(axes, rows, lambda r: r.vocab, lambda r: r.seconds and 1e3 * r.seconds):
        return False
    r = rows[0]
    axes.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="ms per call",
             title=f"{r.op}, {r.pass_}, {r.rows} rows, H={r.hidden}, {r.dtype}")  # fmt: skip
    _ticks(axes.xaxis, [r.vocab for r in rows])
    return True


def memory(axes: Any, report: Report) -> bool:
    rows = _swept(report, "rows")
    if not _curves(axes, rows, lambda r: r.rows, lambda r: r.peak_mib):
        return False
    r = rows[0]
    axes.set(xlabel="rows (tokens)", ylabel="peak extra memory, MiB (gradients included)",
             title=f"{r.op}, {r.shape} (H={r.hidden}, V={r.vocab:,}), {r.dtype}")  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({r.rows for r in rows})[-4:])
    return True


def active(axes: Any, report: Report) -> bool:
    rows = [r for r in _swept(report, "active") if r.variant != GEMM]
    full = {r.variant: r.seconds for r in rows if r.share == 1}

    def of_full(row: Row) -> float | None:
        whole = full.get(row.variant)
        return row.seconds / whole if row.seconds and whole else None

    if not _curves(axes, rows, lambda r: 100 * r.share, of_full):
        return False
    r = rows[0]
    axes.plot([0, 100], [0, 1], color="0.6", lw=1, ls=":", label="in proportion")
    axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="active rows, %", ylabel="time / its own time with all rows active",
             title=f"{r.op}, {r.shape}, {r.rows} rows, {r.dtype}")  # fmt: skip
    axes.set_xlim(0, 104)
    axes.set_ylim(bottom=0)
    return True


def roofline(axes: Any, report: Report) -> bool:
    """Flop/s over flops per byte, both of the ideal kernel, for vgkern's own choice of backend."""
    base = next((r.variant for r in report.rows if r.variant.startswith("vgkern")), "")
    rows = [r for r in report.rows if r.variant == base and r.seconds and r.flops and r.bytes
            and not r.sweep and r.pass_ == (BOTH if differentiated(r.op) else FWD)]  # fmt: skip
    if not rows:
        return False
    copy, ops, types = report.roof["copy"], [], []
    xs = [r.flops / r.bytes for r in rows]
    low, high = min(xs) / 2, max(xs) * 2
    for r in rows:
        new = r.op not in ops
        ops += [r.op] * new
        types += [r.dtype] * (r.dtype not in types)
        i = ops.index(r.op)
        axes.plot(
            r.flops / r.bytes, r.flops / (r.seconds or 1) / 1e9, MARKS[i % len(MARKS)], ms=6,
            color=f"C{i % 10}", mfc="none" if r.dtype != types[0] else None, ls="none",
            label=r.op if new else None,
        )  # fmt: skip
    drawn: list[float] = []
    for dtype in types:
        rate = max(report.roof[dtype], report.roof["fp32"])
        ridge = rate / copy
        points = sorted({low, min(max(ridge, low), high), high})
        axes.plot(points, [min(p * copy, rate) / 1e9 for p in points], color="black", lw=1.2,
                  ls="-" if dtype == types[0] else "--")  # fmt: skip
        axes.annotate(f"{dtype} {rate / 1e9:,.0f} GFLOP/s", (high, rate / 1e9), fontsize=7,
                      ha="right", va="top" if rate in drawn else "bottom")  # fmt: skip
        drawn.append(rate)
    axes.annotate(f"  copy {copy / 1e9:.1f} GB/s", (low, low * copy / 1e9), fontsize=7, va="top")
    filled = f"; filled {types[0]}, open {types[1]}" if len(types) > 1 else ""
    axes.set(xscale="log", yscale="log", xlabel="flops per byte of the ideal kernel",
             ylabel="GFLOP/s", title=f"{base}, forward and backward{filled}")  # fmt: skip
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    return True


PICTURES: dict[str, Callable[[Any, Report], bool]] = {
    "time-vs-vocab": vocab, "memory-vs-rows": memory, "time-vs-active": active,
    "roofline": roofline,
}  # fmt: skip
