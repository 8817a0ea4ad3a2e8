"""Costates at the prompt of every sample of a group, for one forward pass of the prompt.

u_i = d(sum_t log pi of sample i)/dx, x the residual stream of one layer at the prompt's positions.
Below that layer nothing has a gradient, and each prefix is forwarded once; above it every sample
needs a backward pass of its own through the prompt, by activations alone:

    decoder           the layers below on prefix trees, those above on one text per sample
    Hugging Face      the prompt once; its keys and values, copied for every sample, are leaves of
                      the answers' pass, and what arrives there goes through the prompt G times
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import vgkern
from vgkern import costate
from vgkern.errors import ConfigError

from .generate import Rollout
from .hf import HFPolicy
from .layers import RMSNorm
from .model import Decoder, tree_nodes
from .policy import Policy


class PromptCostates(NamedTuple):
    """Of P prompts with G samples."""

    gram: Tensor  # [P, G, G] fp32, <u_i, u_j>
    square: Tensor  # [P] mean |x|^2 over the prompt's positions
    gap: float  # largest |log-prob here - sampler's|, nats


def depth(policy: Policy) -> int:
    """Layers, so that 0 (what enters the first block) to `depth` can be asked for.

    Raises ConfigError for a model whose blocks cannot be told."""
    module: Any = policy
    try:
        return len(costate.probe(module).points) - 1
    except ValueError as error:
        raise ConfigError(f"{error}; without blocks there is nothing to hook") from None


def prompt_costates(
    policy: Policy,
    prompts: list[list[int]],
    rollout: Rollout,
    group: int,
    layer: int,
    *,
    common: int = 0,  # leading tokens that all prompts share: constants, and no part of x
    temperature: float = 1.0,
) -> PromptCostates:
    """Rows p * G .. p * G + G - 1 of the rollout are samples of prompt p."""
    if not isinstance(policy, Decoder | HFPolicy):
        allowed = "this package's decoder or a Hugging Face model"
        raise ConfigError(f"model: got {type(policy).__name__}; allowed: {allowed}")

    def score(hidden: Tensor) -> Tensor:  # [R, w, H] -> [R, w]
        head = policy.head()
        targets = rollout.tokens.masked_fill(~rollout.mask, -100).to(hidden.device)
        logp: Tensor = vgkern.linear_token_logprobs(
            hidden, head.weight, targets, bias=head.bias, softcap=head.softcap,
            temperature=temperature,
        ).logp  # fmt: skip
        return logp

    with frozen(policy), torch.enable_grad():
        if isinstance(policy, Decoder):
            u, x, logp = _decoder(policy, prompts, rollout, group, layer, common, score)
        else:
            u, x, logp = _hugging_face(policy, prompts, rollout, group, layer, common, score)
    with torch.no_grad():
        flat = u.float().flatten(2)
        size = torch.tensor([len(prompt) - common for prompt in prompts], device=x.device)
        square = x.double().square().sum((1, 2)) / size
        gap = (logp.cpu() - rollout.logp).abs().where(rollout.mask, 0).max()
        return PromptCostates(flat @ flat.mT, square, float(gap))


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No weight has a gradient, so that autograd keeps nothing for one."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


Score = Callable[[Tensor], Tensor]
Found = tuple[Tensor, Tensor, Tensor]  # u [P, G, T, H]; x [P, T, H], 0 off the prompt; logp [R, w]


def _decoder(
    policy: Decoder, prompts: list[list[int]], rollout: Rollout, group: int, layer: int,
    common: int, score: Score,
) -> Found:  # fmt: skip
    tokens, lengths = rollout.tokens, rollout.lengths
    policy.check(prompts, tokens.shape[1])
    tree, of_tree = tree_nodes(prompts, tokens.numpy(), group, lengths.numpy())
    each = [prompt for prompt in prompts for _ in range(group)]
    text, of_text = tree_nodes(each, tokens.numpy(), 1, lengths.numpy())
    size = np.array([len(prompt) for prompt in prompts])
    first = np.cumsum(size - 1) - (size - 1)  # node of a prompt's first token, but its last one
    chain = torch.from_numpy(np.concatenate([first[i // group] + np.arange(size[i // group] - 1)
                                            for i in range(len(each))]))  # fmt: skip
    # the tree's node of every node of the texts; of_* count from the last tokens of the prompts
    node = torch.zeros(len(text.token), dtype=torch.int64)
    node[: text.keys_only] = chain
    node[text.keys_only + of_text[rollout.mask]] = tree.keys_only + of_tree[rollout.mask]
    top = layer == len(policy.layers)  # there only the last token of a prompt is left
    gone = (tree.keys_only, text.keys_only) if top else (0, 0)
    with torch.no_grad():
        below = policy.through(policy.embedding(tree.token), tree, 0, layer)
    x = below[node[gone[1] :] - gone[0]].requires_grad_()
    hidden = x if top else policy.through(x, text, layer, len(policy.layers))
    logp = score(
        RMSNorm.apply(hidden).index_select(0, of_text.reshape(-1)).view(*of_text.shape, -1)
    )
    (du,) = torch.autograd.grad(logp.sum(), x)
    rowed, width = np.repeat(size, group), int(size.max())
    at = torch.zeros(len(each), width, dtype=torch.int64)
    own = torch.arange(width) < torch.from_numpy(rowed)[:, None]
    last = torch.arange(width) == torch.from_numpy(rowed)[:, None] - 1
    at[own & ~last] = torch.arange(text.keys_only)
    at[last] = text.keys_only + of_text[:, 0]
    counted = (last if top else own) & (torch.arange(width) >= common)
    at = (at - gone[1]).clamp(min=0)

    def spread(rows: Tensor) -> Tensor:
        return rows.detach()[at].masked_fill(~counted[..., None], 0)

    u = spread(du).view(len(prompts), group, width, -1)
    return u, spread(x).view_as(u)[:, 0], logp.detach()


def _hugging_face(
    policy: HFPolicy, prompts: list[list[int]], rollout: Rollout, group: int, layer: int,
    common: int, score: Score,
) -> Found:  # fmt: skip
    from transformers import DynamicCache

    device, count = policy.device, len(prompts)
    size = torch.tensor([len(prompt) - 1 - common for prompt in prompts])
    width = int(size.max())
    cache: Any = DynamicCache()
    module, entering = costate.probe(policy).points[layer]
    x: list[Tensor] = []

    def leaf(stream: Tensor) -> Tensor:
        x.append(stream.detach().requires_grad_())
        return x[-1]

    def forward(ids: Tensor, first: Tensor, seen: Tensor, cache: Any) -> Tensor:
        """ids [B, n] from place `first` [B] on; seen bool [B, keys before them]."""
        n = ids.shape[1]
        own = torch.ones(n, n, dtype=torch.bool).tril().expand(len(ids), n, n)
        sees = torch.cat([seen[:, None].expand(-1, n, -1), own], -1)
        dtype = policy.output.weight.dtype
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        places = first[:, None] + torch.arange(n)
        return policy._body(ids.to(device), places.to(device), mask[:, None].to(device), cache)

    if common:
        none = torch.zeros(1, 0, dtype=torch.bool)
        with torch.no_grad():
            forward(torch.tensor([prompts[0][:common]]), torch.zeros(1).long(), none, cache)
        cache.batch_repeat_interleave(count)
    before = torch.ones(count, common, dtype=torch.bool)
    if width:
        ids = torch.zeros(count, width, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt) - 1 - common] = torch.tensor(prompt[common:-1])
        with _replaced(module, entering, leaf):
            forward(ids, torch.full((count,), common), before, cache)
    kept = [(part.keys, part.values) for part in cache.layers] if common or width else []
    leaves, copies = [], DynamicCache()
    for index, pair in enumerate(kept):
        made = [t.detach().repeat_interleave(group, 0).requires_grad_(t.requires_grad)
                for t in pair]  # fmt: skip
        copies.update(*made, index)
        leaves += made
    sources = [t for pair in kept for t in pair if t.requires_grad]
    leaves = [t for t in leaves if t.requires_grad]
    own = torch.arange(width) < size[:, None]
    seen = torch.cat([before, own], 1).repeat_interleave(group, 0)
    last = torch.tensor([prompt[-1] for prompt in prompts]).repeat_interleave(group)
    fed = torch.cat([last[:, None], rollout.tokens[:, :-1]], 1)
    with _replaced(module, entering, leaf):
        logp = score(forward(fed, (common + size).repeat_interleave(group), seen, copies))
    answers = x[-1]
    du, *arrived = torch.autograd.grad(logp.sum(), [answers, *leaves], allow_unused=True)
    u = [du[:, :1].view(count, group, 1, -1)]
    square = [answers.detach()[::group, :1]]
    if width:
        square.insert(0, x[0].detach() * own[..., None].to(device))
        u.insert(0, _through(sources, arrived, x[0], group))
    return torch.cat(u, 2), torch.cat(square, 1), logp.detach()


def _through(
    sources: list[Tensor], arrived: Sequence[Tensor | None], x: Tensor, group: int
) -> Tensor:  # [P, G, T, H]
    """What arrived at every sample's copy of the prompt's keys and values, carried to x."""
    used = [(s, d) for s, d in zip(sources, arrived, strict=True) if d is not None]
    if not used:  # nothing above the last layer reads the prompt
        return x.new_zeros(len(x), group, *x.shape[1:])
    roots = [s for s, _ in used]
    found: list[Tensor] = []
    for sample in range(group):
        seeds = [d[sample::group] for _, d in used]
        found += torch.autograd.grad(roots, x, seeds, retain_graph=sample < group - 1)
    return torch.stack(found, 1)


@contextlib.contextmanager
def _replaced(module: nn.Module, entering: bool, by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The residual stream at a block is what `by` makes of it."""

    def is_stream(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point()

    def first(values: Any) -> int:
        return next(i for i, value in enumerate(values) if is_stream(value))

    def enters(_: nn.Module, args: tuple, named: dict[str, Any]) -> Any:
        if any(map(is_stream, args)):
            at = first(args)
            return (*args[:at], by(args[at]), *args[at + 1 :]), named
        name = list(named)[first(named.values())]
        return args, {**named, name: by(named[name])}

    def leaves(_: nn.Module, args: tuple, out: Any) -> Any:
        if isinstance(out, Tensor):
            return by(out)
        at = first(out)
        return type(out)((*out[:at], by(out[at]), *out[at + 1 :]))

    handle = (module.register_forward_pre_hook(enters, with_kwargs=True) if entering
              else module.register_forward_hook(leaves))  # fmt: skip
    try:
        yield
    finally:
        handle.remove()
