"""How few columns carry the gradient of a real model, and what leaving out the others saves.

    python benchmarks/sparse.py --model smollm2
    python benchmarks/sparse.py --model runs/NAME/final --config examples/smollm2_chain_sum.toml

Rows of hidden states: of a text (the Markdown pages of this repository), of the model's own samples
at temperature 1, and with --config of its answers to that task. Advantages are random. For every
tolerance: the share of columns multiplied, the error that `sparse_tol` tells, the true error
against the dense gradient, and the time of forward and backward against three bare GEMMs and the
dense fused loss, interleaved, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import vgkern
from vgkern.tasks import Stream, make_task
from vgkern.train import hf_load
from vgkern.train.config import load_config
from vgkern.train.generate import generate

PROMPTS = (
    "The history of the city begins with", "In mathematics, a prime number is", "def quicksort(",
    "Once upon a time, there was a little", "The most important thing about cooking rice is",
    "Photosynthesis is the process by which", "Dear Sir or Madam,", "The market fell today because",
)  # fmt: skip
CHUNK = 512  # rows of a bare product


def text_rows(policy, tokenizer, rows: int) -> tuple[Tensor, Tensor]:
    pages = sorted(Path(__file__).parent.parent.glob("docs/*.md"))
    ids = tokenizer.encode(" ".join(page.read_text() for page in pages))
    found, length = [], 256
    for start in range(0, rows, length):
        part = ids[start : start + length + 1]
        answer = torch.tensor([part[1:]])
        hidden = policy.hidden([part[:1]], answer, 1, torch.tensor([len(part) - 1]))
        found.append((hidden[0], answer[0]))
    return torch.cat([h for h, _ in found])[:rows], torch.cat([y for _, y in found])[:rows]


def sampled_rows(policy, prompts, stops, group, max_new, rows) -> tuple[Tensor, Tensor]:
    sequence = torch.arange(len(prompts) * group)
    r = generate(policy, prompts, stops, group=group, max_new=max_new, seed=1, sequence=sequence)
    hidden = policy.hidden(prompts, r.tokens, group, r.lengths)
    return hidden[r.mask][:rows], r.tokens[r.mask][:rows]


def medians(variants: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {k: [] for k in variants}
    for i in range(repeat + 1):  # the first round warms up
        for k in list(variants)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            variants[k]()
            seconds[k].append(time.perf_counter() - start)
    return {k: statistics.median(v[1:]) for k, v in seconds.items()}


def measure(name: str, hidden: Tensor, targets: Tensor, head, tols: list[float], repeat: int):
    torch.manual_seed(0)
    h, w = hidden.detach().float(), head.weight.detach().float()
    advantages = torch.randn(len(h))

    def loss(tol: float | None = None) -> tuple[dict, Tensor, Tensor]:
        x, m = h.clone().requires_grad_(), w.detach().requires_grad_()
        out = vgkern.linear_policy_loss(
            x, m, targets, advantages, objective="reinforce", bias=head.bias, softcap=head.softcap,
            sparse_tol=tol, backend="cpu",
        )  # fmt: skip
        return out.metrics, *torch.autograd.grad(out.loss, (x, m))

    logits, dh, dw = torch.empty(CHUNK, len(w)), torch.empty_like(h), torch.zeros_like(w)

    def gemm3() -> None:
        for at in range(0, len(h), CHUNK):
            x = h[at : at + CHUNK]
            z = logits[: len(x)]
            torch.mm(x, w.t(), out=z)
            torch.mm(z, w, out=dh[at : at + CHUNK])
            dw.addmm_(z.t(), x)

    variants: dict[str, Callable[[], object]] = {"gemm3": gemm3, "dense": loss}
    for tol in tols:
        variants[f"{tol:g}"] = lambda tol=tol: loss(tol)  # type: ignore[misc]
    seconds = medians(variants, repeat)
    entropy = vgkern.linear_token_logprobs(h, w, targets, bias=head.bias).entropy.mean()
    dense = {k: f"{seconds[k] / seconds['gemm3']:.2f}" for k in ("dense",)}
    print(
        f"{name}: {len(h)} rows, entropy {float(entropy):.2f} nats, dense {dense['dense']} x gemm3"
    )
    _, want_h, want_w = loss()
    for tol in tols:
        m, got_h, got_w = loss(tol)
        true = [float((g - t).norm() / t.norm()) for g, t in ((got_h, want_h), (got_w, want_w))]
        told = [float(m[f"sparse_error_{k}"]) for k in ("dh", "dw")]
        share = [float(m[f"sparse_columns_{k}"]) for k in ("dh", "dw")]
        took = seconds[f"{tol:g}"] / seconds["gemm3"]
        print(
            f"  sparse_tol {tol:<6g} {took:.2f} x gemm3   columns dh {share[0]:.1%}, "
            f"dW {share[1]:.1%}   error told dh {told[0]:.1e}, dW {told[1]:.1e}   "
            f"true dh {true[0]:.1e}, dW {true[1]:.1e}",
            flush=True,
        )


@torch.no_grad()
def rows_of(args: argparse.Namespace, policy, tokenizer) -> dict[str, tuple[Tensor, Tensor]]:
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    out = {"a text": text_rows(policy, tokenizer, args.rows)}
    group = -(-args.rows // (len(prompts) * 64))
    hidden, answer = out["a text"]
    out["no idea"] = 0.02 * hidden, answer  # nearly uniform: nothing can be left out
    out["own samples"] = sampled_rows(policy, prompts, (), group, 64, args.rows)
    if args.config:
        c = load_config(["--config", args.config])
        task = make_task(c.task, c.options, "sparse", c.few_shot)
        asked = [tokenizer.encode(e.question) for e in Stream(task).take(args.rows // 64)]
        out[c.task] = sampled_rows(policy, asked, tokenizer.stops, 24, task.max_new, args.rows)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2", help="as of `vgkern train --model`")
    p.add_argument("--config", help="a training config: rows of answers to its task as well")
    p.add_argument("--rows", type=int, default=1024)
    p.add_argument("--tol", type=float, nargs="+", default=[5e-3, 2e-3])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeat", type=int, default=5)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    policy, tokenizer = hf_load.load(args.model)
    for name, (hidden, targets) in rows_of(args, policy, tokenizer).items():
        measure(name, hidden, targets, policy.head(), args.tol, args.repeat)


if __name__ == "__main__":
    main()
