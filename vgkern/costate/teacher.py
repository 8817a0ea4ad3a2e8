"""One teacher-forced forward pass, with everything that `hops` asks for."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vgkern.costate import _graph
from vgkern.costate.hops import Hops, hops
from vgkern.ops import _check

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CHECKED: WeakKeyDictionary = WeakKeyDictionary()  # model -> the soft-cap its logits agreed with


class TeacherForced(NamedTuple):
    """A batch run by `teacher_forced`. Row i of hidden predicts tokens[:, i]."""

    inputs_embeds: Tensor  # [B, L, He]
    hidden: Tensor  # [B, L, H]
    weight: Tensor  # [V, H] head
    embedding: Tensor  # [V, He]
    tokens: Tensor  # [B, L-1] int64
    mask: Tensor | None  # [B, L-1]: tokens that were sampled
    bias: Tensor | None  # [V]
    softcap: float | None

    def hops(self, objective: Tensor, k: int = 1, **options: Any) -> Hops:
        """`vgkern.costate.hops` of this batch; options: noise, relaxation, tau, temperature..."""
        given = {"mask": self.mask, "bias": self.bias, "softcap": self.softcap}
        return hops(objective, *self[:5], k, **{**given, **options})


def teacher_forced(model: Any, ids: Tensor, mask: Tensor | None = None) -> TeacherForced:
    """Runs `model` over the input embeddings of `ids` [B, L], int64, padded on the right.

    model: a Hugging Face causal language model, the trainer's decoder or its Hugging Face policy:
    anything with `embedding`, `from_embeddings(inputs_embeds)` and `head()`.
    mask [B, L-1]: which of ids[:, 1:] were sampled; None: all.
    inputs_embeds carries the graph of the lookup, so the table gets its gradient; where the table
    is frozen it is a leaf.

    Raises ValueError / TypeError naming the argument, in particular for a model that cannot run
    from inputs_embeds, whose hidden states do not depend on it, or, of Hugging Face, whose logits
    are not softcap(hidden weight^T + bias): looked at on three tokens, once for each model.
    """
    ids = _check.tensor("ids", ids, "int64 [B, L]")
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise _check.fail("ids", ids, "int64 [B, L]")
    run = _ours if hasattr(model, "from_embeddings") else _hugging_face
    layer, call, (weight, bias, softcap) = run(model)
    x = layer(ids)
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    try:
        hidden = call(x)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"{_remedy(model, 'cannot be run from inputs_embeds')} ({error})"
        ) from error
    if not _graph.reaches(hidden, x):
        raise ValueError(_remedy(model, "has hidden states that do not depend on inputs_embeds"))
    if run is _hugging_face and ids.numel() and CHECKED.get(model, ()) != softcap:
        _check_head(model, x.detach()[:1, :3], weight, bias, softcap)
        CHECKED[model] = softcap
    table = layer.weight
    if type(layer) is not nn.Embedding:  # may scale its rows
        with torch.no_grad():
            table = layer(torch.arange(len(table), device=ids.device))
    return TeacherForced(x, hidden, weight, table, ids[:, 1:], mask, bias, softcap)


def _remedy(model: Any, why: str) -> str:
    return (
        f"model: {type(model).__name__} {why}; allowed: a causal language model that takes "
        "inputs_embeds, or call vgkern.costate.hops with your own inputs_embeds and hidden"
    )


def _ours(model: Any) -> tuple[Any, Any, tuple]:
    return model.embedding, model.from_embeddings, tuple(model.head())


def _hugging_face(model: Any) -> tuple[Any, Any, tuple]:
    try:
        layer, output = model.get_input_embeddings(), model.get_output_embeddings()
        config = model.config.get_text_config()
        weight, bias = output.weight, getattr(output, "bias", None)
    except AttributeError as error:
        raise TypeError(
            f"{_remedy(model, 'has no embeddings or head to ask for')} ({error})"
        ) from error
    for name in SCALES:
        scale = getattr(config, name, None)
        if scale not in (None, 1, 1.0):
            raise ValueError(_remedy(model, f"scales its logits ({name}={scale})"))
    caps = [getattr(config, name, None) for name in SOFTCAPS]

    def call(x: Tensor) -> Tensor:
        return model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state

    return layer, call, (weight, bias, next((cap for cap in caps if cap), None))


@torch.no_grad()
def _check_head(
    model: Any, x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    """One forward of a few tokens through all of `model`: dropout may draw as it likes, for hidden
    states and logits are those of the same pass."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(
        lambda module, args, out: seen.append(out.last_hidden_state)
    )
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            logits = model(inputs_embeds=x, use_cache=False).logits
    finally:
        hook.remove()
    if not seen:
        raise ValueError(_remedy(model, "does not make its logits from its base_model"))
    z = nn.functional.linear(seen[-1], weight, bias).to(logits.dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    gap = float((z.double() - logits.double()).abs().max()) if z.shape == logits.shape else None
    rounding = max(16 * torch.finfo(seen[-1].dtype).eps, 1e-4)
    if gap is None or not gap <= rounding * float(logits.abs().max()):
        what = f"shape {list(logits.shape)}" if gap is None else f"off by up to {gap:.3g}"
        raise ValueError(
            _remedy(model, f"has logits other than those of its head and soft-cap ({what})")
        )
