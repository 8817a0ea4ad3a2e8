"""The report on a terminal: one block per piece of work, one line per variant."""

from collections.abc import Iterable
from typing import Any

from . import offline
from .group import GEMM
from .record import Report, Row

HEAD = ("", "time", "x vgkern", "noise", "% roof", "% GEMMs", "peak MiB", "differs", "")
WIDTHS = (20, 9, 9, 6, 7, 8, 9, 8)


def text(report: Report) -> str:
    m = report.machine
    rates = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in report.roof.items() if k != "copy")
    lines = [
        f"vgkern {report.versions['vgkern']}, torch {report.versions['torch']}, "
        + (m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} threads"),
        f"this machine: copies {report.roof['copy'] / 1e9:.1f} GB/s, {rates}",
    ]
    if m["device"] == "cpu" and m["load"] > 0.5 * max(m["cores"], 1):
        lines.append(f"others were using it at the start (load {m['load']}): see the noise column")
    for block in blocks(report.rows):
        lines += ["", title(block[0]), *([] if block[0].seconds is None else [_line(HEAD)])]
        lines += [_line(cells(row)) for row in block]
    if report.skipped:
        lines += ["", "Not measured"]
        lines += [f"  {what}: {why}" for what, why in _grouped(report.skipped)]
    if report.not_timed:
        lines += ["", offline.text(report.not_timed)]
    return "\n".join(lines)


def blocks(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(row.key[:-1], []).append(row)
    return list(found.values())


def title(row: Row) -> str:
    what = f"{row.op}  {row.shape}  {row.dtype}  {row.pass_}"
    if row.vocab:
        what += f"  N={row.rows} H={row.hidden} V={row.vocab}"
    if row.cut:
        cut = {"time": "cut to the time", "memory": "cut to the memory", "given": "as asked"}
        what += f"  ({row.rows} of {row.rows_of} rows: {cut[row.cut]})"
    if row.share < 1:
        what += f"  {row.share:.0%} of rows active"
    if row.flops or row.bytes:
        what += f"  {row.flops / 1e9:.3g} GFLOP, {row.bytes / 1e6:.3g} MB"
    return what


def cells(row: Row) -> tuple[str, ...]:
    """One cell per column of HEAD; empty where there is no figure."""
    return (
        row.variant,
        duration(row.seconds),
        _number(row.ratio, "{:.2f}"),
        _number(row.noise and 100 * row.noise, "{:.0f}%"),
        _number(row.of_roof and 100 * row.of_roof, "{:.0f}"),
        _number(row.of_gemm and 100 * row.of_gemm, "{:.0f}") if row.variant != GEMM else "",
        _number(row.peak_mib, "{:,.0f}"),
        _number(row.error, "{:.0e}"),
        row.note,
    )


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _line(given: tuple[str, ...]) -> str:
    name, *rest = given[: len(WIDTHS)]
    figures = [c.rjust(w) for c, w in zip(rest, WIDTHS[1:], strict=True)]
    return f"  {name:<{WIDTHS[0]}}{''.join(figures)}  {given[-1]}".rstrip()


def _grouped(skipped: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One line per variant and reason, however many groups it is said of."""
    found: dict[tuple[str, str], list[str]] = {}
    for s in skipped:
        name, _, work = s["what"].partition(": ")
        found.setdefault((name, s["why"]), []).append(work)
    lines = []
    for (name, why), works in found.items():
        ops = list(dict.fromkeys(w.split()[0] for w in works if w))
        shown = [w for w in works if w]
        where = f" ({shown[0] if len(shown) == 1 else ', '.join(ops)})" if shown else ""
        where += f" {len(shown)} times" if len(shown) > 1 else ""
        lines.append((name + where, why))
    return lines
