"""A piece of work measured: every variant checked, warmed up and timed in turn; its rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from . import roof
from .clock import LEAST_ROUNDS, Call, Clock, graphed, paired
from .group import GEMM, Group, first_line, library
from .memory import cuda_peak
from .record import Row
from .rivals import Skip
from .work import Work, cost

LEAST_LIMIT = 0.25  # seconds: one call is never too long below


def measure(
    work: Work, device: torch.device, names: Sequence[str], clock: Clock,
    rates: dict[str, float], rounds: int, limit: float, copies: int = 0,
) -> tuple[list[Row], list[tuple[str, str]]]:  # fmt: skip
    """Rows of the variants, and those that were skipped, each with its reason."""
    group = Group(work, device, copies)
    errors: dict[str, float] = {}
    runs: dict[str, Sequence[Call]] = {}
    skipped: list[tuple[str, str]] = []
    for name in dict.fromkeys([group.base, *names, GEMM]):
        try:
            errors[name] = group.check(name)
            calls: list[Call] = [group.call(name, x) for x in group.xs]
            began = clock.now()
            calls[0]()  # warm, compiled
            group.forget()
            took = clock.now() - began
            if name not in (group.base, GEMM) and took > max(limit / LEAST_ROUNDS, LEAST_LIMIT):
                raise Skip(f"one call takes {took:.1f} s, too long for the time budget")
            runs[name] = calls
        except Skip as why:
            skipped.append((name, str(why)))
        except Exception as error:
            skipped.append((name, f"{type(error).__name__}: {first_line(error)}"))
    group.expected = None  # the memory of its gradients
    wanted = {k: r for k, r in runs.items() if k in (group.base, *names, GEMM)}
    base = group.base if group.base in wanted else next(iter(wanted), "")
    if not base:
        return [], skipped
    capture = graphed if device.type == "cuda" else None
    timings = paired(wanted, base, clock, rounds, limit, capture)
    flops, nbytes = cost(work, group.xs[0])
    least = roof.floor(rates, work.dtype, flops, nbytes)
    gemm = timings[GEMM].seconds if GEMM in timings else None
    rows = []
    for name, t in timings.items():
        if name == group.base and name not in names:
            continue  # it was there to compare with
        note = "" if name == GEMM else library(name, device).note(work.op)
        peak = None
        if device.type == "cuda" and name != GEMM:
            group.forget()
            peak = cuda_peak(runs[name][0])
        rows.append(
            Row(**fields(work), variant=name, seconds=t.seconds, ratio=t.ratio, noise=t.noise,
                rounds=t.rounds, calls=t.calls, clock=t.clock, flops=flops, bytes=nbytes,
                of_roof=None if name == GEMM else least / t.seconds,
                of_gemm=gemm and gemm / t.seconds,
                peak_mib=peak, error=None if name in (GEMM, group.base) else errors[name],
                note=note)
        )  # fmt: skip
    return rows, skipped


def fields(work: Work) -> dict[str, Any]:
    """The fields of a row that say what ran."""
    return dataclasses.asdict(work)
