"""Two runs, row by row: B / A. A regression is a row of ours beyond the threshold and its noise."""

from typing import NamedTuple

from .group import GEMM
from .record import Report, Row
from .table import blocks, duration

THRESHOLD = 1.10
NOISES = 3.0  # a ratio counts when it is beyond 1 by so many times the noise of both


class Change(NamedTuple):
    before: Row
    after: Row
    ratio: float  # of the times; of the times over the bare products where both have them
    by_gemm: bool
    noise: float

    @property
    def ours(self) -> bool:
        return self.after.variant.startswith("vgkern")

    def worse(self, threshold: float) -> bool:
        return self.ours and self.ratio > max(threshold, 1 + NOISES * self.noise)


def changes(a: Report, b: Report) -> list[Change]:
    """Of the rows that both have, and that both timed."""
    before, after = _gemms(a), _gemms(b)
    old = {row.key: row for row in a.rows}
    found = []
    for row in b.rows:
        was = old.get(row.key)
        if was is None or was.seconds is None or row.seconds is None or row.variant == GEMM:
            continue
        ratio, group = row.seconds / was.seconds, row.key[:-1]
        by_gemm = group in before and group in after
        if by_gemm:
            ratio *= before[group] / after[group]
        found.append(Change(was, row, ratio, by_gemm, (was.noise or 0) + (row.noise or 0)))
    return found


def _gemms(report: Report) -> dict[tuple, float]:
    rows = [row for block in blocks(report.rows) for row in block if row.variant == GEMM]
    return {row.key[:-1]: row.seconds for row in rows if row.seconds}


def text(a: Report, b: Report, threshold: float) -> str:
    found = changes(a, b)
    lines = [
        f"A: vgkern {a.versions.get('vgkern')}, torch {a.versions.get('torch')}",
        f"B: vgkern {b.versions.get('vgkern')}, torch {b.versions.get('torch')}",
    ]
    differs = [k for k in ("cpu", "gpu", "threads") if a.machine.get(k) != b.machine.get(k)]
    if differs:
        lines.append(f"other machines ({', '.join(differs)} differ): only B/A with * is comparable")
    lines.append(f"\n  {'':<74}{'A':>9}{'B':>9}{'B/A':>8}{'noise':>7}")
    for c in sorted(found, key=lambda c: -c.ratio):
        r = c.after
        size = f" {r.rows}x{r.hidden}x{r.vocab}" if r.vocab else ""
        active = f" {r.share:.0%}" if r.share < 1 else ""
        what = f"{r.variant}: {r.op} {r.shape}{size} {r.dtype} {r.pass_}{active}"
        lines.append(
            f"  {what:<74}{duration(c.before.seconds):>9}{duration(r.seconds):>9}"
            f"{c.ratio:>7.2f}{'*' if c.by_gemm else ' '}{100 * c.noise:>6.0f}%"
            + ("  SLOWER" if c.worse(threshold) else "")
        )
    lines.append("  * of the times over the bare GEMMs of the same run: a slower machine cancels")
    alone = len({r.key for r in a.rows} ^ {r.key for r in b.rows})
    worse = sum(c.worse(threshold) for c in found)
    lines.append(
        f"\n{len(found)} rows compared, {worse} of vgkern's slower by more than {threshold:.2f}x "
        f"and {NOISES:.0f} times the noise; {alone} rows are in one run only"
    )
    return "\n".join(lines)


def files(a: Report, b: Report, threshold: float) -> int:
    """Prints the table; 1 when something of ours is slower, 2 when nothing can be compared."""
    print(text(a, b, threshold))
    found = changes(a, b)
    return 2 if not found else int(any(c.worse(threshold) for c in found))
