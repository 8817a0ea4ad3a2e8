"""What any implementation must move, op by op, and the most launches that each may take.

Bytes are those of a form: the products are calls of their own (no kernel of theirs is written
here), their 16-bit factors and fp32 results pass through memory, and so does what one of them hands
to the next. A result is written once and every consumer reads it once; nothing is copied, cast or
cleared on the way, and a value that a kernel could keep in a register costs nothing. A block of
logits of 2.5 GiB fits (the bar on extra memory), so that more of them are made in `chunks`.
Vectors of the rows count at 4 or 8 bytes an element.

`most_bytes` is 1.15 times that, and a mebibyte, which is a third of a microsecond.
"""

from collections.abc import Callable
from typing import NamedTuple

from vgkern.gate.traffic.calls import Call

OVER = 1.15
SLACK = 1 << 20
ROOM = 5 << 29  # bytes of a block of logits
WIDE = 1580  # from this width on 12 bytes a logit cost less than the flops of another product
L2_HALF = 25 << 20  # of hidden that stays in an H100's L2: each of its halves has a copy of its own
LOGIT, GRAD = 4, 2  # bytes of an element


class Minimum(NamedTuple):
    bytes: int
    launches: int  # the most that there may be

    @property
    def most_bytes(self) -> float:
        return OVER * self.bytes + SLACK


Form = Callable[[Call], Minimum]
FORMS: dict[str, Form] = {}


def form(f: Form) -> Form:
    FORMS[f.__name__] = f
    return f


def minimum(call: Call) -> Minimum:
    return FORMS[call.op](call)


def chunks(rows: int, vocab: int, size: int) -> int:
    return -(-rows * vocab * size // ROOM)


class _Head:
    """Bytes of hidden and weight, in 16 bits, and of the products with them."""

    def __init__(self, n: int, h: int, v: int) -> None:
        self.n, self.h, self.v = n, h, v
        self.hidden, self.weight = 2 * n * h, 2 * v * h
        self.rows = n * v  # logits

    def logits(self, parts: int) -> int:
        """h W^T: the weight once for each part, logits written."""
        return self.hidden + parts * self.weight + LOGIT * self.rows

    def tile(self) -> int:
        """The same where no logit is written: the weight once for each part of hidden that stays
        in the L2 while it streams by."""
        return self.hidden + -(-self.hidden // L2_HALF) * self.weight

    def dhidden(self, parts: int, size: int) -> int:
        """dz W: the gradient read, dh written."""
        return GRAD * self.rows + parts * self.weight + size * self.n * self.h

    def dweight(self, parts: int) -> int:
        """dz^T h, in fp32, each part but the first on top of what is there."""
        total = 4 * self.v * self.h
        return GRAD * self.rows + self.hidden + total + (parts - 1) * 2 * total


def _rounded(elements: int) -> int:
    """An fp32 gradient read, multiplied by what arrives at the loss, written in 16 bits."""
    return (4 + 2) * elements


@form
def linear_policy_loss(call: Call) -> Minimum:
    """The gradient is made with the loss and waits for dloss in fp32: a loss scale comes before the
    rounding. Narrow heads: two tiles that write no logits, the second one the gradient. Wide heads:
    logits written and read twice, since the statistics of a row come before its gradient.

    Launches: the weights of the rows (5), statistics and gradient (3), the terms and their totals,
    three products, the seed of backward, two roundings: 16, and 20 are allowed; 4 to put the live
    rows together and 4 to take them apart where that pays, 4 for each further chunk.
    """
    n, h, v = call.shape
    live = call.live or n
    frozen = call.what == "frozen"
    x = _Head(live, h, v)
    if h < WIDE:
        parts = chunks(live, v, GRAD)
        bytes_ = 2 * x.tile() + GRAD * x.rows
    else:
        parts = chunks(live, v, LOGIT)
        bytes_ = x.logits(parts) + 2 * LOGIT * x.rows + GRAD * x.rows
    bytes_ += x.dhidden(parts, 4) + 4 * live * h + 2 * n * h
    if not frozen:
        bytes_ += x.dweight(parts) + _rounded(v * h)
    return Minimum(bytes_ + n * (8 + 5 * 4), 20 + 4 * (parts - 1) + 8 * looks(call))


@form
def linear_token_logprobs(call: Call) -> Minimum:
    """Forward: one tile. Backward knows its statistics: narrow heads write the gradient from a
    second tile, wide ones write logits and read them once. dh leaves its product rounded; so does
    dW where it is one product, else it is summed in fp32 first.

    Launches: forward, a check of the targets, statistics (2), 4 to look for ignored rows; backward,
    the coefficients (4), another look (4, and 8 vectors put together), the gradient, three
    products, the roundings (2); 4 for each further chunk.
    """
    n, h, v = call.shape
    x = _Head(n, h, v)
    vectors = n * (8 + 3 * 4)
    if call.what == "truncated":
        return _truncated_both(x)
    if call.what == "fwd":
        return Minimum(x.tile() + vectors, 4 + 4 * looks(call))
    narrow = h < WIDE
    size = GRAD if narrow else LOGIT
    parts = chunks(n, v, size)
    made = x.tile() if narrow else x.logits(parts) + LOGIT * x.rows
    head = x.dweight(parts) + _rounded(v * h) if parts > 1 else x.dweight(1) - 2 * v * h
    bytes_ = x.tile() + made + GRAD * x.rows + x.dhidden(parts, 2) + head + 2 * vectors
    return Minimum(bytes_, 16 + 16 * looks(call) + 4 * (parts - 1))


SELECT = 3  # walks over a row that find a cut by its bits: 11, 11 and 10 of them


def _truncated_both(x: _Head) -> Minimum:
    """Logits written, the cut found, and a walk for the score; backward has cut and score, writes
    logits again and reads them once."""
    parts = chunks(x.n, x.v, LOGIT)
    forward = x.logits(parts) + (SELECT + 1) * LOGIT * x.rows
    back = x.logits(parts) + (LOGIT + GRAD) * x.rows + x.dhidden(parts, 2) + x.dweight(parts)
    return Minimum(forward + back, 24)


@form
def linear_sample(call: Call) -> Minimum:
    """Logits written by their product, then one walk for the race and for the sums of the score;
    a truncation is found in `SELECT` walks before.

    Launches: the product, the cut, the race and the score (2).
    """
    x = _Head(*call.shape)
    cut = call.what == "truncated"
    walks = 1 + (SELECT if cut else 0)
    return Minimum(x.logits(1) + walks * LOGIT * x.rows, 4 + cut)


@form
def token_logprobs(call: Call) -> Minimum:
    """16-bit logits read; backward reads them again and writes as much.

    Launches: a check of the targets, the row kernel; backward, one more.
    """
    n, v = call.shape
    walks = 3 if call.what == "both" else 1
    return Minimum(walks * 2 * n * v + n * (8 + 3 * 4), 2 + (walks > 1))


@form
def policy_loss(call: Call) -> Minimum:
    """logp, old_logp and mask read (the mask once more, for the lengths of the sequences), dlogp
    written; backward reads it and writes it times dloss.

    Launches: the weights (2), the terms and their totals, the seed of backward, the scaling.
    """
    b, t = call.shape
    return Minimum(b * t * (4 + 4 + 1 + 1 + 4 + 4 + 4), 6)


@form
def group_advantages(call: Call) -> Minimum:
    """Rewards and groups read, advantages written. Launches: a sort (3), the groups, two casts."""
    return Minimum(call.shape[0] * (4 + 8 + 4), 6)


@form
def noisy_embedding(call: Call) -> Minimum:
    """Forward: a row of the table for each token. Backward: the logits and u = E dx written, each
    read twice, since the softmax of the perturbed row comes before its gradient; that, in 16 bits,
    is read by two products. The table's gradient is a sum over the rows of each token, and zeros.

    Launches: a check of the tokens and the gather; which rows are live (2), their place (4), two
    products, the gradient, two products, the roundings (2), the table's gradient (a sort of 3, the
    sum, the zeros).
    """
    n, h, v = call.shape
    x = _Head(n, h, v)
    parts = chunks(n, v, 2 * LOGIT)
    bytes_ = 3 * x.hidden  # forward: from the table, to x; backward: dx
    bytes_ += 2 * x.logits(parts) + 2 * 2 * LOGIT * x.rows + GRAD * x.rows
    bytes_ += x.dhidden(parts, 2) + x.dweight(parts) + _rounded(v * h) + x.hidden + x.weight
    return Minimum(bytes_, 20 + 5 * (parts - 1))


@form
def linear_divergence(call: Call) -> Minimum:
    """Logits of both written; read for the two log-sum-exps, which every term needs, and for the
    terms. Backward knows all of that: both written again and read once, the gradient written.

    Launches: forward, the mask, two products, the row kernel, 4 to look for masked rows; backward,
    the coefficients (4), the look, two products, the gradient, two products, the roundings (2); 5
    for each further chunk.
    """
    n, h, v, teacher = call.shape
    x, y = _Head(n, h, v), _Head(n, teacher, v)
    parts = chunks(n, v, 2 * LOGIT)
    forward = x.logits(parts) + y.logits(parts) + 2 * 2 * LOGIT * x.rows
    if call.what == "fwd":
        return Minimum(forward, 8 + 3 * (parts - 1))
    back = x.logits(parts) + y.logits(parts) + (2 * LOGIT + GRAD) * x.rows
    back += x.dhidden(parts, 2) + x.dweight(parts) + _rounded(v * h)
    return Minimum(forward + back, 28 + 8 * (parts - 1))


@form
def gaussian_action(call: Call) -> Minimum:
    """Mean and log_std read, action written; their gradient and log_std read, two written. The
    noise is made again. One launch each way."""
    n, width = call.shape
    return Minimum(4 * n * width * (3 + 4) + n * (2 * (8 + 8) + 2 * 4), 2)


@form
def costate_scan(call: Call) -> Minimum:
    """Jacobians read, and read again for backward, which writes as many. One launch each way."""
    b, t, n = call.shape
    return Minimum(3 * 4 * b * t * n * n + 4 * b * t * n * (2 + 3), 2)


@form
def linear_rollout(call: Call) -> Minimum:
    """As costate_scan, with sigma read and its gradient written."""
    b, t, n = call.shape
    return Minimum(3 * 4 * b * t * n * n + 4 * b * t * n * (3 + 4) + 2 * 16 * b * t, 2)


def looks(call: Call) -> bool:
    """May the host look at how many rows are live? 20 us, against 2 flops each for this many."""
    return len(call.shape) >= 3 and call.shape[0] * call.shape[1] * call.shape[2] > 1e12


PEAK = {  # bytes beside the inputs: one fp32 gradient of the head and a block of logits
    "linear_policy_loss full 8192x4096x131072": 4 * 131072 * 4096 + ROOM,
}
MILLISECONDS = {  # predicted
    "linear_policy_loss full 8192x4096x131072": 42.0,
    "linear_policy_loss full 8192x576x49152": 3.0,
}
