"""Questions about an autograd graph that `hops` asks before it runs anything."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# What a fused score is made by; None: any output of the node, 0: its first one, the log-probability
SCORES: dict[str, int | None] = {
    "LinearPolicyLossFunctionBackward": None,
    "PolicyLossFunctionBackward": None,
    "TokenLogprobsFunctionBackward": 0,
    "LinearTokenLogprobsFunctionBackward": 0,
    "LinearTruncatedLogprobsFunctionBackward": 0,
    "VocabParallelFunctionBackward": 0,
}
ATTACHED = "_AttachedBackward"  # logp and entropy of an op that carries a costate


def node_of(x: Tensor) -> Any:
    """The graph node that gradients of `x` arrive at; for a leaf the one that accumulates them."""
    return torch.autograd.graph.get_gradient_edge(x).node


def reaches(x: Tensor, source: Tensor) -> bool:
    """Is there a path in the graph from `x` down to `source`?"""
    if not (x.requires_grad and source.requires_grad):
        return False
    goal, stack, seen = node_of(source), [node_of(x)], set()
    while stack:
        node = stack.pop()
        if node is goal:
            return True
        if node in seen:
            continue
        seen.add(node)
        stack += [child for child, _ in node.next_functions if child is not None]
    return False


def score_node(
    objective: Tensor,
    hidden: Tensor,
    inputs: Tensor,
    head: Tensor,
    tokens: Tensor,
    mask: Tensor,
    vocab: int,
) -> str:
    """Name of a node above `hidden`, or above the head in another pass over `inputs`, through which
    the log-probability of the sampled tokens enters `objective`, or "": a fused op of this package,
    or a lookup of `tokens` in [..., vocab]."""
    goals = [node_of(x) for x in (hidden, head) if x.requires_grad]
    above: dict[Any, set[Any]] = {}  # who uses a node's output
    used: dict[Any, set[int]] = {}  # which of its outputs
    start = (node_of(objective), objective.output_nr)
    used[start[0]] = {start[1]}
    stack = [start]
    # below hidden lies the model, which may look up what it likes, and below inputs its table,
    # which may be the head
    seen = {start, *((node, None) for node in (*goals, node_of(inputs)))}
    while stack:
        node, output = stack.pop()
        for child, below in _uses(node, output):
            above.setdefault(child, set()).add(node)
            used.setdefault(child, set()).add(below)
            key = (child, below if child.name() == ATTACHED else None)
            if key not in seen:
                seen.add(key)
                stack.append((child, below))
    over, stack = set(), list(goals)  # a teacher's own scores hang above neither
    while stack:
        for node in above.get(stack.pop(), ()):
            if node not in over:
                over.add(node)
                stack.append(node)
    for node in over:
        name = node.name()
        if name in SCORES and SCORES[name] in (None, *used[node]):
            return name
        if _looks_up(node, tokens, mask, vocab):
            return name
    return ""


def _uses(node: Any, output: int) -> list[tuple[Any, int]]:
    """What this output of `node` is made of: of (logp, entropy, term) logp or entropy, and the
    term, where a costate is attached to them."""
    edges = enumerate(node.next_functions)
    apart = node.name() == ATTACHED
    return [e for i, e in edges if e[0] is not None and (not apart or i in (output, 2))]


def _looks_up(node: Any, tokens: Tensor, mask: Tensor, vocab: int) -> bool:
    """A gather, an index or a cross-entropy that picks the sampled tokens out of [..., vocab]."""
    name = node.name()
    ignored = None
    if name == "GatherBackward0":
        width, picks = node._saved_self.shape[-1], [node._saved_index]
    elif name.startswith("NllLoss"):
        width, picks, ignored = vocab, [node._saved_target], node._saved_ignore_index
    elif name == "IndexBackward0":
        sizes, picks = node._saved_self_sym_sizes, node._saved_indices
        width, picks = int(sizes[-1]), picks[-1:] if len(picks) == len(sizes) else []
    else:
        return False
    if width != vocab:
        return False
    for pick in picks:
        if pick is None or pick.dtype != torch.int64:
            continue
        for got, want in _aligned(pick, tokens, mask):
            if ignored is not None:  # 2**64 - 100 stands for -100
                some = got != (ignored + 2**63) % 2**64 - 2**63
                got, want = got[some], want[some]
            if want.numel() and torch.equal(got, want):
                return True
    return False


def _aligned(pick: Tensor, tokens: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The picks of the sampled rows beside their tokens, in every layout that holds all of them:
    the sampled rows alone, or windows of n rows per sequence, n = L with one row that predicts
    nothing at either end, L - 1, or fewer where the first or last rows were not sampled."""
    want = tokens[mask]
    if pick.numel() == len(want):
        yield pick.reshape(-1), want
    b, rows = tokens.shape
    if not len(want) or pick.numel() % b:
        return
    n = pick.numel() // b
    if n > rows + 1:
        return
    some = mask.any(0).nonzero()[:, 0]
    first, last = int(some[0]), int(some[-1])
    pick = pick.reshape(b, n)
    spare = int(n > rows)  # the row that predicts nothing: first, or last
    for start in range(max(last + 1 - n, -spare), min(first, rows - n + spare) + 1):
        yield pick[:, first - start : last + 1 - start][mask[:, first : last + 1]], want
