"""What a hop costs: the model and the batch of `make train`, every sample forwarded in full.

    python benchmarks/costate_hops.py

One hop (`Hops` pull: third term of the row gradient, then an activation-only backward) against one
ordinary backward of the fused policy loss with all its weight gradients; and a whole update with K
= 0, 1, 2 hops of an entropy objective fused into it. Interleaved, medians; ratios within one run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import vgkern
from vgkern import costate
from vgkern.train.config import Config
from vgkern.train.model import Decoder, Shape


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=24, help="tokens of a sequence, prompt included")
    p.add_argument("--prompt", type=int, default=12)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeat", type=int, default=7)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    c = Config()
    b, rows = c.prompts * c.group, a.length - 1
    model = Decoder(Shape(48, c.width, c.layers, c.heads, c.mlp, c.context), [0], c.seed)
    ids = torch.randint(1, 48, (b, a.length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(rows) >= a.prompt - 1).expand(b, -1)
    advantages = torch.randn(b, generator=torch.Generator().manual_seed(1))
    noise = vgkern.Noise(0, torch.arange(b)[:, None], torch.arange(rows))

    def forward() -> costate.TeacherForced:
        model.zero_grad()
        return costate.teacher_forced(model, ids, mask)

    def score(run: costate.TeacherForced) -> torch.Tensor:
        rows = run.hidden[:, :-1]
        return vgkern.linear_policy_loss(
            rows, run.weight, run.tokens, advantages, bias=run.bias, mask=run.mask
        ).loss

    def entropy(run: costate.TeacherForced) -> torch.Tensor:
        rows = run.hidden[:, :-1]
        y = run.tokens.where(run.mask, -100)
        lp = vgkern.linear_token_logprobs(rows, run.weight, y, bias=run.bias)
        return -lp.entropy.sum() / mask.sum()

    seconds: dict[str, list[float]] = {}

    def clock(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        out = call()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return out

    def backward() -> None:
        run = clock("forward", forward)
        loss = score(run)
        clock("backward", loss.backward)

    def hop(relaxation: str) -> None:
        run = forward()
        options = {"relaxation": relaxation, "noise": noise, "agreement": 0.0}
        h = run.hops(entropy(run), 1, **options)
        clock(f"hop, {relaxation}", lambda: h._link.pull(h.value))

    def update(k: int) -> None:
        run = forward()
        loss = entropy(run)
        run.hops(loss, k).backward(score(run), weight=0.1)

    for i in range(a.repeat + 1):
        backward()
        hop("expected")
        backward()
        hop("gumbel")
        for k in (0, 1, 2):
            clock(f"update, K = {k}", lambda k=k: update(k))  # type: ignore[misc]
        if i == 0:
            seconds.clear()  # warm-up
    median = {name: statistics.median(t) for name, t in seconds.items()}
    print(f"{b} sequences of {a.length} tokens, {a.threads} thread(s), torch {torch.__version__}")
    for name, t in median.items():
        print(f"  {name:<16} {1e3 * t:7.1f} ms   {t / median['backward']:.2f} of a backward")
    for k in (1, 2):
        more = median[f"update, K = {k}"] / median["update, K = 0"]
        print(f"  an update with K = {k} takes {more:.2f} times one with K = 0")


if __name__ == "__main__":
    main()
