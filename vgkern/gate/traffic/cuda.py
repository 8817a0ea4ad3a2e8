"""What each launcher of csrc/*.cu moves. The kernels walk over their rows as the Triton kernels do,
which a test counts; that they do is read from their source, since nothing counts their loads.

csrc/bindings_cuda.cpp says what the arguments are called.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from vgkern.gate.traffic.moved import Moved
from vgkern.gate.traffic.triton import Given
from vgkern.objectives import ESTIMATORS
from vgkern.ops import _compile

TALLY = 13 * 8  # bytes that a block of policy_terms leaves
DESCEND = 11  # walks that find 32 bits, three at a time
Model = Callable[[Given], Moved | list[Moved]]
MODELS: dict[str, Model] = {}


@functools.cache
def arguments() -> dict[str, list[str]]:
    """{operator: the names of its arguments} of torch.ops.vgkern_launch."""
    text = (_compile.SOURCES / "bindings_cuda.cpp").read_text()
    found = {}
    for definition in re.findall(r"m\.def\((.*?)\);", text, re.DOTALL):
        schema = torch._C.parse_schema("".join(re.findall(r'"([^"]*)"', definition)))
        found[schema.name] = [a.name for a in schema.arguments]
    return found


def moved(operator: str, given: dict[str, Any]) -> list[Moved]:
    """Of each kernel that it launches."""
    if operator not in MODELS:
        raise LookupError(f"{operator}: no model in vgkern/gate/traffic/cuda.py of what it moves")
    made = MODELS[operator](Given(given, (1,)))
    return made if isinstance(made, list) else [made]


def model(f: Model) -> Model:
    MODELS[f.__name__] = f
    return f


def _walks(k: Given, times: int, vectors: str, out: str) -> Moved:
    read = times * k.bytes("logits") + k.bytes("bias", *vectors.split())
    return Moved(read, k.bytes(*out.split()))


@model
def row_stats(k: Given) -> Moved:
    return _walks(k, 1, "targets", "logp entropy lse")


@model
def row_grad(k: Given) -> Moved:
    vectors = "targets logp entropy lse c e"
    if not k.has("u"):
        return _walks(k, 1, vectors, "out")
    one = _walks(k, 2, vectors + " sequence position", "out")
    return one._replace(read=one.read + 2 * k.bytes("u"))


@model
def row_policy(k: Given) -> Moved:
    vectors = "targets advantages row_weight old_logp ref_logp sampler_logp"
    return _walks(k, 2 if k.has("out") else 1, vectors, "logp entropy power out")


OPTIONS = "temperatures top_ks top_ps min_ps"


@model
def row_cut(k: Given) -> Moved:
    by_k = k.has("top_ks") or 0 < k["top_k"] < k["logits"].shape[1]
    by_p = k.has("top_ps") or k["top_p"] < 1
    times = by_k * (DESCEND + 1) + by_p * (DESCEND + 2)
    if times or k["min_p"] > 0 or k.has("min_ps"):
        times += 1
    return _walks(k, times, f"targets {OPTIONS}", "cut")


@model
def row_sample(k: Given) -> Moved:
    return _walks(k, 1, f"sequence position cut {OPTIONS}", "token")


@model
def row_kept_stats(k: Given) -> Moved:
    return _walks(k, 1, f"targets cut {OPTIONS}", "logp entropy lse")


@model
def row_kept_grad(k: Given) -> Moved:
    return _walks(k, 1, f"targets cut logp entropy lse c e {OPTIONS}", "out")


@model
def policy_terms(k: Given) -> Moved:
    given = ("logp", "advantages", "row_weight", "old_logp", "ref_logp", "sampler_logp", "entropy")
    return Moved(k.bytes(*given), k.bytes("dlogp", "dentropy", "partial"))


@model
def policy_totals(k: Given) -> Moved:
    return Moved(k.bytes("partial"), k.bytes("loss", "counts"))


@model
def group_advantages(k: Given) -> list[Moved]:
    groups = Moved(k.bytes("rewards", "ids", "order"), k.bytes("out"))
    whiten = Moved(k.bytes("rewards"), k.bytes("out"))
    name = ESTIMATORS[k["estimator"]]
    if name == "reinforce_pp":
        return [whiten]
    return [groups, whiten] if name == "reinforce_pp_baseline" else [groups]


@model
def gaussian_action(k: Given) -> Moved:
    return Moved(k.bytes("mean", "log_std", "sequence", "position"), k.bytes("action", "logp"))


@model
def gaussian_action_grad(k: Given) -> Moved:
    given = ("daction", "dlogp", "log_std", "sequence", "position")
    return Moved(k.bytes(*given), k.bytes("dmean", "dlog_std"))


@model
def recurrence(k: Given) -> Moved:
    given = ("jacobian", "push", "start", "done", "sigma", "sequence", "position", "other")
    return Moved(k.bytes(*given), k.bytes("out", "last", "djacobian", "dsigma"))
