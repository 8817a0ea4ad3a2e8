"""Analytic objectives: divergence and entropy of every state, and the score of those to come.

    f_t = sum_k coef_k D_k(state t) - entropy_coef H(state t)      summed over the vocabulary
    J   = E sum_t f_t
    dJ  = E sum_t [ df_t + A_t dlog pi(y_t) ]
    A_t = future (R_t - mean of R_t over the other samples of the group that drew a token at t)
    R_t = sum_{s>t} discount^(s-t-1) f_s

f_t depends on the prefix and not on y_t, so df_t needs no sample of y_t: only what y_t does to the
states after it is left to the score, and the baseline (the others' R_t) leaves it unbiased. With
future = discount = 1 the gradient is exactly that of J; future = 0 drops what the token does to
later states: generalised knowledge distillation (GKD, arXiv 2306.13649). The estimator is ours.
Where a pathwise hop carries a share a of the future, the score takes the rest: future = 1 - a.

The score enters the policy loss as per-token advantages -A_t, so that task reward, future terms and
entropy are one pass over the logits; every teacher is one pass of `linear_divergence` more. No
[N, V] exists. R_t is a scan of costates whose Jacobian is 1: `costate_scan`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.objectives import Objective
from vgkern.ops import _check
from vgkern.ops._policy_rows import prepare, token_level
from vgkern.ops._segments import REMEDY, Segments, segments_of
from vgkern.ops.costate_scan import costate_scan
from vgkern.ops.group_advantages import group_advantages
from vgkern.ops.linear_divergence import KINDS, Divergence, linear_divergence
from vgkern.ops.linear_policy_loss import linear_policy_loss
from vgkern.ops.linear_token_logprobs import linear_token_logprobs
from vgkern.ops.policy_loss import COUNTS, PolicyLoss

from ._biases import produced

SCORE = Objective(advantage="none", ratio="none", surrogate="linear")
RESERVED = {*COUNTS, "future", "loss"} - {"kl"}  # metrics that no teacher may be called after
COLUMNS = 8  # added for a bias: its parts, and zeros, so that rows stay aligned


@dataclass(frozen=True)
class Teacher:
    """What a policy is held to, or taught by: a frozen model's hidden states and head.

    Args:
        hidden: [B, T, Ht], of the same tokens; no gradient flows to it.
        weight: [V, Ht] dtype of hidden; V is the vocabulary of the student.
        bias: [V] or None.
        kind: "reverse_kl" KL(student || teacher), "forward_kl" KL(teacher || student), "jsd".
        coef: weight of its divergence in f_t.
        name: of its metric, the mean divergence per token in nats; no other metric's, but "kl".

    Raises ValueError that names the field.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    kind: str = "reverse_kl"
    coef: float = 1.0
    name: str = "kl"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise _check.fail("teacher.kind", self.kind, ", ".join(map(repr, KINDS)))
        if not 0 <= self.coef < torch.inf:
            raise _check.fail("teacher.coef", self.coef, "a finite number >= 0")


def analytic_loss_ref(
    logits: Tensor,  # [B, T, V]
    teachers: Sequence[tuple[Tensor, float]],  # logits [B, T, V] and coef, reverse KL
    targets: Tensor,  # [B, T] int64
    groups: Tensor,  # [B] int64
    mask: Tensor,  # [B, T] bool
    entropy_coef: float = 0.0,
    future: float = 1.0,
    discount: float = 1.0,
) -> Tensor:
    """The loss of `analytic_loss` with its default objective and no reward."""
    lp = logits.log_softmax(-1)
    f = entropy_coef * (lp.exp() * lp).sum(-1)
    for teacher, coef in teachers:
        f = f + coef * (lp.exp() * (lp - teacher.log_softmax(-1))).sum(-1)
    f = f.where(mask, 0)
    R = torch.zeros_like(f)
    for t in reversed(range(f.shape[1] - 1)):
        R[:, t] = f[:, t + 1].detach() + discount * R[:, t + 1]
    m = mask.to(f.dtype)
    others = (groups[:, None] == groups).to(f.dtype).fill_diagonal_(0)
    baseline = others @ (R * m) / (others @ m).clamp(min=1)
    A = future * (R - baseline)
    logp = lp.gather(-1, targets.where(mask, 0)[..., None])[..., 0]
    return (f + (A * logp).where(mask, 0)).sum() / len(f)


@torch.no_grad()
def future_advantages(
    cost: Tensor,  # [B, T], or packed [N] or [1, N], fp32|fp64: f_t; masked rows may hold anything
    groups: Tensor,  # [B] int64 ids; packed: [S]
    *,
    mask: Tensor | None = None,  # like cost, bool or 0/1
    segments: Tensor | None = None,  # int32|int64 [S + 1]: the sequences of packed rows
    future: float = 1.0,
    discount: float = 1.0,
    own: bool = False,
    backend: str | None = None,
) -> Tensor:
    """-A_t, like cost: advantages of the costs to come, 0 where masked. Formula: module docstring.

    own: the row's own cost belongs to its advantage as well, as it must where the cost depends on
    the row's token, like a sampled log-ratio: the same with cost_t + future R_t for future R_t.

    Raises ValueError / TypeError naming the argument: a wrong shape or dtype, future < 0, a
    discount outside [0, 1], a group of one, which has no baseline, NaN or inf in an unmasked cost.
    """
    cost = _check.floating("cost", cost, None if segments is not None else 2)
    packed = segments_of(segments, cost.shape, cost.device)
    samples = cost.shape[:1] if packed is None else torch.Size([packed.count])
    groups = _check.targets("groups", groups, samples)
    device = _check.same_device(cost=cost, groups=groups, mask=mask)
    if not 0 <= future < torch.inf:
        raise _check.fail("future", future, "a finite number >= 0")
    live = torch.ones_like(cost, dtype=torch.bool)
    if mask is not None:
        live = _check.mask("mask", mask, cost.shape)
    f = cost.where(live, 0)
    if _check.can_look(device):
        _check_groups(groups)
        if not bool(f.isfinite().all()):
            at = (~f.isfinite()).nonzero()[0].tolist()
            raise _check.NonFiniteError(f"cost: got {float(f[tuple(at)])} at {at}; allowed: finite")
    if not f.numel() or (future == 0 and not own):
        return torch.zeros_like(f)
    if packed is None:
        to_go = future * _to_go(f, None, discount, backend)
    else:
        f, live = f.reshape(1, -1), live.reshape(1, -1)
        to_go = future * _to_go(f, packed, discount, backend)
    to_go = (to_go + (f if own else 0)).where(live, 0)
    index = _first_of(groups)
    if packed is None:
        zeros = f.new_zeros(len(f), f.shape[1])  # as many groups as sequences, at most
        total = zeros.index_add(0, index, to_go)[index]
        count = zeros.index_add(0, index, live.to(f.dtype))[index]
    else:  # what the group has at each row's position
        where = _first_of(packed.spread(index) * f.shape[1] + packed.position())
        zeros = f.new_zeros(f.shape[1])
        total = zeros.index_add(0, where, to_go[0])[where][None]
        count = zeros.index_add(0, where, live[0].to(f.dtype))[where][None]
    baseline = (total - to_go) / (count - 1).clamp(min=1)
    alone = count < 2  # where total - to_go need not round to 0
    return (baseline.where(~alone, 0) - to_go).where(live, 0).view(cost.shape)


def _first_of(ids: Tensor) -> Tensor:
    """[N] a place of its own below N for each distinct id; `unique`, which a GPU's host waits for,
    would give the smallest."""
    return torch.searchsorted(ids.sort().values, ids)


def _to_go(f: Tensor, packed: Segments | None, discount: float, backend: str | None) -> Tensor:
    """R_t [B, T]: costs after t, discounted. Between packed sequences the scan's Jacobian is 0."""
    jacobian = torch.ones((), dtype=f.dtype, device=f.device).expand(*f.shape, 1)
    push = f[..., None]
    if packed is not None:
        # x_t = J_t x_{t+1} + push_t with x the costate before row t: its own cost and those after
        last = torch.zeros(f.shape[1] + 1, dtype=torch.bool, device=f.device)
        last[packed.ends] = True  # row t + 1 begins a segment
        jacobian = (~last[1:]).to(f.dtype)[None, :, None]
    scan = costate_scan(jacobian, push, f.new_zeros(len(f), 1), gamma=discount, backend=backend)
    if packed is None:
        return scan[:, 1:, 0]
    return scan[:, 1:, 0] * jacobian[..., 0]


def _check_groups(groups: Tensor) -> None:
    ids, counts = groups.unique(return_counts=True)
    if len(ids) and int(counts.min()) < 2:
        one = f"a group of one (id {int(ids[counts.argmin()])})"
        raise _check.fail("groups", one, "2 or more samples each, or future=0")


def analytic_loss(
    hidden: Tensor,  # [B, T, H], or packed [N, H] or [1, N, H]; fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    targets: Tensor,  # like hidden's rows, int64
    teachers: Teacher | Sequence[Teacher] = (),
    *,
    entropy_coef: float = 0.0,  # nats of entropy are worth so much
    groups: Tensor | None = None,  # [B] ([S]) int64 ids; None: only with future=0 and no rewards
    future: float = 1.0,
    discount: float = 1.0,
    advantages: Tensor | None = None,  # of a task, [B], [B, 1] or [B, T]; packed: [S], or by row
    rewards: Tensor | None = None,  # [B] ([S]), instead of advantages
    objective: str | Objective = "rloo",
    bias: Tensor | None = None,
    temperature: float = 1.0,  # of student and teachers
    softcap: float | None = None,
    old_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,  # int32|int64 [S + 1]: the sequences of packed rows
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """`linear_policy_loss` plus the analytic terms of J; minimised. Formula: module docstring.

    With no advantages and no rewards it is those terms alone. Every term has the row weight of the
    objective's reduction; the gradient is that of J where all rows weigh the same ("seq_sum", the
    default's, "fixed", "token", "sum"). Direct terms have no importance ratio. A sequence-level
    objective gets the future terms by a REINFORCE pass of their own. Rows that `mask` leaves out
    cost nothing. On a GPU a bias costs a host sync.

    metrics: those of `linear_policy_loss`; each teacher's mean divergence per unmasked token, by
    its name; entropy, over unmasked tokens where f_t needs it; future: the root mean square of A_t.

    Raises ValueError / TypeError naming the argument; NonFiniteError for NaN logits, and for a
    divergence that is infinite (a token that one side cannot produce).
    """
    o = objectives.resolve(objective)
    teachers = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
    _check_analytic(o, teachers, entropy_coef, groups, future, softcap)
    targets = _check.targets("targets", targets, hidden.shape[:-1])
    if targets.ndim != 2 and segments is None:
        raise _check.fail("targets", targets, f"[B, T], or {REMEDY}")
    if advantages is not None and rewards is not None:
        raise ValueError("advantages, rewards: got both; allowed: at most one of them")
    if rewards is not None:
        advantages = group_advantages(rewards, groups, estimator=o.advantage, backend=backend)  # type: ignore[arg-type]
    elif advantages is None:
        count = len(targets) if segments is None else len(segments) - 1
        advantages = hidden.new_zeros(count, dtype=torch.float32)
    common: dict[str, Any] = dict(
        bias=bias, temperature=temperature, softcap=softcap, mask=mask, backend=backend,
        segments=segments,
    )  # fmt: skip
    stats = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    plain = SCORE.replace(reduction=o.reduction, max_length=o.max_length)
    _, (task, row_weight, *_), _ = prepare(
        targets.shape, hidden.device, plain, advantages, None, None, None, mask, normalizer, stats,
        segments=segments, owner="targets",
    )  # fmt: skip
    task, row_weight = task.view(targets.shape), row_weight.view(targets.shape)
    live = row_weight != 0

    metrics, direct, cost = {}, row_weight.new_zeros(()), torch.zeros_like(row_weight)
    entropy = None
    for teacher in teachers:
        found = _divergence(hidden, weight, teacher, bias, temperature, live, backend)
        term = teacher.coef * found.divergence
        if entropy is None:
            entropy = found.entropy
            term = term - entropy_coef * entropy
        direct, cost = direct + (row_weight * term).sum(), cost + term.detach()
        metrics[teacher.name] = _mean(found.divergence, live)
    if entropy is None and entropy_coef:
        o = o.replace(entropy_coef=entropy_coef)  # its gradient comes with the policy's
        if future:
            with torch.no_grad():
                entropy = linear_token_logprobs(
                    hidden, weight, targets.where(live, -100), bias=bias, temperature=temperature,
                    softcap=softcap, backend=backend,
                ).entropy  # fmt: skip
            cost = -entropy_coef * entropy
    if entropy is not None:
        metrics["entropy"] = _mean(entropy, live)

    to_come = None
    if future and groups is not None and (teachers or entropy_coef):
        to_come = future_advantages(
            cost, groups, mask=live, segments=segments, future=future, discount=discount,
            backend=backend,
        )  # fmt: skip
        metrics["future"] = (to_come.square().sum() / live.sum().clamp(min=1)).sqrt()
    merged = to_come is not None and o.row_local
    if to_come is not None and merged:
        task = task + to_come
    with token_level() if to_come is not None else contextlib.nullcontext():
        out = linear_policy_loss(
            hidden, weight, targets, task, objective=o, old_logp=old_logp,
            sampler_logp=sampler_logp, normalizer=normalizer, **common,
        )  # fmt: skip
        loss = out.loss + direct
        if to_come is not None and not merged:
            loss = loss + linear_policy_loss(
                hidden, weight, targets, to_come, objective=plain, normalizer=normalizer, **common
            ).loss  # fmt: skip
    return PolicyLoss(loss, {**out.metrics, **metrics})


def _check_analytic(
    o: Objective,
    teachers: tuple[Teacher, ...],
    entropy_coef: float,
    groups: Tensor | None,
    future: float,
    softcap: float | None,
) -> None:
    for index, teacher in enumerate(teachers):
        if not isinstance(teacher, Teacher):
            allowed = "vgkern.costate.Teacher"
            raise TypeError(
                f"teachers[{index}]: got {_check.describe(teacher)}; allowed: {allowed}"
            )
        if teacher.name in RESERVED or teacher.name in [t.name for t in teachers[:index]]:
            raise ValueError(
                f"teachers[{index}].name: got {teacher.name!r}; allowed: a name of no other "
                f"teacher and of no metric but 'kl': {', '.join(sorted(RESERVED))}"
            )
    if o.beta:
        raise _check.fail("objective.beta", o.beta, "0; pass the reference as a Teacher")
    if o.entropy_coef:
        raise _check.fail("objective.entropy_coef", o.entropy_coef, "0; pass entropy_coef=")
    if not -torch.inf < entropy_coef < torch.inf:
        raise _check.fail("entropy_coef", entropy_coef, "a finite number")
    if not 0 <= future < torch.inf:
        raise _check.fail("future", future, "a finite number >= 0")
    if future and groups is None and (teachers or entropy_coef):
        raise ValueError("groups: got None; allowed: int64 ids [B], or future=0")
    if teachers and softcap is not None:
        allowed = "None with teachers; a soft-capped head has the sampled forms only"
        raise _check.fail("softcap", softcap, allowed)


def _mean(x: Tensor, live: Tensor) -> Tensor:
    return x.detach().where(live, 0).sum() / live.sum().clamp(min=1)


def _divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    bias: Tensor | None,
    temperature: float,
    live: Tensor,
    backend: str | None,
) -> Divergence:
    """`linear_divergence` of heads that may have a bias: its parts become columns of the weight."""
    h, w, th, tw = hidden, weight, teacher.hidden, teacher.weight.detach()
    if tw.shape[0] != w.shape[0]:
        allowed = f"the vocabulary of the student, [{w.shape[0]}, Ht]"
        raise _check.fail(f"teacher {teacher.name!r}: weight", tw, allowed)
    ids, none = produced(bias, teacher.bias)
    other = None if teacher.bias is None else teacher.bias.detach()
    if ids is not None and bias is not None and other is not None:
        w, tw, bias, other = (x.index_select(0, ids) for x in (w, tw, bias, other))
    if not none:
        h, w = _with_columns(h, w, bias)
        th, tw = _with_columns(th, tw, other)
    out = linear_divergence(
        h, w, th, tw, kind=teacher.kind, temperature=temperature, mask=live, backend=backend
    )
    if _check.can_look(hidden.device) and bool(out.divergence.isinf().any()):
        at = out.divergence.isinf().nonzero()[0].tolist()
        raise _check.NonFiniteError(
            f"teacher {teacher.name!r}: {teacher.kind} is infinite at row {at}; allowed: heads "
            f"that can produce the same tokens, or kind='jsd'"
        )
    return out


def _with_columns(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[h, 1...] and [W, b]: in half precision b is three parts, whose sum is b in fp32."""
    columns = weight.new_zeros(len(weight), COLUMNS)
    parts: list[Tensor] = []
    rest = bias
    if bias is not None:
        for _ in range(3):
            assert rest is not None
            part = rest.to(weight.dtype)
            parts.append(part)  # the first carries the gradient of the bias
            left = (rest - part.to(rest.dtype)).detach()
            rest = left.nan_to_num(0.0, 0.0, 0.0)  # what overflows to -inf is one part
        columns = torch.cat([torch.stack(parts, 1), columns[:, len(parts) :]], 1)
    return (
        torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], COLUMNS)], -1),
        torch.cat([weight, columns], 1),
    )
