"""What is timed: one op at one shape, and the models of its cost.

Bytes and flops of forward and backward together are those of `vgkern.cases`: what an ideal kernel
does. Forward alone: every input read once and every output written once; one product with each
head; half the flops of ops without one.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.cases import BENCH, continuous, embedding, logprobs, policy, sample

Inputs = dict[str, Any]
FWD, BOTH = "fwd", "fwd+bwd"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_O = objectives.DAPO.replace(advantage="none")
HEADS = {  # ops with a head: inputs by shape; the case gives the model of their cost
    "linear_policy_loss": policy.linear_policy_loss("", (1, 1), 1, 1, _O),
    "linear_token_logprobs": logprobs.linear_token_logprobs("", (1,), 1, 1),
    "linear_sample": sample.linear_sample("", (1,), 1, 1),
    "token_logprobs": logprobs.token_logprobs("", (1,), 1),
    "linear_divergence": embedding.linear_divergence("", (1,), 1, 1),
    "noisy_embedding": embedding.noisy_embedding("", (1,), 1, 1),
}
CASES = {(c.op, c.name): c for c in BENCH if c.op not in HEADS}
assert continuous  # its cases are in BENCH
OPS = (*HEADS, *dict.fromkeys(op for op, _ in CASES))
# Leading outputs that get a gradient: the entropy beside a log-prob is a metric.
DIFFERENTIATED = {"gaussian_action": 2, "linear_sample": 0, "group_advantages": 0}
PRODUCTS = {  # that no exact kernel can avoid: (fwd, fwd+bwd), each 2 N H V
    "linear_policy_loss": (1, 3), "linear_token_logprobs": (1, 3), "linear_sample": (1, 1),
    "linear_divergence": (2, 4), "noisy_embedding": (0, 4),
}  # fmt: skip
CHUNK, CHUNK_LARGE, LARGE = 512, 256, 20000  # rows of a block of logits, by vocabulary


@dataclass(frozen=True)
class Work:
    op: str
    shape: str  # of shapes.MODELS, or the name of a case
    dtype: str  # of DTYPES
    pass_: str = BOTH
    rows: int = 0
    rows_of: int = 0  # before they were cut
    cut: str = ""  # why
    hidden: int = 0
    vocab: int = 0
    share: float = 1.0  # of rows that are active
    sweep: str = ""  # the plot that it is a point of

    def __str__(self) -> str:
        size = f" {self.rows}x{self.hidden}x{self.vocab}" if self.vocab else ""
        active = f" {self.share:.0%} active" if self.share < 1 else ""
        return f"{self.op} {self.shape}{size} {self.dtype} {self.pass_}{active}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def case(self) -> Any:
        return HEADS.get(self.op) or CASES[self.op, self.shape]

    @property
    def passes(self) -> tuple[str, ...]:
        return (FWD, BOTH) if differentiated(self.op) else (FWD,)

    def replace(self, **change: Any) -> "Work":
        return dataclasses.replace(self, **change)


def differentiated(op: str) -> int:
    return DIFFERENTIATED.get(op, 1)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def tensors(x: Inputs) -> list[Tensor]:
    return [v for v in x.values() if isinstance(v, Tensor)]


def cost(work: Work, x: Inputs) -> tuple[int, int]:
    """(flops, bytes) of an ideal kernel."""
    if work.pass_ == BOTH or work.op == "group_advantages":
        return work.case.flops(x), work.case.bytes(x)
    if work.op == "linear_sample":
        return work.case.flops(x), work.case.bytes(x)
    if work.op in PRODUCTS:  # what is written is a few numbers a row
        h, v = x["hidden"], x["weight"]
        flops = 2 * PRODUCTS[work.op][0] * h.numel() * v.shape[0]
        if "mask" in x:
            flops = int(flops * float((x["mask"] != 0).float().mean()))
        if work.op == "noisy_embedding":  # the hard token: a row of the embedding each
            out = x["tokens"].numel() * x["embedding"].shape[1] * h.element_size()
            return 0, 2 * out
        return flops, size(*tensors(x))
    if work.op in ("token_logprobs", "policy_loss"):
        return work.case.flops(x) // 2, size(*tensors(x))
    given = tensors(x)
    written = x["mean"] if work.op == "gaussian_action" else given[1]  # like a vector in
    return work.case.flops(x) // 2, size(*given, written)


def bare_products(work: Work, x: Inputs) -> Callable[[], None] | None:
    """The products that cannot be avoided, preallocated, by chunks of rows; None: there are none.

    Rows that are not active are left out, as an ideal kernel would.
    """
    count = PRODUCTS.get(work.op, (0, 0))[work.pass_ == BOTH]
    if not count:
        return None
    h, w = x["hidden"].detach().reshape(-1, x["hidden"].shape[-1]), x["weight"].detach()
    if "mask" in x:
        h = h[x["mask"].reshape(-1) != 0]
    chunk = min(CHUNK if len(w) < LARGE else CHUNK_LARGE, max(len(h), 1))
    z = h.new_empty(chunk, len(w))
    pairs = [(h, w)]  # products into a block of logits
    if work.op == "linear_divergence":
        pairs.append((x["teacher_hidden"].detach(), x["teacher_weight"].detach()))
    if work.op == "noisy_embedding":
        e = x["embedding"].detach()
        pairs.append((torch.ones_like(h[:, :1]).expand(-1, e.shape[1]).contiguous(), e))
    both = work.pass_ == BOTH and count >= 3
    dh, dw = (torch.empty_like(h), torch.empty_like(w)) if both else (h, w)

    def run() -> None:
        for i in range(0, len(h), chunk):
            rows = slice(i, min(i + chunk, len(h)))
            block = z[: rows.stop - i]
            for a, b in pairs:
                torch.mm(a[rows], b.t(), out=block)
            if both:
                torch.mm(block, w, out=dh[rows])
                if i:
                    torch.addmm(dw, block.t(), h[rows], out=dw)
                else:
                    torch.mm(block.t(), h[rows], out=dw)

    return run


def gemm_flops(op: str, rows: int, hidden: int, vocab: int) -> float:
    """Of forward and backward: what the length of a call is estimated from."""
    return 2.0 * max(PRODUCTS.get(op, (1, 1))[1], 1) * math.prod((rows, hidden, vocab))
