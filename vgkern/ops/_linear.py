"""What the linear_* ops share: their inputs, the logits of the reference, and fake gradients."""

import contextlib

import torch
from torch import Tensor

from vgkern.ops import _check

# A table: Dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available
AUTOCASTS = ("cpu", "cuda", "xpu", "mps")


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products inside are in the dtype of what is multiplied."""
    known = device.type in AUTOCASTS
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def linear_logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 logits [..., V] (fp64 for fp64 input), whatever the dtype of the inputs."""
    up = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with no_autocast(hidden.device):
        logits = hidden.to(up) @ weight.to(up).T
    return logits if bias is None else logits + bias.to(up)


def linear_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[torch.device, Tensor, Tensor]:
    """Checks of every linear_* op: device, hidden as [N, H] and weight with unit-stride columns."""
    hidden, weight = _check.floating("hidden", hidden), _check.floating("weight", weight, 2)
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or weight.numel() == 0:
        got = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}"
        raise _check.fail("hidden, weight", got, "[..., H] and [V, H] with H, V >= 1")
    if hidden.dtype != weight.dtype:
        weight = _as_autocast(hidden, weight)
    if bias is not None:
        bias = _check.floating("bias", bias)
        _check.rows_like("bias", bias, weight.shape[:1], f"[V] = [{weight.shape[0]}]")
        if bias.dtype not in (hidden.dtype, torch.float32):
            allowed = f"{hidden.dtype} or float32"
            raise TypeError(f"bias: got {_check.describe(bias)}; allowed: {allowed}")
    device = _check.same_device(hidden=hidden, weight=weight, bias=bias)
    h2 = hidden.reshape(-1, hidden.shape[-1])
    h2 = h2 if h2.stride(-1) == 1 and h2.stride(0) >= h2.shape[1] else h2.contiguous()
    hw = weight if weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1] else None
    return device, h2, weight.contiguous() if hw is None else hw


def _as_autocast(hidden: Tensor, weight: Tensor) -> Tensor:
    """An fp32 head as F.linear takes it under autocast: in 16 bits; its gradient is fp32."""
    kind = hidden.device.type
    if (
        weight.dtype == torch.float32
        and kind in AUTOCASTS
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) == hidden.dtype
    ):
        return weight.to(hidden.dtype)
    raise TypeError(
        f"weight: got {_check.describe(weight)}; allowed: {hidden.dtype}, as hidden (an fp32 head "
        "beside 16-bit hidden states: under torch.autocast of their dtype)"
    )


def grads_like(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple:
    """Fake gradients: full shapes where needed, [0] where not (operators cannot return None)."""
    return tuple(
        t.new_empty(t.shape) if n and t is not None else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias), needs, strict=True)
    )
