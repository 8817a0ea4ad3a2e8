"""The matrix that a head multiplies by, from what its module or its framework calls `weight`.

They are not always the same thing: quantised heads keep codes there and scales elsewhere, adapters
add to the product, sharding leaves a piece. What is known is dequantised, as a constant; all else
is refused by name, since a cast of the codes would train without a word on another model.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgkern.ops._check import FLOATS, describe

REMEDY = (
    "Keep the head out of the quantisation (llm_int8_skip_modules, modules_to_not_convert: "
    "lm_head), or do without this drop-in"
)


def matrix(weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """`weight` itself where it is [V, H] of floats; the constant it stands for where it knows.

    scales: those of bitsandbytes' int8 codes, where the layer has taken them away from the weight.
    Raises NotImplementedError for everything else, with the reason.
    """
    if (state := getattr(weight, "quant_state", None)) is not None:  # bitsandbytes, 4 bits
        if getattr(state, "packing_format_for_cpu", False):  # only its product reads that layout
            bnb, columns = importlib.import_module("bitsandbytes"), state.shape[1]
            unit = torch.eye(columns, dtype=state.dtype, device=weight.device)
            return bnb.matmul_4bit(unit, weight.detach(), quant_state=state).T
        of = importlib.import_module("bitsandbytes.functional")
        return of.dequantize_4bit(weight.detach(), state).detach()
    scales = getattr(weight, "SCB", None) if scales is None else scales
    if scales is not None and weight.dtype == torch.int8:  # bitsandbytes, rows scaled to +-127
        return weight.detach().float() * (scales.float()[:, None] / 127)
    if type(weight).dequantize is not Tensor.dequantize:  # a tensor class of torchao's kind
        return weight.dequantize().detach()
    kind = type(weight).__name__
    if weight.is_meta:
        raise NotImplementedError(
            f"weight: got a meta tensor ({kind}), whose values are offloaded; allowed: a tensor "
            "with values. Keep the head on its device, or do without this drop-in"
        )
    if weight.dtype not in FLOATS:
        raise NotImplementedError(
            f"weight: got a {describe(weight)} ({kind}), codes whose scales are elsewhere; allowed:"
            f" a float32, bfloat16, float16 or float64 matrix. {REMEDY}"
        )
    if weight.ndim != 2:
        raise NotImplementedError(
            f"weight: got a {describe(weight)} ({kind}), which is packed; allowed: [V, H]. {REMEDY}"
        )
    return weight


def of(lm_head: Any) -> tuple[Tensor, Tensor | None]:
    """(matrix, bias) of a head. Raises NotImplementedError where its product is not theirs alone:
    adapters, even those that add nothing yet, since they would never learn to."""
    name = type(lm_head).__name__
    if getattr(lm_head, "weight", None) is None:
        raise NotImplementedError(
            f"output embedding: got {name} without a weight; allowed: one with a [V, H] matrix. "
            f"{REMEDY}"
        )
    weight, bias = lm_head.weight, getattr(lm_head, "bias", None)
    known = {id(weight), id(bias)}
    more = [n for n, p in lm_head.named_parameters() if p.requires_grad and id(p) not in known]
    if hasattr(lm_head, "base_layer") or more:
        has = f" ({', '.join(more[:2])}{', ...' if len(more) > 2 else ''})" if more else ""
        raise NotImplementedError(
            f"output embedding: got {name} with adapters{has}, whose part of the logits a fused "
            "head would leave out; allowed: a plain head. Leave it out of target_modules, or put "
            "it in modules_to_save to train it whole"
        )
    state = getattr(lm_head, "state", None)  # bitsandbytes: after the first call the scales' place
    return matrix(weight, getattr(state, "SCB", None)), bias


def through(
    lm_head: Any, function: Callable[[Tensor, Tensor, Tensor | None], Any], hidden: Tensor
) -> Any:
    """`function(hidden, weight, bias)` inside a call of the head, so that what is hooked to it runs
    as in the model's own forward: FSDP gathers its weight and averages the gradient."""

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Any:
        weight, bias = of(lm_head)
        if (placements := getattr(weight, "placements", None)) is not None:
            raise NotImplementedError(
                f"weight: got a DTensor {tuple(placements)} inside the head's own "
                "call; allowed: a plain tensor, or one that fully_shard gathers. Leave the head "
                "out of the tensor-parallel plan, or do without this drop-in"
            )
        return function(hidden.to(weight.device), weight, bias)

    return inside(lm_head, forward, hidden)


def inside(module: Any, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` as the module's forward of this one call, with all hooks around it."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        return module(*args)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
