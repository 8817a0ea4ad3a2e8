"""A small decoder: gain-free RMSNorm, RoPE, SwiGLU, tied head. Implements `policy.Policy`.

Nothing is padded but attention. Linear layers and norms see compact rows [M, D], one per tree node
(`tree.py`); attention sees [P, N] slots under a mask of ancestors. One layer serves the rollout
(new nodes against cached keys) and the update (all nodes at once).

Notation: P groups, G rows each, R = P*G rows, M nodes, N slots, D width, L layers, V ids.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .device import rounded
from .layers import RMSNorm, RotateAndPad, SwiGLU, Unpad, rotate
from .policy import BLOCKED, Head
from .tree import Ints, Tree

KIND = "vgkern-decoder"


@dataclass(frozen=True)
class Shape:
    vocab: int = 48
    width: int = 128
    layers: int = 3
    heads: int = 4
    mlp: int = 384
    context: int = 128


@dataclass
class Nodes:
    """Every node of one update, compact, with what attention needs to pad and unpad them."""

    token: Tensor  # [M]; prompt tokens but the last first: in the last layer they are only keys
    position: Tensor  # [M]
    slot: Tensor  # [M] index into the P*N padded slots
    row: Tensor  # [P*N] inverse of slot; 0 for padding
    mask: Tensor  # [P, 1, N, N] fp32, 0 where a slot may look, -inf where not
    keys_only: int  # how many rows are only keys in the last layer

    def to(self, device: torch.device) -> Nodes:
        names = ("token", "position", "slot", "row", "mask")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return dataclasses.replace(self, **moved)


@dataclass
class Cache:
    """State of a rollout: the keys and values of every node, and the trees' frontier."""

    kv: list[Tensor]  # L of [P * capacity, 2D]
    tree: Tree
    capacity: int


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU. The two halves are separate: attention's middle differs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, d, bias=False)

    def project(self, x: Tensor) -> Tensor:  # [M, D] -> [M, 3D]
        return self.qkv(RMSNorm.apply(x))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:  # [M, D], [M, D] -> [M, D]
        x = x + self.out(attended)
        return x + self.down(SwiGLU.apply(self.gate_up(RMSNorm.apply(x))))


class Decoder(nn.Module):
    """`blocked` ids (padding, unused) get bias -1e9 in the one head that everybody reads."""

    bias: Tensor
    angle: Tensor  # complex64 [context, pairs]
    layers: list[Layer]
    compute = "fp32"  # see `device.py`

    def __init__(self, shape: Shape, blocked: list[int], seed: int = 0) -> None:
        super().__init__()
        if shape.width % shape.heads or shape.width // shape.heads % 2:
            raise ValueError(
                f"width={shape.width} must be a multiple of 2 * heads={2 * shape.heads}"
            )
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))  # type: ignore
        bias = torch.zeros(shape.vocab)
        bias[blocked] = BLOCKED
        self.blocked = blocked
        self.register_buffer("bias", bias, persistent=False)
        pairs = shape.width // shape.heads // 2
        turns = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.outer(torch.arange(shape.context, dtype=torch.float64), turns)
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        self.register_buffer("angle", turn, persistent=False)
        self.initialize(seed)

    @property
    def device(self) -> torch.device:
        return self.bias.device

    def initialize(self, seed: int) -> None:
        """Small residual branches: the network starts close to the identity."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            residual = name.endswith(("out.weight", "down.weight"))
            std = (0.4 if residual else 0.8) * self.shape.width**-0.5
            std = 0.02 if name.startswith("embedding") else std
            nn.init.normal_(weight, std=std, generator=generator)

    def head(self) -> Head:
        return Head(self.embedding.weight, self.bias)

    def hidden(
        self,
        prompts: list[list[int]],
        completions: Tensor,  # [R, w] int64
        group: int,
        lengths: Tensor,  # [R] int64
        shared: bool = True,
    ) -> Tensor:  # [R, w, D], with gradients
        """Hidden states that predict `completions`; see `policy.Policy.hidden`."""
        if not shared:
            prompts = [prompt for prompt in prompts for _ in range(group)]
            group = 1
        self.check(prompts, completions.shape[1])
        host = completions.cpu().numpy(), lengths.cpu().numpy()
        nodes, where = tree_nodes(prompts, host[0], group, host[1])
        flat = where.reshape(-1).to(self.device, non_blocking=True)
        return self(nodes.to(self.device)).index_select(0, flat).view(*where.shape, -1)

    def probe_points(self) -> list[nn.Module]:
        """Whose outputs have the residual stream's gradient: a layer adds `down`'s last."""
        return [self.embedding, *(layer.down for layer in self.layers)]

    def probe_place(self, nodes: Nodes) -> tuple[tuple[int, int], Tensor]:
        """[P, N], and the slot of each row in it; unshared texts are chains: [R, T]."""
        return (len(nodes.mask), nodes.mask.shape[-1]), nodes.slot

    def forward(self, nodes: Nodes) -> Tensor:  # [M - keys_only, D]
        return self.body(self.embedding(nodes.token), nodes)

    def from_embeddings(self, inputs_embeds: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        """Hidden states over given input embeddings: B rows, causal, in full, nothing shared."""
        b, length, width = inputs_embeds.shape
        if length > self.shape.context:
            raise ValueError(f"a text of {length} tokens exceeds context={self.shape.context}")
        device = inputs_embeds.device
        every, place = (torch.arange(n, device=device) for n in (b * length, length))
        blocked = torch.full_like(inputs_embeds[0, :, :1], -torch.inf).expand(-1, length).triu(1)
        nodes = Nodes(
            token=every,
            position=place.repeat(b),
            slot=every,
            row=every,
            mask=blocked.expand(b, 1, length, length),
            keys_only=0,
        )
        return self.body(inputs_embeds.reshape(-1, width), nodes).view(b, length, width)

    def body(self, x: Tensor, nodes: Nodes) -> Tensor:  # [M, D] -> [M - keys_only, D]
        return rounded(self, RMSNorm.apply(self.through(x, nodes, 0, len(self.layers))))

    def through(self, x: Tensor, nodes: Nodes, first: int, last: int) -> Tensor:
        """The residual stream [M, D] that enters layer `first`, as layer `last` would get it."""
        angle = self.angle[nodes.position]
        slot = nodes.slot
        for index in range(first, last):
            layer = self.layers[index]
            qkv = RotateAndPad.apply(layer.project(x), angle, nodes.row, slot)
            q, k, v = self.by_head(qkv, len(nodes.mask))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=nodes.mask)
            if index == len(self.layers) - 1:  # nobody reads what the prompt's nodes become
                x, slot = x[nodes.keys_only :], slot[nodes.keys_only :]
            x = layer.finish(x, Unpad.apply(y.transpose(1, 2).reshape(-1, self.shape.width), slot))
        return x

    def by_head(self, rows: Tensor, groups: int) -> tuple[Tensor, ...]:
        """[P*N, c*D] -> c tensors [P, h, N, dh]."""
        heads, size = self.shape.heads, self.shape.width // self.shape.heads
        return (
            rows.view(groups, -1, rows.shape[1] // self.shape.width, heads, size)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )

    def prefill(
        self, prompts: list[list[int]], group: int, max_new: int
    ) -> tuple[Cache, Tensor]:  # hidden [R, D]
        self.check(prompts, max_new)
        length = np.array([len(prompt) for prompt in prompts])
        capacity = int(length.max()) + group * (max_new - 1)
        size = (len(prompts) * capacity, 2 * self.shape.width)
        like = rounded(self, self.bias)
        kv = [like.new_zeros(size) for _ in self.layers]  # zeros: unused slots must be finite
        cache = Cache(kv, Tree(length, group, capacity), capacity)
        token, of, place = prompt_nodes(prompts)
        x = self.step(cache, token, of, place, place, np.tri(capacity, dtype=bool)[place])
        roots = np.cumsum(length) - 1
        return cache, x[self.on_device(np.repeat(roots, group))]

    def decode(self, state: Cache, tokens: Tensor) -> Tensor:  # [R] -> [R, D]
        tree = state.tree
        token = tree.grow(tokens.cpu().numpy())
        x = self.step(state, token, tree.group, tree.slot, tree.rank, tree.sees, tree.position)
        return x[self.on_device(tree.node)]

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def keep(self, state: Cache, rows: Tensor) -> None:
        state.tree.keep(rows.cpu().numpy())

    def step(
        self,
        cache: Cache,
        token: Ints,  # [M]
        group: Ints,  # [M]
        slot: Ints,  # [M] among the group's keys
        query: Ints,  # [M] among the group's queries
        sees: np.ndarray,  # [M, capacity] bool
        position: Ints | None = None,  # [M]; the slot where it is absent
    ) -> Tensor:  # [M, D]
        """Forward M new nodes and append their keys and values to the cache."""
        groups, keys, queries = len(cache.tree.count), slot.max() + 1, query.max() + 1
        keys = max(int(keys), int(cache.tree.count.max()))
        mask = np.full((groups, 1, queries, keys), 0.0, np.float32)
        mask[group, 0, query] = np.where(sees[:, :keys], 0.0, -np.inf)
        row = np.zeros(groups * queries, np.int64)
        row[group * queries + query] = np.arange(len(token))
        at_slot = self.on_device(group * cache.capacity + slot)
        at_query = self.on_device(group * queries + query)
        pad, bias = self.on_device(row), self.on_device(mask)
        angle = self.angle[self.on_device(slot if position is None else position)]
        x = self.embedding(self.on_device(token))
        width = self.shape.width
        for layer, kv in zip(self.layers, cache.kv, strict=True):
            qkv = layer.project(x)
            rotate(qkv, angle)
            kv.index_copy_(0, at_slot, qkv[:, width:])
            (q,) = self.by_head(qkv[:, :width].index_select(0, pad), groups)
            k, v = (t[:, :, :keys] for t in self.by_head(kv, groups))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = layer.finish(x, y.transpose(1, 2).reshape(-1, width).index_select(0, at_query))
        return rounded(self, RMSNorm.apply(x))

    def check(self, prompts: list[list[int]], new: int) -> None:
        longest = max(map(len, prompts), default=0)
        if not prompts or not min(map(len, prompts)):
            raise ValueError("prompts: got an empty prompt or none; each needs at least one token")
        if longest + new > self.shape.context:
            raise ValueError(
                f"prompt of {longest} tokens + {new} new ones exceed context={self.shape.context}"
            )

    def save(self, folder: str) -> None:
        """`model.safetensors` and `config.json`, read back by `load`."""
        state = {name: weight.cpu().contiguous() for name, weight in self.state_dict().items()}
        save_file(state, Path(folder, "model.safetensors"))
        config = {"kind": KIND, "blocked": self.blocked, **dataclasses.asdict(self.shape)}
        Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> Decoder:
        config = json.loads(Path(folder, "config.json").read_text())
        names = [field.name for field in dataclasses.fields(Shape)]
        model = cls(Shape(**{name: config[name] for name in names}), config["blocked"])
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return model


def prompt_nodes(prompts: list[list[int]]) -> tuple[Ints, Ints, Ints]:
    """All prompt tokens in order: token [M], prompt [M], place in the prompt [M]."""
    token = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
    length = np.array([len(prompt) for prompt in prompts])
    of = np.repeat(np.arange(len(prompts)), length)
    return token, of, np.arange(len(token)) - np.repeat(np.cumsum(length) - length, length)


def tree_nodes(
    prompts: list[list[int]], completions: Ints, group: int, lengths: Ints
) -> tuple[Nodes, Tensor]:
    """Grow the trees of all completions; also where [R, w]: the node predicting each token."""
    length = np.array([len(prompt) for prompt in prompts])
    width = completions.shape[1]
    capacity = int(length.max()) + group * (width - 1)
    tree = Tree(length, group, capacity)
    token, of, place = prompt_nodes(prompts)
    last = place == length[of] - 1
    tokens, groups, slots = [token[~last], token[last]], [of[~last], of[last]], []
    slots = [place[~last], place[last]]
    positions = list(slots)
    sees = [np.tri(capacity, dtype=bool)[slots[0]], tree.sees]
    where = np.zeros((len(completions), width), np.int64)
    live = np.arange(len(completions))
    total = 0
    for step in range(width):
        where[live, step] = total + tree.node
        total += len(tree.slot)
        going = np.flatnonzero(lengths[live] > step + 1)
        if not len(going):
            break
        tree.keep(going)
        live = live[going]
        tokens.append(tree.grow(completions[live, step]))
        groups.append(tree.group)
        slots.append(tree.slot)
        positions.append(tree.position)
        sees.append(tree.sees)
    of, slot = np.concatenate(groups), np.concatenate(slots)
    used = int(tree.count.max())
    mask = np.full((len(prompts), 1, used, used), 0.0, np.float32)
    mask[of, 0, slot] = np.where(np.concatenate(sees)[:, :used], 0.0, -np.inf)
    flat = of * used + slot
    row = np.zeros(len(prompts) * used, np.int64)
    row[flat] = np.arange(len(flat))
    nodes = Nodes(
        token=torch.from_numpy(np.concatenate(tokens)),
        position=torch.from_numpy(np.concatenate(positions)),
        slot=torch.from_numpy(flat),
        row=torch.from_numpy(row),
        mask=torch.from_numpy(mask),
        keys_only=len(tokens[0]),
    )
    return nodes, torch.from_numpy(where)
