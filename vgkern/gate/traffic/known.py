"""Calls that are over a bar, and why: each may be so far over it and no further.

A line here is a debt: the gate fails where a call exceeds it, and where it is paid. Bytes are given
as the ratio to the minimum.
"""

from typing import NamedTuple

from vgkern.gate.traffic.calls import Call


class Known(NamedTuple):
    ratio: float | None  # None: within the bar, as for the other two
    launches: int | None
    peak: float | None  # GiB
    why: list[str]


# each line: the call, its backend (or any), how much
BYTES = {
    "backend cuda makes no tile of logits: they pass through memory in fp32": """
        linear_policy_loss full 8192x576x49152 cuda 2.64
        linear_policy_loss frozen 8192x576x49152 cuda 3.59
        linear_policy_loss full 1024x256x512 cuda 1.83
        linear_policy_loss frozen 1024x256x512 cuda 1.87
        linear_token_logprobs fwd 8192x4096x131072 cuda 3.29
        linear_token_logprobs both 8192x4096x131072 cuda 1.25
        linear_token_logprobs fwd 8192x576x49152 cuda 49.66
        linear_token_logprobs both 8192x576x49152 cuda 3.52
    """,
    "hidden streams by in four parts, not three: 0.4 ms of bytes behind 11 ms of flops": """
        linear_token_logprobs fwd 8192x4096x131072 triton 1.34
    """,
    "48 parts of the vocabulary leave statistics of each row: 4 us behind 0.6 ms": """
        linear_token_logprobs fwd 8192x576x49152 triton 1.21
    """,
    "backend cuda finds a cut by eight tries a walk: 26 walks over each row": """
        linear_token_logprobs truncated 8192x576x49152 cuda 6.77
        linear_sample truncated 64x4096x131072 cuda 1.66
        linear_sample truncated 256x4096x131072 cuda 2.85
        linear_sample truncated 64x576x49152 cuda 3.53
        linear_sample truncated 256x576x49152 cuda 4.92
    """,
    "a walk of its own for the score; backward finds cut and score again": """
        linear_token_logprobs truncated 8192x576x49152 triton 1.71
        linear_sample truncated 256x4096x131072 triton 1.16
        linear_sample truncated 64x576x49152 triton 1.22
        linear_sample truncated 256x576x49152 triton 1.34
    """,
    "the score is a walk of its own, for the bits of linear_token_logprobs": """
        linear_sample plain 256x576x49152 any 1.33
    """,
    "row weights take six passes, outputs without a gradient get zeros for one": """
        policy_loss grpo 256x4096 any 4.47
        policy_loss gspo 256x4096 any 4.46
    """,
    "backward makes the mean of the gradient again, so that it sums to 0 whatever the rounding": """
        linear_divergence both 8192x576x49152x960 triton 1.17
    """,
}
LAUNCHES = {
    "dead rows and stray targets are seen to by operators of torch on backend cuda": """
        linear_policy_loss full 8192x4096x131072 cuda 39
        linear_policy_loss frozen 8192x4096x131072 cuda 33
        linear_policy_loss full 8192x576x49152 cuda 35
        linear_policy_loss frozen 8192x576x49152 cuda 30
        linear_policy_loss full 1024x256x512 cuda 32
        linear_policy_loss frozen 1024x256x512 cuda 27
        linear_policy_loss half-live 8192x4096x131072 cuda 43
    """,
    "which rows are alive is made out, looked at or not, and the others are left out": """
        linear_policy_loss half-live 8192x4096x131072 triton 34
    """,
    "targets out of range take six operators, rows without a gradient as many": """
        linear_token_logprobs fwd 8192x4096x131072 triton 14
        linear_token_logprobs fwd 8192x4096x131072 cuda 19
        linear_token_logprobs both 8192x4096x131072 triton 45
        linear_token_logprobs both 8192x4096x131072 cuda 50
        linear_token_logprobs fwd 8192x576x49152 triton 14
        linear_token_logprobs fwd 8192x576x49152 cuda 17
        linear_token_logprobs both 8192x576x49152 triton 41
        linear_token_logprobs both 8192x576x49152 cuda 44
        linear_token_logprobs truncated 8192x576x49152 triton 42
        linear_token_logprobs truncated 8192x576x49152 cuda 40
        token_logprobs fwd 8192x131072 any 8
        token_logprobs both 8192x131072 any 11
    """,
    "row weights take six operators, outputs without a gradient get zeros for one": """
        policy_loss grpo 256x4096 any 14
        policy_loss gspo 256x4096 any 14
    """,
    "the ends of the groups are searched, and their rewards gathered, before the kernel": """
        group_advantages grpo 512 triton 8
    """,
    "masks and coefficients of the rows are operators of torch": """
        noisy_embedding both 8192x576x49152 triton 59
        noisy_embedding both 8192x576x49152 cuda 61
        linear_divergence fwd 8192x576x49152x960 triton 16
        linear_divergence both 8192x576x49152x960 triton 54
    """,
}
PEAK: dict[str, str] = {}


def known(call: Call, backend: str) -> Known:
    keys = (f"{call.name} {backend}", f"{call.name} any")
    why: list[str] = []

    def find(table: dict[str, str]) -> float | None:
        for reason, lines in table.items():
            for line in lines.strip().splitlines():
                name, _, amount = line.strip().rpartition(" ")
                if name in keys:
                    why.append(reason)
                    return float(amount)
        return None

    ratio, launches, peak = find(BYTES), find(LAUNCHES), find(PEAK)
    return Known(ratio, None if launches is None else int(launches), peak, why)


def names() -> set[str]:
    """`call backend` of every line, the backend `any` included."""
    tables = (BYTES, LAUNCHES, PEAK)
    texts = [line for t in tables for text in t.values() for line in text.strip().splitlines()]
    return {line.strip().rpartition(" ")[0] for line in texts}
