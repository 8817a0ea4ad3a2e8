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
    found: Count
    minimum: Minimum
    time: predict.Time

    @property
    def ratio(self) -> float:
        return self.found.bytes / self.minimum.bytes

    @property
    def name(self) -> str:
        return f"{self.call.name} on {self.backend}"

    def faults(self) -> list[str]:
        """The bars that this call is over and may not be, and those that it is known to be over
        and is not."""
        allowed, m, n = known.known(self.call, self.backend), self.minimum, self.found
        faults = []

        def hold(what: str, value: float, bar: float, over: float | None) -> None:
            if value > (bar if over is None else over):
                faults.append(f"{what} {value:.3f}; allowed: {bar if over is None else over:.3f}")
            elif over is not None and value <= bar:
                within = f"{what} {value:.3f} is within {bar:.3f}"
                faults.append(f"{within}: known.py says that it is not")

        hold("bytes over the minimum", self.ratio, m.most_bytes / m.bytes, allowed.ratio)
        hold("launches", n.launches, m.launches, allowed.launches)
        if self.call.name in PEAK:
            bar = PEAK[self.call.name] / 2**30
            hold("GiB beside the inputs", n.peak / 2**30, bar, allowed.peak)
        if self.backend == "triton" and self.call.name in MILLISECONDS:
            bar = MILLISECONDS[self.call.name]
            hold("milliseconds predicted", 1e3 * self.time.total, bar, None)
        waits = [w for w in n.waits if w != "nonzero" or not minimum.looks(self.call)]
        faults += [f"the host waits for {w}" for w in waits]
        return [f"{self.name}: {x}" for x in faults]


def lines(only: str = "") -> list[Line]:
    return [
        line(call, backend) for call in calls.calls() for backend in call.backends
        if call.name.startswith(only)
    ]  # fmt: skip


def line(call: calls.Call, backend: str) -> Line:
    found = call.counted(backend)
    return Line(call, backend, found, minimum.minimum(call), predict.time(found))


HEAD = ("op", "pass", "shape", "backend", "launches", "GB", "x min", "TFLOP", "GiB", "ms", "bound")


def cells(x: Line) -> tuple[str, ...]:
    n = x.found
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
    sides = [str.ljust] * 4 + [str.rjust] * (len(HEAD) - 4)
    return "\n".join(
        "  ".join(side(c, w) for side, c, w in zip(sides, row, widths, strict=True)).rstrip()
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
    rows: list[tuple[str, ...]] = []
    rest, small = 0.0, 0
    for one in x.found.launched:
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
    known_over: dict[str, list[str]] = {}
    for x in rows:
        for why in known.known(x.call, x.backend).why:
            known_over.setdefault(why, []).append(x.name)
    for why, names in known_over.items():
        print(f"known: {why}\n    " + "\n    ".join(names))
    faults = [fault for x in rows for fault in x.faults()]
    for fault in faults:
        print(f"BROKEN: {fault}")
    if write:
        PAGE.write_text(written(PAGE.read_text(), rows))
    return 1 if faults else 0
