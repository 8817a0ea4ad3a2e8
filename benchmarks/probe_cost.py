"""What `vgkern.costate.probe` adds to a training step of the demo model.

    python benchmarks/probe_cost.py                                 # a new model of the demo's size
    python benchmarks/probe_cost.py --model runs/sort/final

One batch is sampled; its update (forward, fused loss, backward, optimizer) runs with and without
the probe, interleaved A B B A, medians; a whole step is that and the sampling of the batch.
Compare within one run.
"""

import argparse
import contextlib
import json
import statistics
import time

import torch

from vgkern import costate
from vgkern.train.config import load_config
from vgkern.train.run import build


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="", help="weights; empty: new ones of the demo's size")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeat", type=int, default=12, help="pairs of updates")
    p.add_argument("--json", metavar="FILE")
    a = p.parse_args()
    flags = ["--model", a.model] if a.model else []
    config = load_config([*flags, "--threads", str(a.threads), "--eval-prompts", "8"])
    torch.set_num_threads(a.threads)
    trainer, _, _ = build(config)
    start = time.perf_counter()
    _, prompts, rollout = trainer.sample(1)
    _, prompts, rollout = trainer.sample(2)
    sampling = (time.perf_counter() - start) / 2
    torch.manual_seed(0)
    advantages = torch.randn(len(rollout.lengths))  # as if no group had zero variance
    modes = {
        "off": contextlib.nullcontext,
        "norms": lambda: costate.probe(trainer.policy),
        "norms again": lambda: costate.probe(trainer.policy),  # the noise of this measurement
    }

    def update(mode: str) -> float:
        start = time.perf_counter()
        trainer.optimizer.zero_grad(set_to_none=True)
        with modes[mode]() as p:
            part = (prompts, rollout, advantages, trainer.normalizer(rollout))
            loss, _ = trainer.parts.loss(*part, first_pass=True)
            loss.backward()
        if p is not None:
            norms = p.result().norms
            assert norms.isfinite().all() and norms.any()
        trainer.optimizer.step()
        return time.perf_counter() - start

    for mode in modes:
        update(mode)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for i in range(a.repeat):
        for mode in list(modes) if i % 2 == 0 else list(modes)[::-1]:
            seconds[mode].append(update(mode))
    median = {mode: statistics.median(values) for mode, values in seconds.items()}
    print(f"{config.prompts} prompts x {config.group} samples, {a.threads} thread(s)")
    print(f"  sampling one batch           {1e3 * sampling:8.1f} ms")
    found = {}
    for mode, value in median.items():
        extra = value - median["off"]
        found[mode] = {"ms": 1e3 * value, "of_update": extra / median["off"],
                       "of_step": extra / (median["off"] + sampling)}  # fmt: skip
        of = [f"{100 * found[mode][whole]:+5.1f} %" for whole in ("of_update", "of_step")]
        cost = f"{of[0]} of the update, {of[1]} of the step"
        print(f"  update, probe {mode:<12}{1e3 * value:8.1f} ms   {cost}")
    if a.json:
        with open(a.json, "w") as file:
            json.dump(
                {"threads": a.threads, "sampling_ms": 1e3 * sampling, **found}, file, indent=2
            )


if __name__ == "__main__":
    main()
