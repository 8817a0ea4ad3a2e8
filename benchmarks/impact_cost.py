"""What `python -m vgkern impact` costs, in steps of RL on as many samples.

    python benchmarks/impact_cost.py                      # the demo's decoder, 64 prompts x 8
    python benchmarks/impact_cost.py --model runs/sort/final --task sort
    python benchmarks/impact_cost.py --shape 135m --prompts 8   # a random model of SmolLM2's shape

Random weights answer nothing rightly, so rewards are dealt at random there: every prompt is used,
the most that it can cost. A step is sampling, forward, backward and optimizer; both are timed in
turn, and medians divided. Compare within one run.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

import vgkern
from vgkern.costate import impact
from vgkern.train.checkpoint import find, load_policy, new_policy
from vgkern.train.config import Config
from vgkern.train.generate import generate
from vgkern.train.policy import encode
from vgkern.train.prompt_costates import depth, prompt_costates
from vgkern.train.run import entries_of, make_task


def of_shape(prompts: int, length: int) -> tuple[Any, list[list[int]], tuple[int, ...]]:
    """SmolLM2-135M's shape with random weights; random prompts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from vgkern.train.hf import HFPolicy

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    ids = torch.randint(3, 49152, (prompts, length), generator=torch.Generator().manual_seed(0))
    return HFPolicy(LlamaForCausalLM(config)), ids.tolist(), (0,)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="", help="weights; empty: new ones of the demo's size")
    p.add_argument("--task", default="sort")
    p.add_argument("--shape", choices=("135m",), help="a random model of that shape instead")
    p.add_argument("--length", type=int, default=40, help="prompt tokens, with --shape (40)")
    p.add_argument("--answer", type=int, default=16, help="answer tokens, with --shape (16)")
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--json", metavar="FILE")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.shape:
        policy, prompts, stops = of_shape(a.prompts, a.length)
        room = a.answer
    else:
        policy, tokenizer = load_policy(find(a.model)[0]) if a.model else new_policy(Config())
        task = make_task(a.task, {}, "held out 0")
        prompts = [encode(tokenizer, e.question) for e in entries_of(task, a.prompts)]
        stops, room = tokenizer.stops, task.max_new
    optimizer = torch.optim.AdamW(policy.parameters(), 0.0, weight_decay=0.0, fused=True)
    advantages = torch.randn(a.prompts * a.group, generator=torch.Generator().manual_seed(1))
    layers = depth(policy)
    layer = (layers + 1) // 2
    sequence = torch.arange(a.prompts * a.group)
    seconds: dict[str, list[float]] = {"sample": [], "update": [], "costates": []}
    tokens = 0.0

    def timed(name: str, start: float) -> None:
        seconds[name].append(time.perf_counter() - start)

    for seed in range(a.repeat + 1):  # the first warms up
        start = time.perf_counter()
        rollout = generate(policy, prompts, stops, group=a.group, max_new=room, seed=seed,
                           sequence=sequence)  # fmt: skip
        timed("sample", start)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        head = policy.head()
        hidden = policy.hidden(prompts, rollout.tokens, a.group, rollout.lengths)
        vgkern.linear_policy_loss(
            hidden, head.weight, rollout.tokens, advantages, bias=head.bias, mask=rollout.mask
        ).loss.backward()
        optimizer.step()
        timed("update", start)
        start = time.perf_counter()
        prompt_costates(policy, prompts, rollout, a.group, layer)
        timed("costates", start)
        tokens = float(rollout.lengths.double().mean())
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    step = median["sample"] + median["update"]
    paid = median["sample"] + median["costates"]
    length = sum(map(len, prompts)) / len(prompts)
    price = impact.price(length, tokens, a.prompts, a.group, 1 - layer / layers)
    found = {**{f"{k}_ms": 1e3 * v for k, v in median.items()}, "prompt_tokens": length,
             "answer_tokens": tokens, "of_200_steps": paid / (200 * step),
             "of_200_steps_by_arithmetic": price.share(200)}  # fmt: skip
    print(f"{a.prompts} prompts x {a.group}, {length:.1f} + {tokens:.1f} tokens, layer {layer} of "
          f"{layers}, {a.threads} thread(s)")  # fmt: skip
    for name, value in median.items():
        print(f"  {name:<10}{1e3 * value:10.1f} ms")
    share = f"{paid / (200 * step):.2%} of 200 steps; by arithmetic {price.share(200):.2%}"
    print(f"  impact / step {paid / step:.2f}: {share}")
    if a.json:
        with open(a.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
