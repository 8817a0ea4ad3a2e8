"""Interleaved timing on the device: A B C, C B A, A B C ...; medians.

A sample is the mean of as many calls as take a millisecond, between two CUDA events; calls rotate
over copies of the inputs that together exceed the L2 cache. Every variant has LEAST samples or
SECONDS of them, whichever comes first, but at least three. These times have the host's in them, as
a program has that waits after each call; then a few are taken with the host ahead of the device.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from vgkern.gpu.device import Phase
from vgkern.gpu.record import said

Call = Callable[[], Any]
LEAST, SECONDS, MOST = 20, 2.0, 40
SAMPLE, MOST_CALLS = 1e-3, 200
AHEAD, MOST_AHEAD = 5, 10  # samples; calls of one, whose launches have to fit the device's queue


class Time(NamedTuple):
    seconds: float | None  # of one call, the host's included; None: it did not run
    why: str = ""  # it did not run, or how far the samples are apart
    device: float | None = None  # of one call where the host is ahead of the device


def interleaved(
    phase: Phase, variants: dict[str, list[Call] | str], share: float = 1.0
) -> dict[str, Time]:
    """Times by name; a variant is calls to rotate over, or why there are none. What raises in its
    first call has no time. In no more than `share` of what is left of the phase."""
    found = {k: Time(None, v) for k, v in variants.items() if isinstance(v, str)}
    runs: dict[str, list[Call]] = {}
    inner: dict[str, int] = {}
    stop = phase.left() * (1 - share)
    for name, calls in variants.items():
        if isinstance(calls, str):
            continue
        if phase.left() < 3:
            found[name] = Time(None, "no time left in this phase")
            continue
        try:
            calls[0]()  # compiles
            for call in calls[1:]:
                call()
            one = 1.0 if phase.dry else phase.seconds(calls, len(calls))
        except Exception as error:
            found[name] = Time(None, said(error))
            phase.forget()
            continue
        runs[name] = calls
        inner[name] = min(max(math.ceil(SAMPLE / max(one, 1e-9)), 1), MOST_CALLS)
    samples: dict[str, list[float]] = {k: [] for k in runs}
    rounds = 1 if phase.dry else MOST
    for i in range(rounds):
        open_ = [k for k in runs if not enough(samples[k], inner[k])]
        if not open_ or (i >= 3 and phase.left() < stop):
            break
        for name in open_[:: 1 if i % 2 == 0 else -1]:
            samples[name].append(phase.seconds(runs[name], inner[name]))
    for name, seconds in samples.items():
        m = statistics.median(seconds)
        found[name] = Time(m, spread(seconds), on_device(phase, runs[name], m))
    return found


def on_device(phase: Phase, calls: list[Call], seconds: float) -> float:
    """Of one call, as a loop sees it that does not wait for each: median of AHEAD samples."""
    if phase.dry:
        return seconds
    count = min(max(math.ceil(SAMPLE / seconds), 1), MOST_AHEAD)
    ahead = 2e-3 + min(1.5 * seconds * count, 1e-2)
    return statistics.median(phase.seconds(calls, count, ahead) for _ in range(AHEAD))


def enough(samples: list[float], calls: int) -> bool:
    spent = sum(samples) * calls
    return len(samples) >= LEAST or (len(samples) >= 3 and spent >= SECONDS)


def spread(samples: list[float]) -> str:
    m = statistics.median(samples)
    apart = statistics.median(abs(s - m) for s in samples) / m if m else 0.0
    return f"{len(samples)} samples, {apart:.1%} apart" if apart > 0.02 else ""
