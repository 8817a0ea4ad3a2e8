"""Questions about an autograd graph that `hops` asks before it runs anything."""

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


def score_node(objective: Tensor, hidden: Tensor, tokens: Tensor, mask: Tensor, vocab: int) -> str:
    """Name of a node above `hidden` through which the log-probability of the sampled tokens enters
    `objective`, or "": a fused op of this package, or a lookup of `tokens` in [..., vocab]."""
    goal = node_of(hidden)
    above: dict[Any, set[Any]] = {}  # who uses a node's output
    used: dict[Any, set[int]] = {}  # which of its outputs
    stack = [node_of(objective)]
    seen = {stack[0], goal}  # below hidden lies the model, which may look up what it likes
    used[stack[0]] = {objective.output_nr}
    while stack:
        node = stack.pop()
        for child, output in node.next_functions:
            if child is None:
                continue
            above.setdefault(child, set()).add(node)
            used.setdefault(child, set()).add(output)
            if child not in seen:
                seen.add(child)
                stack.append(child)
    over, stack = set(), [goal]  # whatever hangs above hidden; a teacher's own scores do not
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


def _looks_up(node: Any, tokens: Tensor, mask: Tensor, vocab: int) -> bool:
    """A gather, an index or a cross-entropy that picks the sampled tokens out of [..., vocab]."""
    name = node.name()
    if name == "GatherBackward0":
        width, picks = node._saved_self.shape[-1], [node._saved_index]
    elif name.startswith("NllLoss"):
        width, picks = vocab, [node._saved_target]
    elif name == "IndexBackward0":
        width, picks = int(node._saved_self_sym_sizes[-1]), node._saved_indices[-1:]
    else:
        return False
    if width != vocab:
        return False
    for pick in picks:
        if pick is None or pick.dtype != torch.int64:
            continue
        if pick.numel() == tokens.numel():
            got, want = pick.reshape(tokens.shape)[mask], tokens[mask]
        elif pick.numel() == int(mask.sum()):
            got, want = pick.reshape(-1), tokens[mask]
        else:
            continue
        if want.numel() and torch.equal(got, want):
            return True
    return False
