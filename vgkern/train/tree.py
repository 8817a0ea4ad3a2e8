"""Prefix trees: completions of one prompt share prefixes, and a shared prefix is forwarded once.

Each group is one tree: its prompt is a chain, the last prompt token is the root of the completions,
and a node is a distinct (group, prefix). Hidden states depend on nothing but the prefix, so
forwarding each node once is exact, in the rollout and in the update. Eight samples of a short
answer often share half of their prefixes; identical answers share all of them.

A node has a *slot* in its group (its place among the group's keys) and sees its ancestors' slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
IDS = 1 << 32  # token ids are below this; (node, token) packs into one int64


class Tree:
    """The frontier of P trees: the newest node of every live row."""

    def __init__(self, prompt_lengths: Ints, group: int, capacity: int) -> None:
        prompts = len(prompt_lengths)
        self.count = prompt_lengths.copy()  # [P] slots in use
        self.group = np.arange(prompts)  # [M] group of each frontier node; always sorted
        self.slot = prompt_lengths - 1  # [M]
        self.position = prompt_lengths - 1  # [M] place in the text
        self.sees = np.arange(capacity) < prompt_lengths[:, None]  # [M, capacity] ancestors + self
        self.node = np.repeat(np.arange(prompts), group)  # [R] frontier node of each live row
        self.rank = np.zeros(prompts, np.int64)  # [M] place among the group's frontier nodes

    def keep(self, rows: Ints) -> None:
        """Drop all rows but these; a node without rows has no children, and costs nothing."""
        self.node = self.node[rows]

    def grow(self, tokens: Ints) -> Ints:
        """Append a token to every live row; return the new nodes' tokens [M]."""
        distinct, self.node = np.unique(self.node * IDS + tokens, return_inverse=True)
        parent, token = distinct // IDS, distinct % IDS
        self.group = self.group[parent]
        first = np.searchsorted(self.group, self.group)
        self.rank = np.arange(len(parent)) - first
        self.slot = self.count[self.group] + self.rank
        self.position = self.position[parent] + 1
        self.count += np.bincount(self.group, minlength=len(self.count))
        self.sees = self.sees[parent]
        self.sees[np.arange(len(parent)), self.slot] = True
        return token
