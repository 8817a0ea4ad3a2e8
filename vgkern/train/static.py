"""Rows of a rollout in buffers that keep their address: what a captured decode step works on.

    fill(prompts)      forward the prompts, once a group; hidden [R, H]: of the first token
    advance(token)     feed one token [R] to every row; hidden [R, H]. No wait, nothing replaced
    take(rows, index)  become these rows of others: the ones that still go on, in a smaller batch

The decoder's groups share the keys and values of their prompt: P x G queries against P caches of
`room + G * new` slots. A Hugging Face model has its library's StaticCache, a row a sample.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .device import rounded
from .layers import RMSNorm, rotate
from .tree import Tree

if TYPE_CHECKING:
    from .hf import HFPolicy
    from .model import Decoder


class DecoderRows:
    """P groups of G rows, prompts of at most `room` tokens, `new` tokens after them."""

    def __init__(self, model: Decoder, prompts: int, group: int, room: int, new: int) -> None:
        self.model = weakref.proxy(model)  # rows are kept as long as it is, not it as long as they
        self.prompts, self.group, self.room, self.new = prompts, group, room, new
        self.capacity = room + group * new
        like, count = rounded(model, model.bias), prompts * group
        size = (prompts * self.capacity, 2 * model.shape.width)
        self.kv = [like.new_zeros(size) for _ in model.layers]
        self.mask = model.bias.new_full((prompts, 1, group, self.capacity), -torch.inf)
        row = torch.arange(count, device=model.device)
        self.column = room + row % group * new  # [R] slot of a row's next token in its group
        self.at = row // group * self.capacity + self.column  # the same among all keys
        self.place = torch.zeros_like(row)  # [R] its place in the text

    def fill(self, prompts: list[list[int]]) -> Tensor:
        from .model import Cache, prompt_nodes

        model = self.model
        length = np.array([len(prompt) for prompt in prompts])
        cache = Cache(self.kv, Tree(length, self.group, self.capacity), self.capacity)
        token, of, place = prompt_nodes(prompts)
        sees = np.tri(self.room, self.capacity, dtype=bool)
        x = model.step(cache, token, of, place, place, sees[place])
        mask = np.where(np.arange(self.capacity) < length[:, None], 0.0, -np.inf)
        seen = model.on_device(mask.astype(np.float32))[:, None, None]
        self.mask.copy_(seen.expand_as(self.mask))
        self.place.copy_(model.on_device(np.repeat(length, self.group)))
        row = torch.arange(len(self.place), device=model.device)
        self.column.copy_(self.room + row % self.group * self.new)
        self.at.copy_(row // self.group * self.capacity + self.column)
        return x[model.on_device(np.repeat(np.cumsum(length) - 1, self.group))]

    def advance(self, token: Tensor) -> Tensor:
        model, groups, group = self.model, self.prompts, self.group
        width, heads = model.shape.width, model.shape.heads
        self.mask.view(len(token), -1).scatter_(1, self.column[:, None], 0.0)
        angle = model.angle.index_select(0, self.place)
        x = model.embedding(token)
        for layer, kv in zip(model.layers, self.kv, strict=True):
            qkv = layer.project(x)
            rotate(qkv, angle)
            kv.index_copy_(0, self.at, qkv[:, width:])
            q = qkv[:, :width].reshape(groups, group, heads, -1).transpose(1, 2)
            k, v = model.by_head(kv, groups)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask.to(q.dtype))
            x = layer.finish(x, y.transpose(1, 2).reshape(-1, width))
        for moved in (self.place, self.column, self.at):
            moved.add_(1)
        return rounded(model, RMSNorm.apply(x))

    def take(self, rows: DecoderRows, index: Tensor) -> None:
        """Rows of groups as groups of one. index: int64 [R], of the others' rows."""
        group, of = index // rows.group, index % rows.group
        span = torch.arange(self.capacity, device=index.device)
        own = span - self.room + rows.room + of[:, None] * rows.new  # [R, capacity] slots there
        slots = torch.where(span < self.room, span, own)
        flat = (group[:, None] * rows.capacity + slots).reshape(-1)
        for mine, theirs in zip(self.kv, rows.kv, strict=True):
            mine.copy_(theirs.index_select(0, flat))
        seen = rows.mask.view(-1, rows.capacity).index_select(0, index).gather(1, slots)
        self.mask.view(len(index), -1).copy_(seen)
        self.place.copy_(rows.place[index])
        done = rows.column[index] - rows.room - of * rows.new  # tokens that were fed so far
        self.column.copy_(self.room + done)
        row = torch.arange(len(index), device=index.device)
        self.at.copy_(row * self.capacity + self.column)


class HFRows:
    """The same over `transformers`: prompts end at `room` (padded on the left), so that all rows
    write to one column of a StaticCache."""

    def __init__(self, policy: HFPolicy, prompts: int, group: int, room: int, new: int) -> None:
        from transformers import StaticCache

        self.policy = weakref.proxy(policy)
        self.group, self.room, self.new = group, room, new
        count, self.capacity = prompts * group, room + new
        self.cache = StaticCache(config=policy.model.config, max_cache_len=self.capacity)
        weight = policy.output.weight
        self.hidden = torch.finfo(weight.dtype).min
        self.mask = weight.new_full((count, 1, 1, self.capacity), self.hidden)
        self.place = torch.zeros(count, dtype=torch.int64, device=policy.device)
        self.column = torch.full((1,), room, dtype=torch.int64, device=policy.device)

    def fill(self, prompts: list[list[int]]) -> Tensor:
        from transformers import DynamicCache

        policy, room = self.policy, self.room
        length = np.array([len(prompt) for prompt in prompts])
        ids, pad = np.zeros((len(prompts), room), np.int64), room - length
        for row, prompt in zip(ids, prompts, strict=True):
            row[room - len(prompt) :] = prompt
        columns = np.arange(room)
        real = columns >= pad[:, None]  # [P, room]
        sees = np.tri(room, dtype=bool) & (real[:, None] | np.eye(room, dtype=bool))
        there = torch.from_numpy(np.where(sees, 0.0, self.hidden)).to(self.mask.dtype)
        cache = DynamicCache()
        hidden = policy._body(
            policy._index(ids), policy._index(np.maximum(columns - pad[:, None], 0)),
            there[:, None].to(policy.device, non_blocking=True), cache,
        )  # fmt: skip
        for mine, made in zip(self.cache.layers, cache.layers, strict=True):
            k, v = (x.repeat_interleave(self.group, 0) for x in (made.keys, made.values))
            if not mine.is_initialized:
                mine.lazy_initialization(k, v)
            mine.keys[:, :, :room].copy_(k)
            mine.values[:, :, :room].copy_(v)
            mine.cumulative_length.fill_(room)
        seen = np.full((len(prompts), self.capacity), self.hidden)
        seen[:, :room][real] = 0.0
        rows = torch.from_numpy(np.repeat(seen, self.group, 0)).to(self.mask.dtype)
        self.mask.copy_(rows[:, None, None].to(policy.device, non_blocking=True))
        self.place.copy_(policy._index(np.repeat(length, self.group)))
        self.column.fill_(room)
        return hidden[:, -1].repeat_interleave(self.group, 0)

    def advance(self, token: Tensor) -> Tensor:
        self.mask.index_fill_(3, self.column, 0.0)
        where = token[:, None], self.place[:, None]
        hidden = self.policy._body(*where, self.mask, self.cache)[:, 0]
        self.place.add_(1)
        self.column.add_(1)
        return hidden

    def take(self, rows: HFRows, index: Tensor) -> None:
        for mine, theirs in zip(self.cache.layers, rows.cache.layers, strict=True):
            k, v = (x.index_select(0, index) for x in (theirs.keys, theirs.values))
            if not mine.is_initialized:
                mine.lazy_initialization(k, v)
            mine.keys.copy_(k)
            mine.values.copy_(v)
            mine.cumulative_length.copy_(theirs.cumulative_length)
        self.mask.copy_(rows.mask.index_select(0, index))
        self.place.copy_(rows.place.index_select(0, index))
        self.column.copy_(rows.column)


def rows_of(policy: Any, prompts: int, group: int, room: int, new: int) -> Any:
    """Static rows of a policy, or None where it has to go by trees."""
    from .hf import HFPolicy
    from .model import Decoder

    if isinstance(policy, Decoder):
        return DecoderRows(policy, prompts, group, room, new)
    if not isinstance(policy, HFPolicy):
        return None
    from transformers.cache_utils import StaticLayer

    rows = HFRows(policy, prompts, group, room, new)
    plain = all(type(layer) is StaticLayer for layer in rows.cache.layers)
    return rows if plain else None
