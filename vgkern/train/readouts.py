"""What the costates of a checkpoint say about a task, from groups of samples.

    sample G completions of P prompts, score them        as a training step does
    costates of sum_t log pi, one text per row           one activation-only backward pass
      norms per layer and position                       vgkern.costate.probe, streaming
      S2 and its signal-to-noise, all layers at once     vgkern.costate.value_gradient_signal
    headroom, entropy, sampling gap, replay agreement
    costates of the entropy with 0 hops and with K       1 + K more activation-only passes

Prompts go through in parts, so memory does not grow with their number. Weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import vgkern
from vgkern import costate
from vgkern.tasks import Entry, Task

from .generate import Rollout, decode, generate, portions, score
from .policy import Policy, Tokenizer, encode

TOKENS = 8192  # of one part: its prompts times G texts, the longest of each


@dataclass(frozen=True)
class Sampling:
    """How the samples are drawn and how far credit is carried through them."""

    group: int = 8
    temperature: float = 1.0
    seed: int = 0
    hops: int = 1


@dataclass
class Groups:
    """What is kept of P prompts: a few numbers of each."""

    rewards: Tensor  # [P, G]
    gram: Tensor  # [P, layers + 1, G, G] of the costates at prompt positions
    square: Tensor  # [P, layers + 1] mean |costate|^2 per text and position
    tokens: Tensor  # [P] sampled tokens, of which the next three are sums
    entropy: Tensor  # [P]
    gap: Tensor  # [P] sampling gap
    again: Tensor  # [P] tokens that trainer and replayed noise choose again
    hops: Tensor  # [P, 3] <a, a>, <b, b>, <a, b>: a, b entropy's costates with 0 and K hops
    sampler_gap: Tensor  # [P] largest |log-prob of trainer - sampler|, nats


@dataclass
class Text:
    """One sample, for the picture."""

    ids: list[int]
    prompt: int  # how many of them are the prompt's
    reward: float
    norms: Tensor  # [layers + 1, len(ids)], 0 for the last token, which is not fed
    layers: tuple[str, ...]


def measure(
    policy: Policy,
    tokenizer: Tokenizer,
    task: Task,
    entries: list[Entry],
    sampling: Sampling,
    show: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Groups, Text]:
    """Readouts of every entry's group, and the text of the first group whose rewards differ.

    show(done, of) is called after each part. Raises what generating and scoring raise.
    """
    prompts = [encode(tokenizer, entry.question) for entry in entries]
    parts: list[tuple[Groups, Text]] = []
    for some in portions(prompts, sampling.group, task.max_new, TOKENS):
        ids = torch.arange(some.start * sampling.group, some.stop * sampling.group)
        rollout = generate(
            policy, prompts[some], tokenizer.stops, group=sampling.group, max_new=task.max_new,
            seed=sampling.seed, sequence=ids, temperature=sampling.temperature,
        )  # fmt: skip
        given = score(task, decode(rollout, tokenizer), entries[some], rollout)
        rewards = torch.tensor([reward.value for reward in given]).nan_to_num(0.0)
        parts.append(read(policy, prompts[some], rollout, rewards, ids, sampling))
        show(some.stop, len(prompts))
    names = [field.name for field in fields(Groups)]
    groups = Groups(**{n: torch.cat([getattr(g, n) for g, _ in parts]) for n in names})
    texts = [text for g, text in parts if bool((g.rewards != g.rewards[:, :1]).any())]
    return groups, (texts or [parts[0][1]])[0]


def read(
    policy: Policy,
    prompts: list[list[int]],
    rollout: Rollout,
    rewards: Tensor,  # [R]
    sequence: Tensor,  # [R] what the noise of each row was drawn with
    sampling: Sampling,
) -> tuple[Groups, Text]:
    """The readouts of one part."""
    module: Any = policy
    group, heat, head = sampling.group, sampling.temperature, policy.head()
    options: Any = {"bias": head.bias, "softcap": head.softcap, "temperature": heat}
    size = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(group)
    width = int((size + rollout.lengths).max()) - 1  # the last token is not fed
    gram = costate.CostateGram(torch.arange(width) < size[:, None], group)
    embedding = module.embedding if hasattr(module, "embedding") else _input_embedding(module)
    fed: list[Tensor] = []
    seen = embedding.register_forward_hook(lambda _, args, out: fed.append(out))
    try:
        with costate.probe(module, each=gram) as p:
            hidden = policy.hidden(prompts, rollout.tokens, group, rollout.lengths, shared=False)
            targets = rollout.tokens.masked_fill(~rollout.mask, -100)
            scored = vgkern.linear_token_logprobs(hidden, head.weight, targets, **options)
            torch.autograd.grad(scored.logp.sum(), fed[0], retain_graph=True)
    finally:
        seen.remove()
    norms, layers = p.result()
    table = fed_table(embedding)
    crossing = Crossing(fed[0], hidden, head.weight.detach(), table, rollout, size, p, options)
    products = crossing.products(scored.entropy, sampling.hops)
    with torch.no_grad():
        mask, each = rollout.mask, (len(prompts), group, -1)
        noise = vgkern.Noise(sampling.seed, sequence[:, None], torch.arange(mask.shape[1]))
        token = vgkern.linear_sample(hidden, head.weight, noise, **options).token
        gap = torch.zeros(mask.shape)
        gap[mask] = costate.sampling_gap(hidden[mask], head.weight, table, **options).float()

        def total(x: Tensor) -> Tensor:
            return x.double().where(mask, 0).view(each).sum((1, 2))

        groups = Groups(
            rewards=rewards.view(each[:2]),
            gram=torch.stack([gram.layers[layer] for layer in range(len(norms))], 1),
            square=_mean_square(norms, size + rollout.lengths - 1, each),
            tokens=total(mask), entropy=total(scored.entropy), gap=total(gap),
            again=total(token == rollout.tokens), hops=products.view(*each[:2], 3).sum(1),
            sampler_gap=(scored.logp - rollout.logp).abs().where(mask, 0).view(each).amax((1, 2)),
        )  # fmt: skip
    return groups, _text(prompts, rollout, rewards, group, norms, layers)


class Crossing:
    """Costates of a teacher-forced batch, carried through the tokens that were sampled.

    M: costate at the input of y_t -> hidden state that chose y_t (`noisy_embedding`, "expected")
    -> attention to the earlier inputs. lambda_K = sum_{k <= K} M^k lambda_0.
    """

    def __init__(
        self, fed: Tensor, hidden: Tensor, weight: Tensor, table: Tensor, rollout: Rollout,
        size: Tensor, probe: costate.Probe, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.fed, self.hidden, self.rollout, self.spread = fed, hidden, rollout, probe.spread
        bias = options["bias"]
        given = {**options, "bias": None if bias is None else bias.detach()}
        self.row = hidden.detach().requires_grad_()
        tokens = rollout.tokens.where(rollout.mask, 0)
        self.next = vgkern.noisy_embedding(
            self.row, weight, table, tokens, relaxation="expected", **given
        )
        # y_t is fed at place size + t; the last token of a text is not
        self.at = size[:, None] + torch.arange(tokens.shape[1])
        self.live = torch.arange(tokens.shape[1]) < rollout.lengths[:, None] - 1

    def pull(self, root: Tensor, seed: Tensor | None = None) -> Tensor:
        (costate,) = torch.autograd.grad(root, self.fed, seed, retain_graph=True)
        return self.spread(costate)  # [R, T, He]

    def through(self, costate: Tensor) -> Tensor:
        """M."""
        at = self.at.clamp(max=costate.shape[1] - 1)
        sampled = costate[torch.arange(len(at))[:, None], at].where(self.live[..., None], 0)
        (dh,) = torch.autograd.grad(self.next, self.row, sampled, retain_graph=True)
        return self.pull(self.hidden, dh)

    def products(self, entropy: Tensor, hops: int) -> Tensor:
        """<a, a>, <b, b>, <a, b> of each text [R, 3]; a, b: the costates with 0 and K hops of the
        entropy of its tokens, the part of an RL objective that is differentiable for any task."""
        first = step = total = self.pull(entropy.where(self.rollout.mask, 0).sum())
        for _ in range(hops):
            step = self.through(step)
            total = total + step
        pairs = ((first, first), (total, total), (first, total))
        return torch.stack([(x.double() * y).sum((1, 2)) for x, y in pairs], 1)


def fed_table(embedding: Any) -> Tensor:
    """[V, He]: what the model is fed for each token; some scale the rows of their weight."""
    table: Tensor = embedding.weight.detach()
    with torch.no_grad():
        ids = torch.arange(len(table), device=table.device)
        return table if torch.equal(embedding(ids[:4]), table[:4]) else embedding(ids)


def _input_embedding(module: nn.Module) -> nn.Module:
    model: Any = next((m for m in module.modules() if hasattr(m, "get_input_embeddings")), None)
    if model is None:
        raise ValueError(
            f"model: {type(module).__name__} has no input embedding to read; allowed: this"
            " package's decoder or a Hugging Face model"
        )
    found: nn.Module = model.get_input_embeddings()
    return found


def _mean_square(norms: Tensor, size: Tensor, each: tuple[int, ...]) -> Tensor:
    """[layers + 1, R, T] -> [P, layers + 1], over the positions that texts have."""
    live = torch.arange(norms.shape[2]) < size[:, None]
    squares = norms.double().square().where(live, 0).view(len(norms), *each).sum((2, 3))
    return (squares / live.view(each).sum((1, 2))).T


def _text(
    prompts: list[list[int]],
    rollout: Rollout,
    rewards: Tensor,
    group: int,
    norms: Tensor,
    layers: tuple[str, ...],
) -> Text:
    """The best sample of the first group whose rewards differ; else the first sample."""
    table = rewards.view(-1, group)
    mixed = (table != table[:, :1]).any(1).nonzero()[:, 0].tolist()
    which = mixed[0] if mixed else 0
    row = which * group + int(table[which].argmax())
    answer = rollout.tokens[row, : int(rollout.lengths[row])].tolist()
    ids = [*prompts[which], *answer]
    own = torch.zeros(len(norms), len(ids))
    own[:, :-1] = norms[:, row, : len(ids) - 1]
    return Text(ids, len(prompts[which]), float(rewards[row]), own, layers)


def summarize(groups: Groups, best_of: int) -> dict[str, Any]:
    """Every readout with its standard error over prompts (jackknife; NaN for one prompt)."""

    def mean(x: Tensor) -> Any:
        return x

    def ratio(x: Tensor, y: Tensor) -> Any:
        return x / y

    def cosine(a: Tensor, b: Tensor, ab: Tensor) -> Tensor:
        return ab / (a * b).sqrt()

    over = costate.over_groups
    layers: list[dict[str, Any]] = []
    for layer in range(groups.gram.shape[1]):
        s2, power = costate.value_gradient_signal(groups.gram[:, layer], groups.rewards)
        rms = over(torch.sqrt, groups.square[:, layer])
        layers.append(
            {"layer": layer, "s2": over(mean, s2), "snr": over(ratio, s2, power), "norm": rms}
        )
    a, b, ab = groups.hops.unbind(1)
    between = groups.rewards.double()
    return {
        "reward": over(mean, between.mean(1)),
        "reward_std": over(torch.sqrt, between.var(1)),
        "headroom": over(mean, costate.headroom(groups.rewards, best_of)),
        "entropy": over(ratio, groups.entropy, groups.tokens),
        "sampling_gap": over(ratio, groups.gap, groups.tokens),
        "replay_agreement": over(ratio, groups.again, groups.tokens),
        "hop_cosine": over(cosine, a, b, ab),
        "hop_norm": over(lambda a, b, ab: ((a + b - 2 * ab).clamp(min=0) / a).sqrt(), a, b, ab),
        "sampler_gap": float(groups.sampler_gap.max()),
        "tokens": int(groups.tokens.sum()),
        "layers": layers,
    }
