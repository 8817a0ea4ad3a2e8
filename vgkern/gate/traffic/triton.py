"""What each kernel of kernels/ moves, by how often it walks over which argument.

Every row is read: has a target, a gradient, a costate. A walk over a row of logits counts as memory
each time, though a row that was just read is often still in the L2. `again` is what is read over
and over by all programs (a bias) or within one (a sequence of tokens): caches have it.

tests/test_traffic_models.py runs each kernel interpreted and holds these to the bytes that its
loads and stores touch.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vgkern.gate.traffic.moved import Moved, nbytes

objective: Any = importlib.import_module("vgkern.kernels.objective")  # no types in kernels/
GROUP = 16  # rewards of a group
TOKEN_SUMS = 13 * 4  # bytes that a program of policy_loss leaves


class Given:
    """The arguments of a launch by name, and its grid."""

    def __init__(self, given: dict[str, Any], programs: tuple[int, ...]) -> None:
        self.given, self.programs = given, math.prod(programs)
        self.grid = programs

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def bytes(self, *names: str) -> int:
        """Of these tensors; one that is None has none."""
        return sum(nbytes(self.given[n]) for n in names if isinstance(self.given[n], Tensor))

    def has(self, name: str) -> bool:
        return self.given[name] is not None


Model = Callable[[Given], Moved]
MODELS: dict[str, Model] = {}


def model(*kernels: str) -> Callable[[Model], Model]:
    def register(f: Model) -> Model:
        for kernel in kernels:
            MODELS[kernel] = f
        return f

    return register


def moved(kernel: str, given: dict[str, Any], programs: tuple[int, ...]) -> Moved:
    if kernel not in MODELS:
        raise LookupError(f"{kernel}: no model in vgkern/gate/traffic/triton.py of what it moves")
    return MODELS[kernel](Given(given, programs))


# --- rows of logits: one program a row


def _walks(k: Given, times: int, *vectors: str, out: str = "", written: int = 0) -> Moved:
    """`times` over the logits, once over vectors of the rows; a row of `out` and `written` bytes of
    each row."""
    bias = k.bytes("bias") if times else 0
    return Moved(
        times * k.bytes("logits") + k.bytes(*vectors) + bias,
        (k.bytes(out) if out else 0) + k.programs * written,
        again=bias * (times * k.programs - 1) if bias else 0,
    )


@model("_row_stats_kernel")
def _row_stats(k: Given) -> Moved:
    return _walks(k, 1, "targets", written=12)


@model("_row_grad_kernel")
def _row_grad(k: Given) -> Moved:
    vectors = ["targets", "logp", "entropy", "lse", "c", "e"]
    if not k.has("u"):
        return _walks(k, 1, *vectors, out="out")
    vectors += ["sequence"] if k["EXPECTED"] else ["sequence", "position"]
    one = _walks(
        k, 2, *vectors, out="out"
    )  # for the softmax of the perturbed row, and the gradient
    return one._replace(read=one.read + 2 * k.bytes("u"))


@model("_row_policy_kernel")
def _row_policy(k: Given) -> Moved:
    vectors = ("targets", "advantages", "row_weight", "old", "ref", "sampler")
    made = 8 + (4 if k.has("scale_out") else 0)
    if not k.has("out"):
        return _walks(k, 1, *vectors, written=made)
    return _walks(k, 2, *vectors, out="out", written=made)


@model("_replaced_kernel")
def _replaced(k: Given) -> Moved:
    vectors = k.bytes("row_weight", "targets", *(() if k["ALWAYS"] else ("advantages",)))
    copied = k.bytes("hidden") if k.has("out") else 0
    return Moved(vectors + copied, k.bytes("targets_out", "out"))


# --- products that end in a row's statistics or its gradient


def _tile(k: Given, columns: int, vectors: int, each: int = 0) -> Moved:
    """The operands: hidden once a launch and the weight once for each group of row blocks, which
    the L2 holds between; `vectors` bytes of a row for each part of `columns` columns, `each` of
    them again for each tile."""
    rows, vocab, width = k["R"], k["V"], k["H"]
    m, n, size = k["M"], k["N"], k["hidden"].element_size()
    blocks, parts = k["blocks"], -(-vocab // columns)
    hidden, weight, bias = rows * width * size, vocab * width * size, k.bytes("bias")
    groups = -(-blocks // min(k["group"], blocks))
    tiles = sum(-(-min(columns, vocab - at) // n) for at in range(0, vocab, columns))
    asked = blocks * tiles * (m + n) * width * size
    read = hidden + groups * weight + rows * vectors + bias
    again = asked - hidden - groups * weight + (blocks - 1) * bias
    again += rows * ((parts - 1) * vectors + tiles * each)
    depth = -(-width // k["K"]) * k["K"]
    return Moved(read, 0, 2 * blocks * m * tiles * n * depth, size, again)


@model("_linear_stats_kernel")
def _linear_stats(k: Given) -> Moved:
    return _tile(k, k["SPAN"], 8, 8)._replace(written=k.bytes("state"))


@model("_linear_grad_kernel")
def _linear_grad(k: Given) -> Moved:
    return _tile(k, k["N"], 8 + 5 * 4)._replace(written=k.bytes("out"))


@model("_combine_kernel")
def _combine(k: Given) -> Moved:
    return Moved(k.bytes("state", "targets"), k.bytes("logp_out", "entropy_out", "lse_out"))


# --- sampling and truncation


NARROW = 2  # walks that leave few candidates of a cut, where a row is too long to list at once
LISTED = 12  # passes over the list of those, at most


@model("_row_cut_kernel")
def _row_cut(k: Given) -> Moved:
    vectors = ("targets", "temperatures", "top_ks", "top_ps", "min_ps")
    if not (k["TOP_K"] or k["TOP_P"]):
        return _walks(k, 1 if k["MIN_P"] else 0, *vectors, written=8)
    room, vocab = k["ROOM"], k["V"]  # the largest, what narrows, and the list's own
    plain = _walks(k, 2 + (NARROW if vocab > room else 0), *vectors, written=8)
    listed = 4 * k.programs * min(room, vocab)
    passes = LISTED * (k["TOP_K"] + k["TOP_P"])
    return plain._replace(again=plain.again + passes * listed, rewritten=listed)


def _spans(k: Given, *vectors: str, written: int) -> Moved:
    """One walk over the logits by a program for each span of each row; `written` bytes of each."""
    rows, spans, bias = k["R"], -(-k["V"] // k["SPAN"]), k.bytes("bias")
    once = k.bytes(*vectors)
    again = (spans - 1) * once + (rows - 1) * bias
    return Moved(k.bytes("logits") + once + bias, rows * spans * written, again=again)


@model("_row_race_kernel")
def _row_race(k: Given) -> Moved:
    return _spans(k, "sequence", "position", "temperatures", "cut", "last", written=8)


@model("_row_kept_stats_kernel")
def _row_kept_stats(k: Given) -> Moved:
    given = ("temperatures", "cut", "last")
    if not k.has("best"):
        return _spans(k, "targets", *given, written=16)
    one = _spans(k, *given, "best", "best_id", written=16)  # whoever scores looks who won
    return one._replace(written=one.written + k.bytes("targets"))


@model("_row_merge_kernel")
def _row_merge(k: Given) -> Moved:
    return Moved(k.bytes("state", "targets"), k.bytes("logp_out", "entropy_out", "lse_out"))


@model("_row_kept_grad_kernel")
def _row_kept_grad(k: Given) -> Moved:
    vectors = ("targets", "temperatures", "logp", "entropy", "lse", "c", "e", "cut", "last")
    return _walks(k, 1, *vectors, out="out")


# --- two rows of logits


@model("_divergence_kernel")
def _divergence(k: Given) -> Moved:  # for the sums, then for the terms
    return Moved(2 * k.bytes("z_block", "t_block") + k.bytes("mask"), k.programs * 20)


@model("_divergence_grad_kernel")
def _divergence_grad(k: Given) -> Moved:  # for the mean, then for the gradient
    read = 2 * k.bytes("z_block", "t_block") + k.bytes("lse", "teacher_lse", "c", "e")
    return Moved(read, k.bytes("out"))


@model("_table_grad_kernel")
def _table_grad(k: Given) -> Moved:  # of tokens that all differ
    parts, count = k.grid[1], k["R"]
    tokens = parts * (2 * (8 * count - 8) + 8 * count)  # of this row, the one before, the next
    rows = parts * k.bytes("row")
    read = k.bytes("token", "row", "dx")
    return Moved(read, k.bytes("dx"), again=tokens + rows - k.bytes("token", "row"))


# --- tokens


@model("_token_kernel")
def _token(k: Given) -> Moved:
    given = ("logp", "advantages", "row_weight", "old", "ref", "sampler", "entropy")
    return Moved(k.bytes(*given), k.bytes("dlogp", "dentropy") + k.programs * TOKEN_SUMS)


@model("_sequence_kernel")
def _sequence(k: Given) -> Moved:
    four = k.bytes("logp", "advantages", "row_weight", "old")
    given = ("ref", "sampler", "entropy")
    ratio, token = k["RATIO"], objective.TOKEN.value
    through = ratio > token and ratio != objective.SEQUENCE_TOKEN.value
    first = k.bytes("sampler") if k["FIX"] else 0
    again = four + first + (four + k.bytes("ref", "sampler") if through else 0)
    made = k.bytes("dlogp", "dentropy") + k.programs * TOKEN_SUMS
    return Moved(four + k.bytes(*given), made, again=again)


@model("_totals_kernel")
def _totals(k: Given) -> Moved:
    return Moved(k.bytes("partial"), TOKEN_SUMS)


@model("_group_advantages_kernel")
def _group_advantages(k: Given) -> Moved:
    count, groups = k["rewards"].numel(), k["rewards"].numel() / GROUP
    walks = 3 if k["STD"] else 2
    read = k.bytes("rewards", "ids", "order") + int(8 * groups)
    again = 8 * (count - 1) + (walks - 1) * k.bytes("rewards")
    return Moved(read, k.bytes("out"), again=again)


# --- continuous actions and states


@model("_gaussian_action_fwd_kernel")
def _gaussian_fwd(k: Given) -> Moved:
    return Moved(k.bytes("mean", "log_std", "sequence", "position"), k.bytes("action", "logp"))


@model("_gaussian_action_bwd_kernel")
def _gaussian_bwd(k: Given) -> Moved:
    given = ("daction", "dlogp", "log_std", "sequence", "position")
    return Moved(k.bytes(*given), k.bytes("dmean", "dlog_std"))


@model("_recurrence_whole_kernel", "_recurrence_diagonal_kernel")
def _recurrence(k: Given) -> Moved:
    given = ("jacobian", "added", "first", "done", "other", "sigma")
    noises = k["NOISE"] + k["DSIGMA"]
    noise = k.bytes("sequence", "position") if noises else 0
    parts = k.grid[1]  # of a state, each of which asks for what is one a step
    again = (parts - 1) * k.bytes("done") + max(parts * noises - 1, 0) * noise
    made = k.bytes(*(n for n in ("out", "last", "djacobian", "dsigma")))
    return Moved(k.bytes(*given) + noise, made, again=again)


@model("_recurrence_tiled_kernel")
def _recurrence_tiled(k: Given) -> Moved:
    """The state, in a scratch of its own, is read for each tile and written for each step: the L2
    has it."""
    plain = _recurrence(k)
    steps, n, tiles = k["steps"], k["n"], -(-k["n"] // k["BLOCK"])
    vector = k.programs * n * 4
    noises = k["NOISE"] + k["DSIGMA"]
    noise = k.bytes("sequence", "position") if noises else 0
    again = (tiles * noises - 1) * noise if noises else 0
    again += steps * (tiles + 1) * vector + (vector if k["LAST"] else 0)
    return plain._replace(again=again, rewritten=(steps + 1) * vector)
