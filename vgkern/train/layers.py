"""The decoder's elementwise layers, each with a hand-written backward.

At the sizes this trainer is for (some thousand rows of 128) a third of a step is memory traffic of
small elementwise operations. Writing their gradients out halves the number of passes; values and
gradients equal the textbook formulas (`tests/test_train_model.py` holds that).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps), without a gain: the projection that follows absorbs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # [M, D]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (dy,) = grads
        y, scale = ctx.saved_tensors
        mean = torch.linalg.vecdot(dy, y).unsqueeze(-1).div_(-y.shape[-1])
        return torch.addcmul(dy, y, mean).mul_(scale)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, for gate and up from one GEMM; one gradient buffer for both."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:  # [M, 2F] -> [M, F]
        gate, up = gate_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (dy,) = grads
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, -1)
        torch.mul(dy, activated, out=dup)
        torch.ops.aten.silu_backward(dy * up, gate, grad_input=dgate)
        return out


def rotate(qkv: Tensor, angle: Tensor) -> None:
    """RoPE of q and k (the first two thirds of a row), in place, as one complex product.

    qkv [M, 3D]; angle complex [M, dh/2]. Pairs are neighbouring channels.
    """
    heads = 2 * qkv.shape[1] // 3 // (2 * angle.shape[1])
    given = qkv[:, : 2 * qkv.shape[1] // 3]
    turned = given.float() if given.itemsize == 2 else given  # complex has no 16 bits
    pairs = turned.view(len(qkv), heads, angle.shape[1], 2)
    torch.view_as_complex(pairs).mul_(angle[:, None])
    if turned is not given:
        given.copy_(turned)


class RotateAndPad(torch.autograd.Function):
    """RoPE, then compact rows [M, 3D] into padded slots [S, 3D], ready for attention.

    `row[s]` is the row in slot s (any row for a padded slot); `slot[m]` the slot of row m. Padded
    slots are masked in attention and their outputs unread, so their gradient is exactly zero and
    the backward is a gather too.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angle: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(angle, slot)
        qkv = qkv.clone()
        rotate(qkv, angle)
        return qkv.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        angle, slot = ctx.saved_tensors
        dqkv = grads[0].index_select(0, slot)
        rotate(dqkv, angle.conj_physical())
        return dqkv, None, None, None


class Unpad(torch.autograd.Function):
    """Padded slots [S, D] back to compact rows [M, D]; the padded slots' gradient is zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slot: Tensor) -> Tensor:
        ctx.slots = len(y)
        ctx.save_for_backward(slot)
        return y.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slot,) = ctx.saved_tensors
        dy = grads[0].new_zeros(ctx.slots, grads[0].shape[1])
        return dy.index_copy_(0, slot, grads[0]), None
