"""`python -m vgkern probe`: what the costates of a checkpoint say, on one screen.

    sample G completions of P prompts, score them        as a training step does
    costates of sum_t log pi, one text per row           one activation-only backward pass
      norms per layer and position                       vgkern.costate.probe, streaming
      S2 and its signal-to-noise, all layers at once     vgkern.costate.value_gradient_signal
    headroom, entropy, sampling gap, replay agreement
    costates of the entropy with 0 hops and with K       K more activation-only passes

Prompts go through in parts, so memory does not grow with their number. Weights get no gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern import costate

from .checkpoint import load_policy
from .errors import ConfigError
from .generate import Rollout, decode, generate, score
from .log import clock
from .policy import Head, Policy, Tokenizer
from .tasks import Entry, Stream, Task, make_task

TOKENS = 8192  # of one part: its prompts times G texts, the longest of each
QUIET = 3.0  # seconds before progress is worth a line
FROM_RUN = ("task", "task_options", "few_shot", "temperature")  # what a run's own record decides


@dataclass
class Options:
    """The flags, with what the run's folder says where they are silent."""

    model: str  # as asked for
    weights: str  # the folder or name that is loaded
    task: str
    task_options: dict[str, Any]
    few_shot: int
    temperature: float
    prompts: int
    group: int
    best_of: int
    layer: int | None
    hops: int
    seed: int
    threads: int
    out: Path


@dataclass
class Part:
    """What is kept of some prompts: a few numbers per group, and one text's norms."""

    rewards: Tensor  # [p, G]
    gram: Tensor  # [layers + 1, p, G, G] of the costates at prompt positions
    count: int  # response tokens
    sums: dict[str, float]  # over response tokens: entropy, gap, agree; over inputs: hop products
    norms: Tensor  # [layers + 1, T] of the text that is drawn
    text: list[int]
    prompt: int
    sampler_gap: float


def parse(arguments: list[str]) -> Options:
    p = argparse.ArgumentParser(prog="python -m vgkern probe", allow_abbrev=False,
                                description="value-gradient readouts of a checkpoint")  # fmt: skip
    p.add_argument("--model", required=True, help="run folder, checkpoint folder or a Hugging Face name")
    p.add_argument("--task", help="default: the task of the run the model came from")
    p.add_argument("--task-options", help="options of the task, as JSON")
    p.add_argument("--few-shot", type=int, help="fixed examples before every question")
    p.add_argument("--temperature", type=float, help="of the samples (default: the run's, else 1)")
    p.add_argument("--prompts", type=int, default=16, help="held-out prompts (default: 16)")
    p.add_argument("--group", type=int, default=8, help="samples per prompt, >= 4 (default: 8)")
    p.add_argument("--best-of", type=int, help="k of the headroom (default: 8, at most the group)")
    p.add_argument("--layer", type=int, help="whose signal heads the summary (default: the middle)")
    p.add_argument("--hops", type=int, default=1, help="sampled tokens credit passes (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--out", help="folder of probe.json and costates.png (default: runs/probe-TIME)")
    given = vars(p.parse_args(arguments))
    floors = {"prompts": 1, "group": costate.signal.LEAST, "best_of": 1, "hops": 1, "seed": 0}
    floors |= {"threads": 1, "few_shot": 0, "layer": 0}
    for name, low in floors.items():
        if given[name] is not None and given[name] < low:
            raise ConfigError(f"--{name.replace('_', '-')}: got {given[name]}; allowed: >= {low}")
    if (k := given["best_of"]) is not None and k > given["group"]:
        raise ConfigError(f"--best-of: got {k}; allowed: at most --group, {given['group']}")
    given["best_of"] = k or min(8, given["group"])
    given["weights"], run = find(given["model"])
    neutral = {"task_options": "{}", "few_shot": 0, "temperature": 1.0}
    for name in FROM_RUN:
        # another task than the run's has nothing to do with the run's options of it
        theirs = run if name == "temperature" or given["task"] == run.get("task") else {}
        if given[name] is None:
            given[name] = theirs.get(name, neutral.get(name))
    if given["task"] is None:
        what = f"{given['model']} is no run of this trainer, so the task is unknown"
        raise ConfigError(f"--task: {what}; give --task sort, reverse, addition or reasoning_gym:NAME")
    if not 1e-3 <= given["temperature"] < math.inf:
        raise ConfigError(f"--temperature: got {given['temperature']}; allowed: >= 0.001, finite")
    try:
        given["task_options"] = json.loads(given["task_options"])
    except json.JSONDecodeError as error:
        got = given["task_options"]
        raise ConfigError(f"--task-options: got {got!r}; allowed: a JSON object ({error})") from None
    out = Path(given["out"] or f"runs/probe-{time.strftime('%Y%m%d-%H%M%S')}")
    if (out / "probe.json").exists() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out: {out} holds a probe already; choose another folder")
    return Options(**{**given, "out": out})


def find(model: str) -> tuple[str, dict[str, Any]]:
    """The weights to load, and the settings of the run they came from ({} without one)."""
    folder = Path(model)
    run = _run_settings(folder)
    if not run:
        return model, _run_settings(folder.parent) if folder.is_dir() else {}
    steps = sorted(folder.glob("step-*"))
    for weights in (folder / "final", *reversed(steps), folder / "start"):
        if weights.is_dir():
            return str(weights), run
    raise ConfigError(f"--model: {folder} is a run that has saved no weights yet; give another")


def _run_settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and set(FROM_RUN) <= set(found) else {}


def run(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        task = make_task(options.task, options.task_options, "held out 0", options.few_shot)
        entries = Stream(task).take(options.prompts, distinct=True)
        policy, tokenizer = load_policy(options.weights)
        check = getattr(policy, "check", None)
        if check is not None:
            check([max((tokenizer.encode(e.question) for e in entries), key=len)], task.max_new)
        start = time.perf_counter()
        parts = measure(policy, tokenizer, task, entries, options)
    except ValueError as error:  # a task's or model's own words for what it cannot take
        raise ConfigError(str(error)) from error
    found = summarize(parts, options, time.perf_counter() - start)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "probe.json").write_text(json.dumps(_plain(found), indent=2) + "\n")
    except OSError as error:
        remedy = "choose another folder"
        raise ConfigError(f"--out: {options.out}: {error.strerror}; {remedy}") from None
    print("\n".join(screen(found, options, draw(parts, found, tokenizer, options))), flush=True)
    return 0


def measure(
    policy: Policy, tokenizer: Tokenizer, task: Task, entries: list[Entry], options: Options
) -> list[Part]:
    prompts = [tokenizer.encode(entry.question) for entry in entries]
    longest = max(map(len, prompts)) + task.max_new
    size = max(1, TOKENS // (options.group * longest))
    show = progress()
    parts: list[Part] = []
    for at in range(0, len(prompts), size):
        some = slice(at, at + size)
        parts.append(measure_part(policy, tokenizer, task, entries[some], prompts[some], at, options))
        show(min(at + size, len(prompts)), len(prompts))
    return parts


def measure_part(
    policy: Policy, tokenizer: Tokenizer, task: Task,
    entries: list[Entry], prompts: list[list[int]], first: int, options: Options,
) -> Part:  # fmt: skip
    group, head = options.group, policy.head()
    rows = len(prompts) * group
    sequence = torch.arange(first * group, first * group + rows)
    rollout = generate(
        policy, prompts, tokenizer.stops, group=group, max_new=task.max_new,
        seed=options.seed, sequence=sequence, temperature=options.temperature,
    )  # fmt: skip
    rewards = torch.tensor(score(task, decode(rollout, tokenizer), entries, rollout))
    rewards = rewards.view(len(prompts), group)
    length = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(group)
    total = int((length + rollout.lengths).max()) - 1  # the last token is not fed
    gram = costate.CostateGram(torch.arange(total) < length[:, None], group)
    module: Any = policy
    embedding = module.embedding if hasattr(module, "embedding") else input_embedding(module)
    fed: list[Tensor] = []
    keep = embedding.register_forward_hook(lambda _, args, out: fed.append(out))
    with costate.probe(module, each=gram) as p:
        hidden = policy.hidden(prompts, rollout.tokens, group, rollout.lengths, shared=False)
        keep.remove()
        mask = rollout.mask
        out = vgkern.linear_token_logprobs(
            hidden, head.weight, rollout.tokens.masked_fill(~mask, -100), bias=head.bias,
            temperature=options.temperature, softcap=head.softcap,
        )  # fmt: skip
        torch.autograd.grad(out.logp.sum(), fed[0], retain_graph=True)
    spread = p.spread
    norms = p.result().norms
    drawn = typical(rewards)
    kept = int(length[drawn] + rollout.lengths[drawn])
    text = prompts[drawn // group] + rollout.tokens[drawn, : rollout.lengths[drawn]].tolist()
    with torch.no_grad():
        noise = vgkern.Noise(options.seed, sequence[:, None], torch.arange(mask.shape[1]))
        again = vgkern.linear_sample(
            hidden, head.weight, noise, bias=head.bias, softcap=head.softcap,
            temperature=options.temperature,
        )  # fmt: skip
        table = fed_table(embedding)
        gap = costate.sampling_gap(
            hidden[mask], head.weight, table, bias=head.bias, softcap=head.softcap,
            temperature=options.temperature,
        )  # fmt: skip
        sums = {
            "entropy": float(out.entropy[mask].double().sum()),
            "gap": float(gap.double().sum()),
            "agree": float((again.token == rollout.tokens)[mask].sum()),
            **hop_products(hidden, out.entropy, fed[0], spread, rollout, length, head, table, options),
        }
        sampler_gap = float((out.logp - rollout.logp)[mask].abs().max())
    row = torch.full((len(norms), kept), torch.nan)
    row[:, : norms.shape[2]] = norms[:, drawn, :kept]
    ...
