"""linear_policy_loss for row-local objectives: per chunk of rows the logits, their statistics, the
policy terms and the gradient, while the block is in memory once."""

import torch

from . import linear
from . import policy_loss as policy_kernels
from . import rows as row_kernels

IGNORED = -100  # a row whose coefficients are 0 whatever its logits say


def linear_policy_loss_fwd(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    targets,  # [N] int64
    advantages,  # [N] fp32
    row_weight,  # [N], 0 where masked
    old_logp,  # [N] or None, as are ref_logp and sampler_logp
    ref_logp,
    sampler_logp,
    temperature,
    softcap,
    objective,
    needs,
    seed=0,
    tau=1.0,
    costate=None,  # [N, He]: adds the third term of the row gradient
    embedding=None,  # [V, He]
    sequence=None,  # [N] int64, as is position; None: relaxation "expected"
    position=None,
    costate_scale=None,  # [] fp32
    rows=row_kernels,
):
    policy = policy_kernels if rows is row_kernels else rows
    grads = linear.Grads(hidden, weight, bias, needs, temperature, softcap, IGNORED, rows)
    logp = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    beta, entropy_coef = objective[6], objective[13]
    live = row_weight != 0
    if not beta and not entropy_coef:
        live = live & (advantages != 0)
    given = (advantages, row_weight, old_logp, ref_logp, sampler_logp)
    partials, costates = [], None
    if costate is not None and any(needs):
        third = (seed, tau, costate, embedding, sequence, position, costate_scale)
        costates = linear.Costates(*third)
    # a row that is read for its costate alone: a NaN there would spoil the gradients unseen
    carried = torch.zeros_like(live) if costates is None else costates.live & ~live
    targets = targets.masked_fill(~(live | carried), IGNORED)
    spoiled = torch.zeros((), dtype=torch.bool, device=hidden.device)
    blocks = 1 if costates is None else 2
    for part in linear.chunks(hidden.shape[0], blocks * weight.shape[0]) or [slice(0, 0)]:
        logits = linear.mm32(hidden[part], weight.t())
        stats = rows.row_stats(logits, bias, targets[part], temperature, softcap, IGNORED)
        if costates is not None:
            spoiled = spoiled | (carried[part] & stats[0].isnan()).any()
        logp[part] = stats[0].masked_fill(carried[part], 0)
        tokens = (None if t is None else t[part][:, None] for t in (logp, *given))
        c, e, partial = policy.policy_terms(*tokens, stats[1][:, None], objective)
        partials.append(partial)
        if any(needs) and logits.shape[0]:
            grads.add(part, logits, targets[part], *stats, c[:, 0], e[:, 0], costates)
    loss, counts = policy.totals(partials)
    loss = loss.masked_fill(spoiled, torch.nan)
    return loss, logp, counts, *grads.finish(as_input=False)
