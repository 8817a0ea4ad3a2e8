"""Cases of the log-probability ops."""

import math
from typing import Any

import torch

from vgkern.case_inputs import Inputs, costates, head, of_rows
from vgkern.cases._case import Case, costate_flops, head_bytes, nhv, size


def token_logprobs(name: str, shape: tuple[int, ...], v: int, **kw: Any) -> Case:
    ignore = kw.pop("ignore", False)

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, 16, v, torch.float32, seed, **kw)
        logits = x.pop("hidden") @ x.pop("weight").T
        bias = x.pop("bias", None)
        x["logits"] = (logits if bias is None else logits + bias).to(dtype)
        if ignore:
            x["targets"].reshape(-1)[1::3] = -100
        return x

    return Case(
        name,
        "token_logprobs",
        make,
        lambda x: 8 * x["logits"].numel(),
        lambda x: 3 * size(x["logits"]),
        ("logits",),
    )


def linear_token_logprobs(name: str, shape: tuple[int, ...], h: int, v: int, **kw: Any) -> Case:
    ignore = kw.pop("ignore", False)
    carried = kw.pop("costate", None)  # options of case_inputs.costates
    cut: Inputs = {k: kw.pop(k) for k in ("top_k", "top_p", "min_p") if k in kw}
    if kw.get("temperature") == "per row":
        cut["temperature"] = kw.pop("temperature")

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, h, v, dtype, seed, **kw)
        if ignore:
            x["targets"].reshape(-1)[:: 1 if ignore == "all" else 3] = -100
        if carried is not None:
            x["costate"] = costates(x, seed, **carried)
        return {**x, **{k: of_rows(k, shape) if c == "per row" else c for k, c in cut.items()}}

    return Case(
        name,
        "linear_token_logprobs",
        make,
        lambda x: 8 * math.prod(nhv(x)) + costate_flops(x),
        lambda x: head_bytes(x, 2),
        ("hidden", "weight", "bias"),
    )


CASES: tuple[Case, ...] = (
    token_logprobs("v1", (5,), 1),
    token_logprobs("v2", (7,), 2),
    token_logprobs("v3", (4,), 3),
    token_logprobs("v31-3d", (3, 5), 31),
    token_logprobs("v33-temperature", (6,), 33, temperature=0.7),
    token_logprobs("v1000-softcap", (13,), 1000, softcap=4.0),
    token_logprobs("v1035-ignore", (11,), 1035, ignore=True),
    token_logprobs("one-row", (1,), 1035),
    token_logprobs("zero-rows", (0,), 33),
    token_logprobs("peaked", (12,), 1000, peaked=True),
    token_logprobs("blocked", (9,), 1000, bias="blocked", temperature=1.3),
    linear_token_logprobs("h1-v1", (5,), 1, 1),
    linear_token_logprobs("h7-v2", (7,), 7, 2),
    linear_token_logprobs("h64-v3", (3,), 64, 3),
    linear_token_logprobs("h7-v31-3d", (3, 5), 7, 31, bias="plain"),
    linear_token_logprobs("h64-v33", (12,), 64, 33, temperature=0.7),
    linear_token_logprobs("h64-v1000-ignore", (40,), 64, 1000, ignore=True),
    linear_token_logprobs("h123-v1035-all", (33,), 123, 1035, bias="plain", temperature=1.3,
                          softcap=6.0, ignore=True),
    linear_token_logprobs("one-row", (1,), 123, 1035, bias="plain"),
    linear_token_logprobs("zero-rows", (0,), 7, 33),
    linear_token_logprobs("all-ignored", (6,), 7, 33, ignore="all"),
    linear_token_logprobs("peaked", (12,), 64, 1000, peaked=True),
    linear_token_logprobs("blocked", (9,), 64, 1000, bias="blocked"),
    linear_token_logprobs("blocked-softcap", (9,), 64, 1000, bias="blocked", softcap=5.0),
    linear_token_logprobs("per-row-temperature", (3, 4), 64, 1000, temperature="per row"),
    linear_token_logprobs("top-k", (6,), 64, 1000, top_k=30),
    linear_token_logprobs("top-p", (6,), 64, 1000, top_p=0.8, temperature=0.75),
    linear_token_logprobs("min-p", (7,), 64, 1035, min_p=0.05, softcap=6.0),
    linear_token_logprobs("all-cuts", (6,), 123, 1035, top_k=200, top_p=0.95, min_p=0.01,
                          bias="blocked", ignore=True),
    linear_token_logprobs("per-row-cuts", (6,), 64, 1000, top_k=60, top_p=0.9,
                          temperature="per row", ignore=True),
    linear_token_logprobs("cuts-of-each-row", (2, 5), 64, 1000, top_k="per row", top_p="per row",
                          min_p="per row", temperature="per row", bias="blocked", ignore=True),
    linear_token_logprobs("peaked-top-p", (4,), 64, 1000, peaked=True, top_p=0.9999),
    linear_token_logprobs("zero-rows-cut", (0,), 7, 33, top_k=3),
    linear_token_logprobs("costate-h7-v31-3d", (3, 5), 7, 31, bias="plain", costate={"he": 5}),
    linear_token_logprobs("costate-all", (33,), 123, 1035, bias="plain", temperature=1.3,
                          softcap=6.0, ignore=True, costate={"he": 50, "relaxation": "gumbel",
                                                             "tau": 1.7, "weight": -0.6}),
    linear_token_logprobs("costate-tied-gumbel", (9,), 64, 1000, bias="blocked",
                          costate={"tied": True, "relaxation": "gumbel"}),
    linear_token_logprobs("costate-peaked", (12,), 64, 1000, peaked=True,
                          costate={"relaxation": "gumbel"}),
    linear_token_logprobs("costate-zero-rows", (0,), 7, 33, costate={}),
)  # fmt: skip

BENCH: tuple[Case, ...] = (
    token_logprobs("1024x8192", (1024,), 8192),
    linear_token_logprobs("2048x256x8192", (2048,), 256, 8192),
    linear_token_logprobs("1024x576x49152", (1024,), 576, 49152),
    linear_token_logprobs("1024x576x49152-cuts", (1024,), 576, 49152, top_k=50, top_p=0.95),
)  # fmt: skip
