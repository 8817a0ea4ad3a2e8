"""Cases of the ops that hold two vocabularies at once: noisy_embedding and linear_divergence."""

import math
from typing import Any

import torch

from vgkern.case_inputs import Inputs, head, padding
from vgkern.cases._case import Case, nhv, size
from vgkern.ops.noise import Noise

DIVERGENCE = ("kind", "temperature", "softcap", "teacher_softcap")  # its options


def noisy_embedding(
    name: str, shape: tuple[int, ...], h: int, v: int, he: int = 0, **kw: Any
) -> Case:
    options: Inputs = {k: kw.pop(k) for k in ("relaxation", "tau") if k in kw}

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, h, v, dtype, seed, **kw)
        x["tokens"] = x.pop("targets")
        g = torch.Generator().manual_seed(seed + 1)
        x["embedding"] = torch.randn(v, he or h, generator=g).to(dtype)
        if options.get("relaxation") != "expected":
            ids = torch.arange(math.prod(shape)).reshape(shape) + 2**33
            x["noise"] = Noise(2**64 - 1 - seed, ids, torch.tensor(seed))
        return {**x, **options}

    def flops(x: Inputs) -> int:  # logits, dh, dW; u = E dx
        n, h, v = nhv(x)
        return 6 * n * h * v + 2 * n * v * x["embedding"].shape[1]

    def bytes_(x: Inputs) -> int:  # each read once, each gradient written once, x out and dx in
        n, out = nhv(x)[0], x["embedding"].shape[1]
        rows = 2 * n * out * x["embedding"].element_size()
        return 2 * size(x["hidden"], x["weight"], x["embedding"]) + rows

    grads = ("hidden", "weight", "bias", "embedding")
    return Case(name, "noisy_embedding", make, flops, bytes_, grads)


def linear_divergence(
    name: str, shape: tuple[int, ...], h: int, v: int, ht: int = 0, **kw: Any
) -> Case:
    """`near`: the teacher is the student, moved by that much of its own size."""
    near, masked = kw.pop("near", None), kw.pop("mask", False)
    options: Inputs = {k: kw.pop(k) for k in DIVERGENCE if k in kw}

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, h, v, dtype, seed, **kw)
        del x["targets"]
        t, _, _ = head(shape, ht or h, v, dtype, seed + 1, **kw)
        x["teacher_hidden"], x["teacher_weight"] = t["hidden"], t["weight"]
        if near is not None:
            for k in ("hidden", "weight"):
                moved = torch.lerp(x[k].float(), t[k].float(), near)
                x[f"teacher_{k}"] = moved.to(dtype)
        if masked:
            b, t_max = shape
            x["mask"] = padding(b, t_max, seed)
            for k in ("hidden", "teacher_hidden"):  # a mask has to win over anything
                x[k] = x[k].masked_fill(~x["mask"][..., None], 1e30 if dtype.itemsize > 2 else 9e3)
        return {**x, **options}

    def flops(x: Inputs) -> int:  # both logits twice, dh, dW
        n, h, v = nhv(x)
        return 8 * n * h * v + 4 * n * v * x["teacher_weight"].shape[1]

    def bytes_(x: Inputs) -> int:  # two passes over all, the student's gradients written once
        student = size(x["hidden"], x["weight"])
        return 3 * student + 2 * size(x["teacher_hidden"], x["teacher_weight"])

    return Case(name, "linear_divergence", make, flops, bytes_, ("hidden", "weight"))


CASES: tuple[Case, ...] = (
    noisy_embedding("h1-v1", (5,), 1, 1),
    noisy_embedding("h7-v2", (7,), 7, 2),
    noisy_embedding("h7-v31-3d", (3, 5), 7, 31, bias="plain"),
    noisy_embedding("h64-v33-tau", (12,), 64, 33, tau=0.5),
    noisy_embedding("h64-v1000-expected", (40,), 64, 1000, relaxation="expected"),
    noisy_embedding("h123-v1035-all", (33,), 123, 1035, 50, bias="plain", temperature=1.3,
                    softcap=6.0, tau=1.7),
    noisy_embedding("expected-all", (17,), 31, 257, 9, bias="plain", temperature=0.7, softcap=6.0,
                    relaxation="expected"),
    noisy_embedding("one-row", (1,), 123, 1035),
    noisy_embedding("zero-rows", (0,), 7, 33),
    noisy_embedding("peaked", (12,), 64, 1000, peaked=True),
    noisy_embedding("peaked-expected", (12,), 64, 1000, peaked=True, relaxation="expected"),
    noisy_embedding("blocked", (9,), 64, 1000, bias="blocked", tau=0.7),
    noisy_embedding("blocked-softcap", (9,), 64, 1000, bias="blocked", softcap=5.0),
    linear_divergence("h1-v1", (5,), 1, 1),
    linear_divergence("h7-v2-jsd", (7,), 7, 2, kind="jsd"),
    linear_divergence("h7-v31-3d", (3, 5), 7, 31, 12, kind="forward_kl"),
    linear_divergence("h64-v1000-forward", (40,), 64, 1000, kind="forward_kl", temperature=1.3),
    linear_divergence("h123-v1035-reverse", (33,), 123, 1035, 50, temperature=0.7),
    linear_divergence("h123-v1035-jsd", (33,), 123, 1035, 50, kind="jsd", temperature=0.7),
    linear_divergence("near-forward", (24,), 64, 1000, near=0.02, kind="forward_kl"),
    linear_divergence("near-reverse", (24,), 64, 1000, near=0.02),
    linear_divergence("near-jsd", (24,), 64, 1000, near=0.02, kind="jsd"),
    linear_divergence("peaked-forward", (12,), 64, 1000, peaked=True, kind="forward_kl"),
    linear_divergence("peaked-reverse", (12,), 64, 1000, peaked=True),
    linear_divergence("peaked-near-jsd", (12,), 64, 1000, peaked=True, near=0.05, kind="jsd"),
    linear_divergence("masked", (5, 7), 64, 257, mask=True),
    linear_divergence("masked-jsd", (5, 7), 64, 257, mask=True, kind="jsd"),
    linear_divergence("softcaps-reverse", (33,), 123, 1035, 50, temperature=0.7, softcap=3.0,
                      teacher_softcap=5.0),
    linear_divergence("softcap-forward", (24,), 64, 1000, kind="forward_kl", softcap=4.0),
    linear_divergence("softcaps-near-jsd", (24,), 64, 1000, near=0.02, kind="jsd", softcap=6.0,
                      teacher_softcap=6.0),
    linear_divergence("teacher-softcap", (5, 7), 64, 257, mask=True, temperature=1.3,
                      teacher_softcap=2.0),
    linear_divergence("one-row", (1,), 123, 1035),
    linear_divergence("zero-rows", (0,), 7, 33),
)  # fmt: skip

BENCH: tuple[Case, ...] = (
    noisy_embedding("1024x576x49152", (1024,), 576, 49152),
    linear_divergence("1024x576x49152", (1024,), 576, 49152),
)  # fmt: skip
