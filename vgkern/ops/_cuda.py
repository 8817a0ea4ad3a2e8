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
from typing import Any

import torch
from torch import Tensor

from vgkern.ops import _cuda_build, _gpu, _library
from vgkern.ops._backend import BackendError  # which imports this module when it is called
from vgkern.ops._compile import NativeError
from vgkern.ops._cuda_continuous import (  # noqa: F401  operators
    costate_scan_bwd,
    costate_scan_fwd,
    gaussian_action_bwd,
    gaussian_action_fwd,
    linear_rollout_bwd,
    linear_rollout_fwd,
)
from vgkern.ops._cuda_truncated import row_sample, row_truncated, row_truncated_grad

NO_ESTIMATOR = 3  # "none", in the order of vgkern.objectives.ESTIMATORS
_mutex = threading.Lock()
_outcome: bool | NativeError | None = None  # loaded (True: an emulation), or why not


def missing(device: torch.device) -> str | None:
    """Why the cuda backend cannot run on `device`, with the remedy; None where it can."""
    given = os.environ.get("VGKERN_CUDA_LIBRARY")
    if device.type == "cpu" and not given:
        return _gpu.driver_problem() or "the tensors are on cpu; use backend='cpu'"
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
        if not _gpu.sees_gpu():
            raise NativeError(_gpu.no_gpu())
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


def row_policy(
    logits: Tensor,  # [R, V] fp32
    bias: Tensor | None,
    targets: Tensor,  # [R] int64
    advantages: Tensor,  # [R] fp32, as are row weight, old, ref and sampler log-probs, or None
    row_weight: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    logp: Tensor,  # [R] fp32, written, as are entropy and scale
    entropy: Tensor,
    scale: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    objective: list[float],
    out: Tensor | None,  # [R, V]; may be `logits`, or 16-bit rows over its own
) -> None:
    """Statistics and the policy gradient of each row: the contract of kernels/row_policy.py."""
    given = (targets, advantages, row_weight, old_logp, ref_logp, sampler_logp)
    torch.ops.vgkern_launch.row_policy(
        logits, _f32(bias), *(_plain(t) for t in given), logp, entropy, scale, temperature, softcap,
        ignore_index, objective, out
    )  # fmt: skip


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


def policy_terms(
    logp: Tensor,  # [B, T] fp32, as are the next six
    advantages: Tensor,
    row_weight: Tensor,  # 0 where masked
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    entropy: Tensor | None,
    objective: list[float],
    segments: Tensor | None = None,  # [S + 1] int64: the sequences, not the rows of [B, T]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dlogp, dentropy, what each block of the kernel sums over its tokens)."""
    b, t = logp.shape
    row_local = objective[0] <= 1 and objective[10] < 3  # objective.h's row_local
    blocks = -(-b * t // 1024) if row_local else b if t else 0
    if segments is not None and not row_local:
        blocks = segments.numel() - 1
    dlogp, dentropy = logp.new_empty(b, t), logp.new_empty(b, t)
    partial = logp.new_empty(blocks, 13, dtype=torch.float64)
    given = (logp, advantages, row_weight, old_logp, ref_logp, sampler_logp, entropy)
    torch.ops.vgkern_launch.policy_terms(
        *(_plain(x) for x in given), objective, _plain(segments), dlogp, dentropy, partial
    )
    return dlogp, dentropy, partial


def totals(partial: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, counts) of what `policy_terms` left."""
    loss, counts = (partial.new_empty(s, dtype=torch.float32) for s in ((), (12,)))
    torch.ops.vgkern_launch.policy_totals(partial, loss, counts)
    return loss, counts


def table_grad(embedding: Tensor, tokens: Tensor, dx: Tensor, live: Tensor) -> Tensor:
    """dE [V, He]: for each token the sum of its live rows of dx, in fp32, rounded once."""
    vocab = embedding.shape[0]
    known = live & (tokens >= 0) & (tokens < vocab)
    table = dx.new_zeros((vocab + 1, dx.shape[1]), dtype=torch.float32)  # the last row: not known
    at = (tokens.masked_fill(~known, vocab),)
    table.index_put_(at, dx.float().masked_fill(~known[:, None], 0), accumulate=True)  # by a sort
    return table[:vocab].to(embedding.dtype)


ROWS = SimpleNamespace(
    row_stats=row_stats, row_grad=row_grad, row_policy=row_policy, row_sample=row_sample,
    row_truncated=row_truncated, row_truncated_grad=row_truncated_grad, policy_terms=policy_terms,
    totals=totals, table_grad=table_grad
)  # fmt: skip


def policy_loss_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dlogp, dentropy, partial = policy_terms(*args)
    loss, counts = totals(partial)
    return loss, dlogp, dentropy, counts


def _driver(name: str) -> Any:
    """kernels/<name>.py: chunk drivers, imported when used, since they need Triton installed."""
    try:
        return _library.kernels_of(name)
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise _refusal(
            "the linear_* ops share their drivers with the triton backend, and triton is not "
            "installed; pip install triton, or use backend='torch'"
        ) from e


def linear_logprobs_fwd(*args: Any) -> Any:
    return _driver("linear_token_logprobs").linear_logprobs_fwd(*args, rows=ROWS)


def linear_logprobs_bwd(*args: Any) -> Any:
    return _driver("linear_token_logprobs").linear_logprobs_bwd(*args, rows=ROWS)


def linear_truncated_logprobs_fwd(*args: Any) -> Any:
    return _driver("linear_token_logprobs").linear_truncated_logprobs_fwd(*args, rows=ROWS)


def linear_truncated_logprobs_bwd(*args: Any) -> Any:
    return _driver("linear_token_logprobs").linear_truncated_logprobs_bwd(*args, rows=ROWS)


def linear_policy_loss_fwd(*args: Any) -> Any:
    return _driver("linear_policy_loss").linear_policy_loss_fwd(*args, rows=ROWS)


def linear_sample_fwd(*args: Any) -> Any:
    return _driver("linear_sample").linear_sample_fwd(*args, rows=ROWS)


def noisy_embedding_bwd(*args: Any) -> Any:
    return _driver("noisy_embedding").noisy_embedding_bwd(*args, rows=ROWS)


def linear_divergence_fwd(*_: Any) -> Any:
    raise _refusal("no kernels for linear_divergence; use backend='triton'")


linear_divergence_bwd = linear_divergence_fwd


def _refusal(why: str) -> BackendError:
    return BackendError(f"backend 'cuda': {why}")


def group_advantages_fwd(rewards: Tensor, groups: Tensor, estimator: int) -> Tensor:
    if estimator == NO_ESTIMATOR:
        return rewards.clone()
    ids, order = torch.sort(groups, stable=True)
    out = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    torch.ops.vgkern_launch.group_advantages(rewards.contiguous(), ids, order, estimator, out)
    return out
