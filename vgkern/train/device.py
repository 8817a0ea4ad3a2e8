"""Where a run computes and in which precision: `device` and `dtype` of the config.

Weights, their gradients, the optimizer's moments and all statistics are fp32 everywhere. Under
bf16 the products of a forward and its backward take bf16 operands (autocast), in the sampler and
in the update alike; the two then differ by rounding (`gap_limits`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from vgkern.errors import ConfigError, TrainingError

DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("auto", "fp32", "bf16")


class Limits(NamedTuple):
    """How far sampler and trainer may be apart: nats of a token's log-prob, share of replays."""

    gap_warn: float
    gap_error: float
    replay_warn: float


# bf16 has 8 bits: a logit of 16 is known to 1/16. Measured in docs/training-on-a-gpu.md.
LIMITS = {"fp32": Limits(1e-4, 1e-2, 0.999), "bf16": Limits(0.5, 4.0, 0.97)}


class Place(NamedTuple):
    """A device, and what products are computed in: "fp32" or "bf16"."""

    device: torch.device
    dtype: str


def place(device: str, dtype: str, own: bool) -> Place:
    """What `device` and `dtype` of a config mean on this machine.

    own: the trainer's own small decoder, whose step is bound by launches and stays fp32 under
    `auto`. Raises ConfigError where the machine cannot do what was asked for.
    """
    why = no_gpu()
    if device == "cuda" and why:
        raise ConfigError(f"device: got 'cuda', and {why}; allowed here: 'cpu', or 'auto'")
    chosen = torch.device("cpu" if device == "cpu" or why else "cuda")
    takes = chosen.type == "cpu" or bf16_gpu()
    if dtype == "bf16" and not takes:
        name = torch.cuda.get_device_name()
        raise ConfigError(f"dtype: got 'bf16', which {name} does not compute in; allowed: 'fp32'")
    if dtype == "auto":
        dtype = "bf16" if chosen.type == "cuda" and takes and not own else "fp32"
    return Place(chosen, dtype)


def no_gpu() -> str | None:
    """Why there is no GPU to train on; None: there is one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU (nvidia-smi; docs: doctor)"


def bf16_gpu() -> bool:
    """Has the GPU bf16 products of its own (sm_80 and later)?"""
    return torch.cuda.get_device_capability() >= (8, 0)


def put(policy: Any, where: Place) -> None:
    """Moves a policy, in place, and says to itself what it computes in."""
    policy.to(where.device)
    policy.compute = where.dtype


def of(policy: Any) -> torch.device:
    """The device of a policy; one that does not say has its weights there."""
    found = getattr(policy, "device", None)
    return next(iter(policy.parameters())).device if found is None else found


def where(policy: Any) -> Place:
    """Of a policy; one that does not say computes in fp32."""
    return Place(of(policy), getattr(policy, "compute", "fp32"))


def precision(policy: Any, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    """What a policy's forwards, and the ops on its hidden states, run under.

    cache: a weight's cast may be kept until the context ends.
    """
    device, dtype = where(policy)
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache)


@contextlib.contextmanager
def fits(setting: str, now: int, also: str) -> Iterator[None]:
    """What runs out of a GPU's memory within says which setting to lower, and to what."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().split("\n")[0]
        allowed = f"{setting} = {now // 2} {also}" if now > 1 else f"a smaller model, {also}"
        raise TrainingError(
            f"{setting}: {now} do not fit the GPU's memory ({reason}); try {allowed}, and go on "
            f"with --model RUN/step-N or anew"
        ) from error


def rounded(policy: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states as the head's product takes them: norms and residuals are fp32, it is not."""
    return hidden.bfloat16() if getattr(policy, "compute", "fp32") == "bf16" else hidden
