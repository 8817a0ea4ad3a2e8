"""The head of a Hugging Face causal LM as the fused ops take it.

z = cap * tanh(s (h W^T + b) / cap) / temperature                     models with a scale s
  = (cap/s) * tanh((h W^T + b) / (cap/s)) / (temperature/s)           what the ops compute
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern.integrations import _weight
from vgkern.integrations._patch import IntegrationError, version
from vgkern.logit_scale import scaling
from vgkern.ops.linear_token_logprobs import linear_token_logprobs


class Head(NamedTuple):
    """Everything between the last hidden state and the logits, in one compute dtype."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Head:
    """Casts to the dtype that autocast asks for, else to that of `hidden`; folds the scale away.

    A quantised weight that knows its matrix is dequantised, as a constant. Raises
    NotImplementedError for one that does not, and for a weight that DeepSpeed ZeRO-3 has
    partitioned (its backward pass would find an empty tensor), ValueError for a scale that is not
    positive.
    """
    if hasattr(weight, "ds_id"):
        raise NotImplementedError(
            "weight: got a parameter partitioned by DeepSpeed ZeRO-3; allowed: a plain tensor. "
            "Use ZeRO-2 or FSDP, or do without this drop-in"
        )
    if not scale > 0:
        raise ValueError(f"logit_scale: got {scale!r}; allowed: a number > 0")
    weight = _weight.matrix(weight)
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return Head(
        hidden.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        temperature / scale,
        None if softcap is None else softcap / scale,
    )


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def add_head(model: Any, keyword: str) -> None:
    """Gives `model.forward` one more keyword: a function of (hidden, weight, bias).

    With it the backbone runs and the function's result is returned; no logits are made. The call
    still enters by `model(...)`, so the hooks of DDP, FSDP and PEFT run as for any forward pass.
    """
    check(model)

    def forward(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        function = kwargs.pop(keyword, None)
        if function is None:
            return original(self, *args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return _weight.through(self.get_output_embeddings(), function, hidden)

    model.forward = method(model, forward)


def method(model: Any, forward: Callable[..., Any]) -> types.MethodType:
    """`forward(original, self, ...)` as a method of `model`, with the signature of its own forward.

    copy.deepcopy binds a method to the copy but copies no closure, so nothing in here may run the
    model itself: `original` is the function under the method that was there, and takes `self` too.
    """
    bound = model.forward
    stock = getattr(bound, "__func__", None)
    if stock is None or bound.__self__ is not model:  # a closure of someone else

        def stock(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not model:
                raise IntegrationError(
                    f"{type(self).__name__}: a copy of a model whose forward was {bound!r}, which "
                    "runs the model that was copied. Copy it before its forward is replaced"
                )
            return bound(*args, **kwargs)

        signature = inspect.signature(bound)
        of_self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        stock.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[of_self, *signature.parameters.values()]
        )

    @functools.wraps(stock)  # Trainer and `generate` read off the signature what the model takes
    def ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(stock, self, *args, **kwargs)

    return types.MethodType(ours, model)


def check(model: Any, tolerance: float = 1e-3) -> None:
    """Raises IntegrationError unless backbone and head alone give this model's own logits.

    Three tokens are forwarded, in fp32 where the model is: a model that does anything else to its
    hidden states or logits (a scale of a new name) shows here. NotImplementedError: the head is not
    a matrix (`_weight`). A quantised head may quantise its inputs too, which moves the model's own
    logits by up to a hundredth of the largest.
    """
    name = f"transformers {version('transformers')}: {type(model).__name__}"
    lm_head = model.get_output_embeddings()
    if lm_head is None or getattr(model, "base_model", model) is model:
        raise IntegrationError(f"{name} has no backbone with an output embedding on top")
    if getattr(model.config, "return_dict", True) is False:
        raise IntegrationError(
            f"{name}: config.return_dict is False, and its outputs are read by name. Set it to "
            "True; `return_dict=False` may be given to a call"
        )
    ids = torch.tensor([[1, 2, 0]], device=next(model.parameters()).device)
    ids = ids % model.config.get_text_config().vocab_size
    softcap, scale = scaling(model.config)
    training = {module: module.training for module in model.modules()}  # parts may be frozen
    model.eval()
    try:
        with torch.no_grad():

            def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
                given = head(hidden, weight, bias, 1.0, softcap, scale)
                out = linear_token_logprobs(given.hidden, given.weight, ids, **options(given))
                return out.logp, weight is lm_head.weight

            def both(forward: Callable[..., Any] = model.forward) -> tuple[Tensor, bool, Tensor]:
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                ours, plain = _weight.through(lm_head, score, hidden)
                return ours, plain, forward(input_ids=ids, use_cache=False).logits

            ours, plain, logits = _weight.inside(model, both)  # gathers what FSDP has sharded
    finally:
        for module, was in training.items():
            module.training = was
    stock = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    rounding = 8 * torch.finfo(logits.dtype).eps * float(logits.detach().abs().max())
    if not plain:
        rounding += 0.01 * float(logits.detach().abs().max())
    gap = float((ours - stock).abs().max())
    if not gap <= tolerance + rounding:
        raise IntegrationError(
            f"{name}: backbone and output embedding alone do not give the model's log-probs "
            f"(largest difference over 3 tokens: {gap:.2g} nats, allowed {tolerance + rounding:.2g}"
            "), so a fused head would train another model. A scaling of the logits that is unknown "
            "here? Do without this drop-in"
        )


def options(given: Head) -> dict[str, Any]:
    """The keywords of the linear ops."""
    return {"bias": given.bias, "temperature": given.temperature, "softcap": given.softcap}
