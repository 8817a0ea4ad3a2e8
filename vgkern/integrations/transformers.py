"""transformers: a causal LM's loss without fp32 copies of the logits, or without the logits.

`causal_lm_loss` is what `model.loss_function` may be set to. The logits are made by then, in the
model's dtype, and live until the backward pass; saved are the fp32 copy, its softmax and their
gradient in fp32. `patch(model)` saves the logits themselves: in training, a forward pass with
labels goes from hidden states and head straight to the loss, and `logits` of its output is None.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgkern.integrations import _head, _weight
from vgkern.integrations._patch import IntegrationError, Patch, parameters, refuse
from vgkern.ops.linear_token_logprobs import linear_token_logprobs
from vgkern.ops.token_logprobs import token_logprobs

STOCK = "logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, kwargs"
REMEDY = "Install transformers>=5,<6, or leave model.loss_function and model.forward as they are."


def causal_lm_loss(
    logits: Tensor,  # [B, T, V] or [B*T, V]
    labels: Tensor | None,  # [B, T] int64, ignore_index where not trained on
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,  # [B, T], instead of labels
    **_: Any,
) -> Tensor:
    """`transformers.loss.loss_utils.ForCausalLMLoss`: scalar fp32 cross-entropy of next tokens.

    Summed and divided by `num_items_in_batch`, or the mean over the labels of this call. No label
    at all: a zero that is connected to the logits, where the stock function gives NaN.
    """
    targets = _shifted(labels, shift_labels, ignore_index).reshape(-1).to(logits.device)
    logp = token_logprobs(logits.view(-1, vocab_size), targets, ignore_index=ignore_index).logp
    return _reduce(logp, targets != ignore_index, num_items_in_batch)


def patch(model: Any, *, backend: str | None = None) -> Patch:
    """Training forward passes with `labels` make no logits, until `undo()` or the end of a `with`.

    `num_items_in_batch`, `shift_labels` and `logits_to_keep` mean what they mean in the model's own
    forward. In eval mode, without labels, or with `output_hidden_states` or `output_attentions`
    asked for, the model's own forward runs. `.calls` counts the fused passes. A copy of the model
    (copy.deepcopy) is patched with it, on its own weights, until the same `undo()`.

    Raises IntegrationError when the model's log-probs are not those of its backbone and head (three
    tokens are forwarded to see), when its loss function is not the stock one, or when it adds a
    mixture-of-experts loss; NotImplementedError when its head is not a matrix: adapters on it,
    codes whose scales are elsewhere. A quantised head that knows its matrix is used dequantised.
    """
    loss_utils = importlib.import_module("transformers.loss.loss_utils")
    found = parameters(loss_utils.ForCausalLMLoss)
    refuse("transformers", "the signature of ForCausalLMLoss", found, STOCK, REMEDY)
    needed = {"labels", "logits_to_keep"} - {*parameters(type(model).forward).split(", ")}
    refuse("transformers", f"what {type(model).__name__}.forward takes", needed, set(), REMEDY)
    allowed = (loss_utils.ForCausalLMLoss, causal_lm_loss)
    if model.loss_function not in allowed:
        raise IntegrationError(
            f"{type(model).__name__}: loss_function is {model.loss_function!r}, not "
            "ForCausalLMLoss: this drop-in would pass it by. Set that one back first"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise IntegrationError(
            f"{type(model).__name__}: config.output_router_logits adds a loss to the cross-entropy "
            "that this drop-in has not. Set it to False, or set model.loss_function only"
        )
    _head.check(model)
    outputs = importlib.import_module("transformers.modeling_outputs")

    def build(patch: Patch) -> list[tuple[Any, str, Any]]:
        def forward(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
            asked = ("output_hidden_states", "output_attentions", "output_router_logits")
            plain = kwargs.get("labels") is None  # shift_labels alone give no loss, as stock
            stock = plain or not self.training or any(kwargs.get(k) for k in asked)
            if stock or not patch.on:  # a copy made while this was on keeps it after `undo`
                return original(self, *args, **kwargs)
            patch.calls += 1
            loss = _loss(self, args, kwargs, backend)
            if kwargs.get("return_dict") is False:
                return (loss,)
            return outputs.CausalLMOutputWithPast(loss=loss)

        return [(model, "forward", _head.method(model, forward))]

    return Patch(build)


def _loss(model: Any, args: tuple, kwargs: dict[str, Any], backend: str | None) -> Tensor:
    kwargs = dict(kwargs)
    names = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict")
    labels, shifted, items, keep, _ = (kwargs.pop(name, None) for name in names)
    ignore = kwargs.pop("ignore_index", -100)
    hidden = model.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    if keep is not None:
        hidden = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
    softcap, scale = _head.scaling(model.config)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        targets = _shifted(labels, shifted, ignore).to(weight.device)
        given = _head.head(hidden, weight, bias, 1.0, softcap, scale)
        with _head.no_autocast(given.hidden.device):
            logp = linear_token_logprobs(
                given.hidden, given.weight, targets, ignore_index=ignore, backend=backend,
                **_head.options(given)
            ).logp  # fmt: skip
        return _reduce(logp, targets != ignore, items)

    return _weight.through(model.get_output_embeddings(), loss, hidden)


def _shifted(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("labels: got None; allowed: a tensor, or shift_labels")
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _reduce(logp: Tensor, live: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if num_items_in_batch is None:
        return -logp.sum() / live.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logp.device)
    return -logp.sum() / num_items_in_batch
