"""The plan carried out: progress on stderr, every failure a reason in the report."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import memory, offline, roof
from .clock import Clock, EventClock, WallClock
from .group import GEMM, first_line, library
from .machine import free_bytes, machine, versions
from .measure import fields, measure
from .plan import Options, estimate, plan, roof_types, variants, wants_peak
from .record import Report, Row
from .rivals import DEFAULT, Skip
from .work import Work

TRAINER = "benchmarks/trl_step.py times a step of TRL's GRPOTrainer against vgkern's trainer"
EVERY = "every variant"
Say = Callable[[str], None]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def clock_for(device: torch.device) -> Clock:
    return EventClock() if device.type == "cuda" else WallClock()


def run(options: Options, out: Path | None = None, tell: Say = say) -> Report:
    """Everything that `options` ask for. The JSON in `out` is written anew after every group."""
    device, clock = options.device, clock_for(options.device)
    tell("measuring this machine: copy bandwidth and GEMM rate")
    rates = roof.measure(device, clock, roof_types(options), 0.5 if options.level == "quick" else 1)
    asked = {"level": options.level, "budget_s": options.seconds, "rounds": options.rounds}
    report = Report(machine(device), versions(), rates, asked)
    report.skip("trainer step", f"not part of this: {TRAINER}")
    works = plan(options, rates, free_bytes(device))
    _load(options, report, tell)
    began = time.perf_counter()
    left = [0.0 if w.cut and not w.rows else estimate(w, options, rates) for w in works]
    for i, work in enumerate(works):
        spent, rest = time.perf_counter() - began, sum(left[i:])
        remaining = options.seconds - spent
        tell(f"[{i + 1}/{len(works)}] {work}{_cut(work)}; {_left(min(rest, remaining))}")
        if not work.rows and (work.vocab or work.cut):  # ops without a head have no rows
            why = "the time budget" if work.cut == "time" else "memory"
            report.skip(f"{EVERY}: {work}", f"it does not fit {why}")
        elif remaining <= 0:
            why = f"the time budget of {options.seconds:.0f} s was spent"
            report.skip(f"{EVERY}: {work}", why)
        else:
            limit = max(remaining * left[i] / rest, 0.2)
            _one(work, options, report, clock, limit)
        if out:
            report.write(out)
    if device.type == "cpu":
        report.not_timed = offline.figures(compile_now=options.level == "full", tell=tell)
        if out:
            report.write(out)
    tell(f"{len(works)} groups in {time.perf_counter() - began:.0f} s")
    return report


def _load(options: Options, report: Report, tell: Say) -> None:
    """Import the libraries now, so that no import is timed; those that cannot run are named."""
    device = options.device
    names = [f"vgkern {b}" for b in options.backends or DEFAULT[device.type]]
    names += options.rivals
    tell("looking for " + ", ".join(names))
    for name in names:
        try:
            library(name, device)
        except Skip as why:
            report.skip(name, str(why))


def _one(work: Work, options: Options, report: Report, clock: Clock, limit: float) -> None:
    absent = {s["what"] for s in report.skipped}
    names = [n for n in variants(work, options) if n not in absent]
    try:
        if work.sweep == "rows":
            return _memory_only(work, names, report)
        rows, skipped = measure(
            work, options.device, names, clock, report.roof, options.rounds, limit
        )
    except Skip as why:
        return report.skip(f"{EVERY}: {work}", str(why))
    except (RuntimeError, MemoryError) as error:  # out of memory, most of all
        return report.skip(f"{EVERY}: {work}", f"{type(error).__name__}: {first_line(error)}")
    for name, reason in skipped:
        if reason not in ("it has no such op", "no product with a head"):
            report.skip(f"{name}: {work}", reason)
    report.rows += rows
    if wants_peak(work, options):
        _peaks(work, [r for r in rows if r.variant != GEMM], report)


def _peaks(work: Work, rows: list[Row], report: Report) -> None:
    try:
        found = memory.peaks(work, [r.variant for r in rows], torch.get_num_threads())
    except Skip as why:
        return report.skip(f"{EVERY}: {work}", str(why))
    for row in rows:
        peak = found[row.variant]
        if isinstance(peak, str):
            report.skip(f"{row.variant}: {work}", f"peak memory: {peak}")
        else:
            row.peak_mib = peak


def _memory_only(work: Work, names: list[str], report: Report) -> None:
    found = memory.peaks(work, names, torch.get_num_threads())
    for name, peak in found.items():
        if isinstance(peak, str):
            report.skip(f"{name}: {work}", f"peak memory: {peak}")
        else:
            report.rows.append(Row(**fields(work), variant=name, peak_mib=peak))


def _cut(work: Work) -> str:
    return f" ({work.rows} of {work.rows_of} rows: {work.cut})" if work.cut else ""


def _left(seconds: float) -> str:
    seconds = max(seconds, 0)
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
