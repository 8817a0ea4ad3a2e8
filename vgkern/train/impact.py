"""What `vgkern.costate.impact` needs of a checkpoint, measured on a task's prompts.

sample G completions of P prompts, score them     as a training step does
prompts whose rewards differ, and no others:      the others have neither signal nor noise
  costates at one layer, of every sample          one forward, one backward by activations
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vgkern.costate import impact
from vgkern.errors import TrainingError
from vgkern.tasks import Entry, Task

from .device import LIMITS
from .generate import decode, generate, portions, score
from .hf import common_prefix
from .policy import Policy, Tokenizer, encode
from .prompt_costates import prompt_costates
from .readouts import TOKENS

GAP_ERROR = LIMITS["fp32"].gap_error


@dataclass(frozen=True)
class Sampling:
    group: int = 8
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Spent:
    """What a price is made of."""

    sampling: float  # seconds
    costates: float
    prompt: float  # mean tokens past what all prompts share
    answer: float


def measure(
    policy: Policy,
    tokenizer: Tokenizer,
    task: Task,
    entries: Sequence[Entry],  # all of them: what their prompts share is a constant
    some: range,  # of the entries; a sample's noise is that of its entry's number
    layer: int,
    sampling: Sampling,
    show: Callable[[int], None] = lambda done: None,
) -> tuple[impact.Measured, Spent]:
    """show(done) is called after each part. A sample that the task gives no reward has 0.

    Raises what generating and scoring raise, and TrainingError where the sampler's log-probs are
    not those of the forward pass.
    """
    every = [encode(tokenizer, entry.question) for entry in entries]
    group, common = sampling.group, common_prefix(every) if len(every) > 1 else 0
    prompts = [every[i] for i in some]
    found: list[impact.Measured] = []
    sampled = spent = answered = 0.0
    for part in portions(prompts, group, task.max_new, TOKENS):
        start = time.perf_counter()
        first, these = some.start + part.start, prompts[part]
        rollout = generate(
            policy, these, tokenizer.stops, group=group, max_new=task.max_new, seed=sampling.seed,
            sequence=torch.arange(first * group, (first + len(these)) * group),
            temperature=sampling.temperature,
        )  # fmt: skip
        asked = [entries[first + i] for i in range(len(these))]
        given = score(task, decode(rollout, tokenizer), asked, rollout)
        rewards = torch.tensor([x.value for x in given], dtype=torch.float64).nan_to_num(0.0)
        rewards = rewards.view(-1, group)
        middle = time.perf_counter()
        gram = torch.zeros(*rewards.shape, group)
        square = torch.full((len(rewards),), torch.nan, dtype=torch.float64)
        use = impact.mixed(rewards).nonzero()[:, 0]
        if len(use):
            rows = (use[:, None] * group + torch.arange(group)).flatten()
            u = prompt_costates(
                policy, [these[i] for i in use.tolist()], rollout.select(rows), group, layer,
                common=common, temperature=sampling.temperature,
            )  # fmt: skip
            if not u.gap <= GAP_ERROR:
                raise TrainingError(
                    f"sampler and forward pass disagree on a token's log-prob by {u.gap:.2e} "
                    f"(allowed: {GAP_ERROR}); padding, positions or the head differ between the two"
                )
            gram[use], square[use] = u.gram.cpu(), u.square.cpu()
        logp = rollout.logp.double().sum(1).view_as(rewards)
        length = rollout.lengths.view_as(rewards)
        found.append(impact.measured(gram, rewards, logp, length, square))
        sampled += middle - start
        spent += time.perf_counter() - middle
        answered += float(length.sum())
        show(part.stop)
    whole = found[0]
    for more in found[1:]:
        whole = whole.and_then(more)
    own = sum(map(len, prompts)) / len(prompts) - common
    return whole, Spent(sampled, spent, own, answered / (len(prompts) * group))
