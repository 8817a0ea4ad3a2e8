"""What every call launches and moves, as a table: `python -m vgkern doctor --traffic`, and the
predictions of docs/gpu-predictions.md, which a test holds to the code."""

from pathlib import Path
from typing import NamedTuple

from vgkern.gate.traffic import calls, known, minimum, predict
from vgkern.gate.traffic.count import Count
from vgkern.gate.traffic.minimum import MILLISECONDS, PEAK, Minimum

PAGE = Path(__file__).resolve().parents[3] / "docs" / "gpu-predictions.md"
FIRST, LAST = "<!-- traffic: first -->", "<!-- traffic: last -->"
SHOWN = ("linear_policy_loss full 8192x4096x131072", "linear_policy_loss full 8192x576x49152")
ONE_PERCENT = 0.01


class Line(NamedTuple):
    call: calls.Call
    backend: str
    count: Count
    minimum: Minimum
    time: predict.Time

    @property
    def ratio(self) -> float:
        return self.count.bytes / self.minimum.bytes

    def faults(self) -> list[str]:
        """The bars that this call is over and may not be."""
        name, allowed = self.call.name, known.known(self.call, self.backend)
        most, launches = self.minimum.most_bytes, self.minimum.launches
        if allowed and allowed.ratio:
            most = allowed.ratio * self.minimum.bytes
        if allowed and allowed.launches:
            launches = allowed.launches
        found = []
        if self.count.bytes > most:
            share = f"{self.ratio:.3f} of the minimum {self.minimum.bytes / 1e9:.3f} GB"
            allow = f"{most / self.minimum.bytes:.3f}"
            found.append(f"moves {self.count.bytes / 1e9:.3f} GB, {share}; allowed: {allow}")
        if self.count.launches > launches:
            found.append(f"{self.count.launches} launches; allowed: {launches}")
        if self.backend == "triton" and name in MILLISECONDS:
            took = 1e3 * self.time.total
            if took > MILLISECONDS[name]:
                found.append(f"{took:.2f} ms predicted; allowed: {MILLISECONDS[name]}")
        peak = (allowed.peak if allowed else None) or PEAK.get(name)
        if peak and self.count.peak > peak:
            gib = (self.count.peak / 2**30, peak / 2**30)
            found.append(f"{gib[0]:.2f} GiB beside its inputs; allowed: {gib[1]:.2f}")
        return [f"{name} on {self.backend}: {x}" for x in found]

    def settled(self) -> bool:
        """Is it within the bars that it is known to be over?"""
        allowed = known.known(self.call, self.backend)
        return allowed is not None and (
            (allowed.ratio is not None and self.count.bytes <= self.minimum.most_bytes)
            or (allowed.launches is not None and self.count.launches <= self.minimum.launches)
            or (allowed.peak is not None and self.count.peak <= PEAK[self.call.name])
        )


def lines(only: str = "") -> list[Line]:
    return [
        line(call, backend) for call in calls.calls() for backend in call.backends
        if call.name.startswith(only)
    ]  # fmt: skip


def line(call: calls.Call, backend: str) -> Line:
    count = call.count(backend)
    return Line(call, backend, count, minimum.minimum(call), predict.time(count))


HEAD = ("op", "pass", "shape", "backend", "launches", "GB", "x min", "TFLOP", "GiB", "ms", "bound")


def cells(x: Line) -> tuple[str, ...]:
    n = x.count
    shape = "x".join(map(str, x.call.shape))
    over = f"{x.ratio:.2f}" if n.bytes > minimum.SLACK else "-"
    return (
        x.call.op, x.call.what, shape, x.backend, str(n.launches), _short(n.bytes / 1e9), over,
        _short(n.flops / 1e12), f"{n.peak / 2**30:.2f}", _short(1e3 * x.time.total), x.time.bound,
    )  # fmt: skip


def _short(x: float) -> str:
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def table(rows: list[Line]) -> str:
    """Aligned, for a terminal."""
    all_ = [HEAD, *map(cells, rows)]
    widths = [max(len(row[i]) for row in all_) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in all_
    )


def section(rows: list[Line]) -> str:
    """The predictions, in Markdown."""
    parts = [_markdown(HEAD, [cells(x) for x in rows])]
    for x in rows:
        if x.call.name in SHOWN and x.backend == "triton":
            parts.append(_arithmetic(x))
    return "\n\n".join(parts) + "\n"


def _arithmetic(x: Line) -> str:
    """Each launch that takes a hundredth of the call, and the rest."""
    rows, rest, small = [], 0.0, 0
    for one in x.count.launched:
        took = predict.device(one)
        if took < ONE_PERCENT * x.time.total:
            rest, small = rest + took, small + one.times
            continue
        m = one.moved
        by = "flops" if m.flops / predict.FLOPS[m.size] > m.bytes / predict.BYTES else "bytes"
        flops = f"{m.flops / 1e12:.2f}" if m.flops else ""
        rows.append((one.name, one.shapes, f"{m.bytes / 1e9:.2f}", flops, f"{1e3 * took:.2f}", by))
    rows.append((f"{small} others", "", "", "", f"{1e3 * rest:.2f}", ""))
    bar = MILLISECONDS[x.call.name]
    title = f"`{x.call.name}`: {1e3 * x.time.total:.1f} ms on triton (the bar is {bar:g} ms)"
    head = ("launch", "operands and results", "GB", "TFLOP", "ms", "by")
    return f"{title}\n\n{_markdown(head, rows)}"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines_ = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines_)


def written(page: str, rows: list[Line]) -> str:
    """The page with this section between its markers."""
    before, rest = page.split(FIRST)
    after = rest.split(LAST)[1]
    return f"{before}{FIRST}\n{section(rows)}{LAST}{after}"


def report(write: bool) -> int:
    """Prints the table and what is over a bar; 1 if anything is that may not be."""
    rows = lines()
    print(table(rows))
    faults = [fault for x in rows for fault in x.faults()]
    for x in rows:
        if (allowed := known.known(x.call, x.backend)) is not None:
            print(f"known: {x.call.name} on {x.backend}: {allowed.why}")
            if x.settled():
                faults.append(f"{x.call.name} on {x.backend} is within a bar: known.py says not")
    for fault in faults:
        print(f"BROKEN: {fault}")
    if write:
        PAGE.write_text(written(PAGE.read_text(), rows))
    return 1 if faults else 0
