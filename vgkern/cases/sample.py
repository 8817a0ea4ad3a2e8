"""Cases of the sampler."""

import math
from typing import Any

import torch

from vgkern.case_inputs import Inputs, head, of_rows
from vgkern.cases._case import Case, nhv, size
from vgkern.ops.noise import Noise


def linear_sample(name: str, shape: tuple[int, ...], h: int, v: int, **kw: Any) -> Case:
    cut: Inputs = {k: kw.pop(k) for k in ("top_k", "top_p", "min_p", "temperature") if k in kw}

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, h, v, dtype, seed, **kw)
        del x["targets"]
        x["noise"] = Noise(seed, torch.arange(math.prod(shape)).reshape(shape), torch.tensor(seed))
        return {**x, **{k: of_rows(k, shape) if c == "per row" else c for k, c in cut.items()}}

    return Case(
        name,
        "linear_sample",
        make,
        lambda x: 2 * math.prod(nhv(x)) + 40 * nhv(x)[0] * nhv(x)[2],
        lambda x: size(x["hidden"], x["weight"]),
    )


CASES: tuple[Case, ...] = (
    linear_sample("h1-v1", (5,), 1, 1),
    linear_sample("h7-v31", (9,), 7, 31),
    linear_sample("h123-v1035-3d", (3, 5), 123, 1035, bias="plain"),
    linear_sample("temperature", (16,), 64, 1000, temperature=0.625),
    linear_sample("per-row-temperature", (16,), 64, 1000, temperature="per row"),
    linear_sample("greedy", (9,), 64, 1000, temperature=0.0),
    linear_sample("blocked", (16,), 64, 33, bias="blocked"),
    linear_sample("blocked-softcap", (16,), 64, 33, bias="blocked", softcap=5.0),
    linear_sample("top-k", (16,), 64, 1000, top_k=7),
    linear_sample("top-p", (16,), 64, 1000, top_p=0.8),
    linear_sample("min-p", (16,), 64, 1000, min_p=0.05),
    linear_sample("all-cuts", (16,), 64, 1035, top_k=50, top_p=0.9, min_p=0.02, temperature=0.875),
    linear_sample("per-row-cuts", (16,), 64, 1000, top_k=20, top_p=0.9, temperature="per row"),
    linear_sample("cuts-of-each-row", (16,), 64, 1000, top_k="per row", top_p="per row",
                  min_p="per row", temperature="per row"),
    linear_sample("zero-rows", (0,), 7, 33),
)  # fmt: skip

BENCH: tuple[Case, ...] = (
    linear_sample("64x576x49152", (64,), 576, 49152),
)  # fmt: skip
