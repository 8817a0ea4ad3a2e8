"""Phase 5: CUDA graphs of every op, side streams, autocast, TF32, torch.compile, 2^31 logits."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern import cases
from vgkern.gpu import calls, modes
from vgkern.gpu.compare import NEAR, apart, verdict
from vgkern.gpu.device import Phase

F32 = torch.float32


def run(phase: Phase) -> None:
    phase.oracle()
    every(phase, {"graph": graph, "side_stream": stream})
    modes.run(phase)
    every(phase, {"fullgraph": fullgraph})


def every(phase: Phase, checks: dict[str, Callable[..., tuple]]) -> None:
    """These checks, of every op on every backend that has it."""
    for op in calls.CASES:
        case = calls.chosen(phase, op)[0]
        for backend in phase.backends(op):
            for metric, check in checks.items():
                phase.check(
                    op, metric, partial(check, phase, case, backend), backend=backend, dtype="fp32",
                    shape=case.name, floor=NEAR[F32]
                )  # fmt: skip


def tensors(x: Any) -> Iterator[Tensor]:
    """Of inputs: those of noise and costates included, in a fixed order."""
    for value in x.values() if isinstance(x, dict) else vars(x).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, vgkern.Noise | vgkern.Costate):
            yield from tensors(value)


def graph(phase: Phase, case: cases.Case, backend: str) -> tuple:
    """Captured once, replayed with new data in the same memory, against the op itself."""
    x = calls.on_device(phase, case, F32)
    call = calls.runner(phase, case, backend, x)
    call()  # compiles
    replay, out = phase.captured(call)
    worst, where = 0.0, ""
    for seed in range(1, phase.replays + 1):
        y = calls.on_device(phase, case, F32, seed)
        for old, new in zip(tensors(x), tensors(y), strict=True):
            old.copy_(new)
        replay()
        phase.synchronize()
        got = {k: v.clone() for k, v in out.items()}
        worst, where = max((worst, where), apart(got, call()))
    return verdict(worst, where)


def stream(phase: Phase, case: cases.Case, backend: str) -> tuple:
    """On a stream beside the current one, its inputs made there, its memory used again at once."""
    x = calls.on_device(phase, case, F32)
    want = calls.runner(phase, case, backend, x)()
    for _ in range(phase.replays // 4 + 1):
        with phase.side_stream() as recorded:
            y = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
            got = calls.runner(phase, case, backend, y)()
            for t in got.values():
                recorded(t)
            del y
            junk = [torch.full_like(t, 7) for t in got.values()]
        worst, where = apart(got, want)
        del junk
        if worst > NEAR[F32]:
            break
    phase.synchronize()
    return verdict(worst, where)


def fullgraph(phase: Phase, case: cases.Case, backend: str) -> tuple:
    """torch.compile(fullgraph=True) of the op, forward and backward; what comes after the trace is
    the same for every op, and is compiled in `modes.reduce_overhead`."""
    x = calls.on_device(phase, case, F32)
    plain = calls.call(case.op, backend)
    up = calls.upstream(case, plain(**x))
    torch._dynamo.reset()
    by = "eager" if phase.dry else "aot_eager"
    compiled: Callable[..., Any] = torch.compile(plain, fullgraph=True, backend=by)
    got = calls.both(compiled, x, case.grads, up)
    return verdict(*apart(got, calls.both(plain, x, case.grads, up)))
