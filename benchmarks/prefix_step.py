"""How much the update gains when each distinct prefix is forwarded once, and that it is exact.

    python benchmarks/prefix_step.py --model runs/sort/start
    python benchmarks/prefix_step.py --config examples/smollm2_chain_sum.toml --prompts 8

One batch is sampled; then its update (forward, fused loss, backward) runs with every sample
forwarded in full and with prefixes shared, interleaved A B B A, medians. Compare within one run.
"""

import argparse
import statistics
import time

import torch

from vgkern.train.config import Config, load_config
from vgkern.train.run import build


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--config", default="")
    p.add_argument("--model", default="", help="weights to start from")
    p.add_argument("--prompts", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeat", type=int, default=4)
    a = p.parse_args()
    flags = ["--model", a.model] if a.model else []
    flags += ["--prompts", str(a.prompts), "--threads", str(a.threads), "--eval-prompts", "8"]
    config: Config = load_config([*(["--config", a.config] if a.config else []), *flags])
    torch.set_num_threads(config.threads)
    trainer, _, _ = build(config)
    _, prompts, rollout = trainer.sample(1)
    torch.manual_seed(0)
    advantages = torch.randn(len(rollout.lengths))  # as if no group had zero variance
    forward = trainer.policy.hidden
    parameters = [q for q in trainer.policy.parameters() if q.requires_grad]

    def update(shared: bool) -> tuple[float, torch.Tensor]:
        trainer.policy.hidden = lambda *where: forward(*where, shared=shared)
        trainer.optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        part = (prompts, rollout, advantages, trainer.normalizer(rollout))
        loss, _ = trainer.parts.loss(*part, first_pass=True)
        loss.backward()
        seconds = time.perf_counter() - start
        grad = torch.cat([q.grad.flatten() for q in parameters if q.grad is not None])
        return seconds, grad

    _, plain = update(False)
    _, tree = update(True)
    error = float((tree - plain).norm() / plain.norm())
    del plain, tree
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for i in range(a.repeat):
        for shared in (False, True) if i % 2 == 0 else (True, False):
            seconds[shared].append(update(shared)[0])
    full, once = (statistics.median(seconds[k]) for k in (False, True))
    tokens = sum(map(len, prompts)) * config.group + int(rollout.lengths.sum())
    print(f"{config.task}, {a.prompts} prompts x {config.group} samples, {config.threads} threads")
    print(f"  tokens if every sample is forwarded in full  {tokens}")
    print(f"  update, every sample in full                 {1e3 * full:.0f} ms")
    print(f"  update, each prefix once                     {1e3 * once:.0f} ms")
    print(f"  ratio {full / once:.2f}, gradients differ by {error:.1e} (relative norm)")


if __name__ == "__main__":
    main()
