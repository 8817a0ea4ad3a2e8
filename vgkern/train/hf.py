"""Any Hugging Face causal language model as a `Policy`.

The model's decoder is called directly and its head is handed to the fused ops, so [N, V] logits
never exist. Texts are forwarded as *prefix trees*: few-shot prompts share a long prefix, the
samples of a group share their prompt, and short answers share their first tokens. A hidden state
depends on nothing but its prefix, so each distinct prefix is forwarded once, in the rollout and in
the update, and gradients flow through the shared part. This asks two things of a model: a
`DynamicCache`, and a 4-D attention mask with explicit positions. `hf_load.check` holds the result
against the model's own logits whenever a model is loaded.

The longest prefix that all prompts share is one ordinary causal sequence. What is left of the trees
lies in B rows of about `ROW` nodes, several trees a row, each node masked to its ancestors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vgkern.logit_scale import scaling

from .device import rounded
from .policy import BLOCKED, Head

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
ROW = 256  # nodes per row: attention costs ROW per node; longer rows waste it, shorter ones pad


class Nodes(NamedTuple):
    """M tree nodes. A parent comes before its children; `row` is non-decreasing."""

    token: Ints  # [M]
    position: Ints  # [M] place in the text
    parent: Ints  # [M] index into these nodes, -1: the common prefix
    row: Ints  # [M] row of the packed batch, 0..B-1


class Packed(NamedTuple):
    """Nodes laid out in B rows of n columns, padded on the right."""

    ids: Tensor  # [B, n]
    positions: Tensor  # [B, n]
    column: Ints  # [M] column of each node in its row
    width: int  # n


class State:
    """An open rollout: the cache of B rows, and the newest node of every live sample."""

    def __init__(self, cache: Any, rows: int, nodes: Nodes, sees: Mask, leaf: Ints) -> None:
        self.cache, self.rows = cache, rows
        self.position, self.row = nodes.position[leaf], nodes.row[leaf]  # [F] of frontier nodes
        self.sees = sees[leaf]  # [F, keys in the cache] ancestors and self
        self.node = np.arange(len(leaf))  # [R] frontier node of each live sample


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts share, leaving every prompt its last one."""
    low, high = min(prompts), max(prompts)  # lexicographic extremes differ the most
    limit = min(map(len, prompts)) - 1
    same = (i for i in range(limit) if low[i] != high[i])
    return next(same, limit)


def grow_tree(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], group: int, common: int
) -> tuple[Nodes, list[list[int]]]:
    """Prefix trees of the prompts past `common` and of their completions.

    Returns the nodes and, for every sample, the nodes from the last prompt token to the last token
    of its completion.
    """
    token: list[int] = []
    parent: list[int] = []
    depth: list[int] = []
    sizes: list[int] = []
    paths: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        first = len(token)
        child: dict[tuple[int, int], int] = {}
        for completion in completions[index * group : (index + 1) * group]:
            node, path = -1, []
            for place, value in enumerate([*prompt[common:], *completion]):
                known = child.get((node, value))
                if known is None:
                    known = child[node, value] = len(token)
                    token.append(value)
                    parent.append(node)
                    depth.append(common + place)
                node = known
                if place >= len(prompt) - common - 1:
                    path.append(node)
            paths.append(path)
        sizes.append(len(token) - first)
    row = np.repeat(_balance(sizes), sizes)
    return Nodes(np.array(token), np.array(depth), np.array(parent), row), paths


def _balance(sizes: list[int]) -> Ints:
    """Rows for consecutive trees of these sizes, about `ROW` nodes each, nearly equal."""
    ends = np.cumsum(sizes)
    rows = max(1, -(-int(ends[-1]) // ROW))
    middle = ends - np.array(sizes) / 2
    row = np.minimum((middle * rows / ends[-1]).astype(np.int64), rows - 1)
    return np.unique(row, return_inverse=True)[1]  # no empty row


def _pack(nodes: Nodes, rows: int, device: torch.device) -> Packed:
    column = np.arange(len(nodes.row)) - np.searchsorted(nodes.row, nodes.row)
    width = int(column.max()) + 1
    ids, positions = np.zeros((2, rows, width), np.int64)
    ids[nodes.row, column], positions[nodes.row, column] = nodes.token, nodes.position
    ids_, positions_ = (torch.from_numpy(x).to(device) for x in (ids, positions))
    return Packed(ids_, positions_, column, width)


def _ancestors(nodes: Nodes, column: Ints, common: int, width: int) -> Mask:
    """[M, common + width]: the keys of its own row that a node sees."""
    sees = np.zeros((len(column), common + width), bool)
    sees[:, :common] = True
    for node, parent in enumerate(nodes.parent):
        if parent >= 0:
            sees[node] = sees[parent]
        sees[node, common + column[node]] = True
    return sees


class HFPolicy(torch.nn.Module):
    """The `Policy` protocol over `transformers`; dropout is off, in the update too."""

    blocked: Tensor  # [V] fp32: 0, or BLOCKED
    compute = "fp32"  # see `device.py`

    def __init__(self, model: Any, blocked: Iterable[int] = (), name: str = "") -> None:
        super().__init__()
        self.model = model.eval()
        self.name = name or type(model).__name__
        config = model.config.get_text_config()
        self.softcap, self.scale = scaling(model.config)
        self.window = _window(config)
        self.output = model.get_output_embeddings()
        bias = torch.zeros(self.output.weight.shape[0])
        bias[torch.tensor(sorted(blocked), dtype=torch.long)] = BLOCKED
        self.register_buffer("blocked", bias.to(self.device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    def head(self) -> Head:
        """The output layer itself, so that a tied weight collects both of its gradients."""
        own = getattr(self.output, "bias", None)
        bias = self.blocked if own is None else self.blocked + self.scale * own
        return Head(self.output.weight, bias, self.softcap)

    @property
    def embedding(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    def from_embeddings(self, inputs_embeds: Tensor) -> Tensor:  # [B, L, He] -> [B, L, H]
        """Hidden states over given input embeddings: B rows, causal, nothing shared."""
        out = self.model.base_model(inputs_embeds=inputs_embeds, use_cache=False)
        return self._scaled(out.last_hidden_state)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """A scale of the logits (Granite, Cohere) is one of the states that the head takes."""
        return rounded(self, hidden if self.scale == 1 else self.scale * hidden)

    def _fits(self, longest: int) -> None:  # tokens; counted on the host: looking would wait
        if self.window is not None and longest > self.window:
            raise ValueError(
                f"a text has {longest} tokens; {self.name} attends over, or was"
                f" built for, at most {self.window}"
            )

    def _body(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        out = self.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return self._scaled(out.last_hidden_state)

    def _masked(self, packed: Packed, nodes: Nodes, sees: Mask, cache: Any) -> Tensor:
        """Forward packed nodes against the cache; sees [M, keys]. Returns [M, H]."""
        self._fits(int(nodes.position.max()) + 1)
        rows, keys = len(packed.ids), sees.shape[1]
        allowed = np.zeros((rows, packed.width, keys), bool)
        own = np.arange(packed.width)
        allowed[:, own, keys - packed.width + own] = True  # padding sees itself: no empty softmax
        allowed[nodes.row, packed.column] = sees
        dtype = self.output.weight.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~allowed), torch.finfo(dtype).min)
        there = mask[:, None].to(self.device, non_blocking=True)
        hidden = self._body(packed.ids, packed.positions, there, cache)
        return hidden.flatten(0, 1)[self._index(nodes.row * packed.width + packed.column)]

    def _forest(
        self, prompts: Sequence[list[int]], nodes: Nodes, common: int, keep: bool
    ) -> tuple[Any, Tensor, Mask]:
        """Forward the common prefix, then the trees. Returns cache, [M, H], what a node sees."""
        from transformers import DynamicCache

        rows = int(nodes.row[-1]) + 1
        cache: Any = DynamicCache() if common or keep else None
        if common:
            ids = torch.tensor([prompts[0][:common]], device=self.device)
            self._body(ids, torch.arange(common, device=self.device)[None], None, cache)
            if rows > 1:
                cache.batch_repeat_interleave(rows)
        packed = _pack(nodes, rows, self.device)
        sees = _ancestors(nodes, packed.column, common, packed.width)
        return cache, self._masked(packed, nodes, sees, cache), sees

    @torch.no_grad()
    def prefill(
        self, prompts: list[list[int]], group: int, max_new: int
    ) -> tuple[State, Tensor]:  # hidden [P*G, H]
        common = common_prefix(prompts)
        nodes, paths = grow_tree(prompts, [[]] * len(prompts), 1, common)
        cache, hidden, sees = self._forest(prompts, nodes, common, keep=True)
        leaf = np.array([path[-1] for path in paths])
        state = State(cache, int(nodes.row[-1]) + 1, nodes, sees, leaf)
        state.node = np.repeat(state.node, group)
        return state, hidden[self._index(leaf)].repeat_interleave(group, 0)

    @torch.no_grad()
    def decode(self, state: State, tokens: Tensor) -> Tensor:  # [R] -> [R, H]
        pairs = np.stack([state.node, tokens.cpu().numpy()])  # samples that still agree are one
        (parent, token), inverse = np.unique(pairs, axis=1, return_inverse=True)
        state.node = inverse.reshape(-1)
        state.position, state.row = state.position[parent] + 1, state.row[parent]
        nodes = Nodes(token, state.position, parent, state.row)
        packed = _pack(nodes, state.rows, self.device)
        own = np.arange(packed.width) == packed.column[:, None]
        state.sees = np.concatenate([state.sees[parent], own], 1)
        return self._masked(packed, nodes, state.sees, state.cache)[self._index(state.node)]

    def keep(self, state: State, rows: Tensor) -> None:
        state.node = state.node[rows.cpu().numpy()]

    def hidden(
        self,
        prompts: list[list[int]],
        completions: Tensor,  # [P*G, w] int64
        group: int,
        lengths: Tensor,  # [P*G]
        shared: bool = True,
    ) -> Tensor:  # [P*G, w, H]
        width = completions.shape[1]
        size = np.minimum(lengths.cpu().numpy(), width)
        seen = [row[: n - 1] for row, n in zip(completions.tolist(), size, strict=True)]
        # On a GPU every row is forwarded in full: its causal kernels need no mask, and building
        # trees of 1e5 nodes on the host takes longer than what they save.
        if not shared or self.device.type == "cuda":
            return self._plain(prompts, seen, group, width)
        common = common_prefix(prompts)
        nodes, paths = grow_tree(prompts, seen, group, common)
        _, hidden, _ = self._forest(prompts, nodes, common, keep=False)
        index = np.array([path + [path[-1]] * (width - len(path)) for path in paths])
        return hidden[self._index(index)]

    def _plain(
        self, prompts: list[list[int]], seen: list[list[int]], group: int, width: int
    ) -> Tensor:
        """Every sample in full, padded on the right, where causal attention cannot see it."""
        full = [prompts[i // group] + row for i, row in enumerate(seen)]
        ids = torch.zeros(len(full), max(map(len, full)), dtype=torch.long)
        for row, tokens in zip(ids, full, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        self._fits(ids.shape[1])
        positions = torch.arange(ids.shape[1], device=self.device)[None].expand(len(full), -1)
        hidden = self._body(ids.to(self.device), positions, None, None)
        first = np.array([len(prompts[i // group]) - 1 for i in range(len(full))])
        last = np.array([len(tokens) - 1 for tokens in full])
        place = np.minimum(first[:, None] + np.arange(width), last[:, None])
        return hidden[torch.arange(len(full), device=self.device)[:, None], self._index(place)]

    def _index(self, index: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(index)).to(self.device)

    def check(self, prompts: list[list[int]], new: int) -> None:
        """Can `new` tokens follow these prompts? ValueError says what is too long, or empty."""
        longest = max(map(len, prompts), default=0)
        if not prompts or not min(map(len, prompts)):
            raise ValueError("prompts: got an empty prompt or none; each needs at least one token")
        if self.window is not None and longest + new - 1 > self.window:  # the last one is not fed
            raise ValueError(
                f"prompt of {longest} tokens + {new} new ones exceed what {self.name} attends over,"
                f" or was built for: {self.window}"
            )

    def save(self, folder: str) -> None:
        self.model.save_pretrained(folder)


def _window(config: Any) -> int | None:
    """Longest text that ordinary causal attention covers exactly."""
    names = ["max_position_embeddings"]
    kinds = getattr(config, "layer_types", None)
    if any(kind != "full_attention" for kind in kinds or ()) or (
        kinds is None and getattr(config, "use_sliding_window", True)
    ):
        names += ["sliding_window", "attention_chunk_size"]
    limits = [*(getattr(config, name, None) for name in names), _rope_limit(config)]
    return min((n for n in limits if n is not None), default=None)


BY_LENGTH = (
    "dynamic",
    "longrope",
    "su",
)  # kinds of rope whose frequencies depend on a call's length


def _rope_limit(config: Any) -> int | None:
    """Past it a rope's frequencies are those of the longest text of a call, so that prefixes that
    are forwarded once would be other ones than those of the whole text."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(config, name, None)
        given = given if isinstance(given, dict) else {}
        for kind in (given, *(v for v in given.values() if isinstance(v, dict))):
            if kind.get("rope_type", kind.get("type")) in BY_LENGTH:
                own = getattr(config, "original_max_position_embeddings", None)
                found.append(kind.get("original_max_position_embeddings") or own
                             or getattr(config, "max_position_embeddings", None))  # fmt: skip
    return min((n for n in found if n is not None), default=None)
