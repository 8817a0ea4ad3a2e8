"""Interleaved timing: A B C, C B A, A B C ...; medians, and the noise of the paired ratios.

A sample is the mean of as many calls as take SAMPLE_SECONDS. On a GPU the calls rotate over copies
of the inputs that together exceed the L2 cache, between two CUDA events; calls shorter than
GRAPH_SECONDS are captured in a CUDA graph, so that the launches are not what is timed.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]
SAMPLE_SECONDS, MOST_CALLS, LEAST_ROUNDS = 2e-3, 1000, 3
GRAPH_SECONDS, GRAPH_CALLS = 2e-4, 20


class Timing(NamedTuple):
    seconds: float  # median of one call
    ratio: float  # median of the ratios to the base in the same round
    noise: float  # median distance of those ratios from it, as a share of it; of the base: its own
    rounds: int
    calls: int  # in one sample
    clock: str


class Clock(Protocol):
    name: str

    def sample(self, runs: Sequence[Call], calls: int) -> float:
        """Seconds of one call, the mean of `calls`, which rotate over `runs`."""

    def now(self) -> float:
        """Seconds of a clock that only moves on."""


class WallClock:
    name = "wall"

    def sample(self, runs: Sequence[Call], calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            runs[i % len(runs)]()
        return (time.perf_counter() - start) / calls

    def now(self) -> float:
        return time.perf_counter()


class EventClock:
    """Between two CUDA events, behind a synchronised device."""

    name = "events"

    def sample(self, runs: Sequence[Call], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for i in range(calls):
            runs[i % len(runs)]()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    def now(self) -> float:
        return time.perf_counter()


def graphed(runs: Sequence[Call]) -> Call:
    """GRAPH_CALLS calls that rotate over `runs`, as one CUDA graph; raises what capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(GRAPH_CALLS):
            runs[i % len(runs)]()
    return graph.replay


def paired(
    variants: dict[str, Sequence[Call]],
    base: str,
    clock: Clock,
    rounds: int,
    limit: float = math.inf,
    capture: Callable[[Sequence[Call]], Call] | None = None,
) -> dict[str, Timing]:
    """Each variant against `base`, one of them; warmed up by the caller. After `limit` seconds no
    new round starts, but LEAST_ROUNDS do."""
    began, runs, calls, inner, name = clock.now(), dict(variants), {}, {}, {}
    for k in variants:
        one = clock.sample(runs[k], len(runs[k]))
        inner[k], name[k] = 1, clock.name
        if capture and one < GRAPH_SECONDS:
            try:
                runs[k] = [capture(runs[k])]
                inner[k], name[k] = GRAPH_CALLS, "graph"
            except Exception as error:  # one that synchronises, say: its launches are timed too
                name[k] = f"{clock.name}, no graph: {str(error).strip().splitlines()[0][:60]}"
        calls[k] = min(max(math.ceil(SAMPLE_SECONDS / max(one * inner[k], 1e-9)), 1), MOST_CALLS)
    seconds: dict[str, list[float]] = {k: [] for k in variants}
    for i in range(rounds):
        if i >= LEAST_ROUNDS and clock.now() - began > limit:
            break
        for k in list(variants)[:: 1 if i % 2 == 0 else -1]:
            seconds[k].append(clock.sample(runs[k], calls[k]) / inner[k])
    return {
        k: Timing(*summary(s, seconds[base] if k != base else None), len(s), calls[k] * inner[k],
                  name[k])
        for k, s in seconds.items()
    }  # fmt: skip


def summary(seconds: list[float], base: list[float] | None) -> tuple[float, float, float]:
    """(median seconds, median ratio to the base, noise); base None: this is the base."""
    median = statistics.median(seconds)
    if base is None:
        return median, 1.0, spread(seconds)
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return median, statistics.median(ratios), spread(ratios)


def spread(values: list[float]) -> float:
    """Median absolute deviation / median."""
    m = statistics.median(values)
    return statistics.median(abs(v - m) for v in values) / m
