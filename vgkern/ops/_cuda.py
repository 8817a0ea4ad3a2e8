"""The cuda backend: csrc/*.cu, compiled by nvcc at first use; one function per operator.

The functions here allocate with torch and call `torch.ops.vgkern_launch`, which only launches on
the current stream: no host sync, so a call can be captured in a CUDA graph. GEMMs are torch's; the
linear operators share the chunk drivers of kernels/*.py, with these rows in place of Triton's.

VGKERN_CUDA_LIBRARY names a prebuilt library to load instead. One that was built as a host
emulation (tests/emulation) takes CPU tensors.
"""

import ctypes
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from vgkern.ops import _cuda_build
from vgkern.ops._compile import NativeError

_mutex = threading.Lock()
_outcome: bool | NativeError | None = None  # loaded (True: an emulation), or why not


def missing(device: torch.device) -> str | None:
    """Why the cuda backend cannot run on `device`, with the remedy; None where it can."""
    given = os.environ.get("VGKERN_CUDA_LIBRARY")
    if device.type == "cpu" and not given:
        return "the tensors are on cpu; use backend='cpu'"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device}; use backend='torch'"
    if device.type == "cuda" and torch.version.hip:
        return "the kernels are for NVIDIA GPUs; use backend='triton'"
    global _outcome
    with _mutex:
        if _outcome is None:
            try:
                _outcome = _load(given)
            except NativeError as e:
                _outcome = e
    if isinstance(_outcome, NativeError):
        return str(_outcome)
    if _outcome and device.type == "cuda":
        return "VGKERN_CUDA_LIBRARY is a host emulation, which takes CPU tensors only; unset it"
    if not _outcome and device.type == "cpu":
        return "the tensors are on cpu; use backend='cpu'"
    return None


def _load(given: str | None) -> bool:
    """Load the library; True if it is an emulation."""
    if given:
        library = given
    else:
        if not torch.cuda.is_available():
            raise NativeError("torch sees no GPU; use backend='cpu' or 'torch'")
        try:
            library = str(_find_or_build())
        except OSError as e:
            raise NativeError(
                f"cannot build the CUDA kernels: {e.strerror or e}; set VGKERN_CACHE to a "
                "directory that you own and can write, or use backend='triton'"
            ) from e
    try:
        torch.ops.load_library(library)
        return bool(ctypes.CDLL(library).vg_emulated())
    except (OSError, RuntimeError, AttributeError) as e:
        raise NativeError(
            f"{library} does not load into torch {torch.__version__}: {e}; run `python -m vgkern "
            "build --cuda`, or use backend='triton'"
        ) from e


def _find_or_build() -> Path:
    """A library for every GPU, if one was built ahead of time; else one for those present."""
    return _cuda_build.find(_cuda_build.FAT) or _cuda_build.build(_cuda_build.present())


# --- rows of logits: the contracts of kernels/rows.py


def row_stats(
    logits: Tensor,  # [R, V] fp32|bf16|fp16, unit-stride columns
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [R] int64
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), each fp32 [R]. A target of V is on another shard: logp = -lse."""
    out = tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    torch.ops.vgkern_launch.row_stats(
        logits, _f32(bias), targets.contiguous(), *out, temperature, softcap, ignore_index
    )
    return out  # type: ignore[return-value]


def row_grad(
    logits: Tensor,  # [R, V]
    bias: Tensor | None,
    targets: Tensor | None,  # [R] int64; None without c and e, as are the three statistics
    logp: Tensor | None,
    entropy: Tensor | None,
    lse: Tensor | None,  # [R] fp32
    c: Tensor | None,  # [R] fp32: dL/dlogp
    e: Tensor | None,  # [R] fp32: dL/dentropy
    u: Tensor | None,  # [R, V] E lambda
    seed: int,
    sequence: Tensor | None,  # [R] int64, with u unless expected
    position: Tensor | None,
    tau: float,
    expected: bool,
    temperature: float,
    softcap: float,
    ignore_index: int,
    out: Tensor,  # [R, V]; may be `logits`
) -> Tensor:
    """The gradient of each row's logits, written to `out`."""
    rows = (_plain(t) for t in (targets, logp, entropy, lse, c, e))
    torch.ops.vgkern_launch.row_grad(
        logits, _f32(bias), *rows, None if u is None else u.float(), seed or 0, _plain(sequence),
        _plain(position), tau, expected, temperature, softcap, ignore_index, out
    )  # fmt: skip
    return out


def row_sample(
    logits: Tensor,  # [R, V]
    bias: Tensor | None,
    seed: int,
    sequence: Tensor,  # [R] int64
    position: Tensor,
    temperature: Tensor,  # [R] fp32; 0: greedy
    softcap: float,
    top_k: int,  # 0: no limit
    top_p: float,  # 1: no limit
    min_p: float,  # 0: no limit
) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64, logp, entropy fp32), each [R]."""
    n = logits.shape[0]
    token = logits.new_empty(n, dtype=torch.int64)
    logp, entropy = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    rows = (sequence.contiguous(), position.contiguous(), temperature.float().contiguous())
    torch.ops.vgkern_launch.row_sample(
        logits, _f32(bias), seed, *rows, softcap, top_k, top_p, min_p, token, logp, entropy
    )
    return token, logp, entropy


ROWS = SimpleNamespace(row_stats=row_stats, row_grad=row_grad, row_sample=row_sample)


def _f32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _plain(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- the operators


def token_logprobs_fwd(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    return row_stats(logits, None, targets, temperature, softcap, ignore_index)


def token_logprobs_bwd(
    logits: Tensor,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor,
    lse: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return row_grad(
        logits, None, targets, logp, entropy, lse, dlogp, dentropy, None, 0, None, None, 1.0, True,
        temperature, softcap, ignore_index, out
    )  # fmt: skip
