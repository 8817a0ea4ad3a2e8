"""linear_policy_loss for row-local objectives: logits a chunk of rows at a time, and what a row's
logits say of the loss and its gradient while the chunk is in memory.

Two forms, by the width of the head. Materialised: the product writes fp32 logits, one kernel reads
them twice and writes the gradient over them. Recomputed, 16-bit only: no logit is written; a tile's
logits are made twice, for the statistics and for the gradient, which is written in 16 bits
(linear_grad.recompute_pays has the arithmetic). The cuda backend has the first form alone.
"""

import torch

from . import linear, live, memory
from . import policy_loss as policy_kernels
from . import rows as row_kernels
from .linear_grad import linear_grad, recompute_pays
from .linear_token_logprobs import statistics
from .live import IGNORED


@memory.says
def linear_policy_loss_fwd(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    targets,  # [N] int64; outside [0, V): NaN, where the row has a gradient
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
    head = (hidden, weight, bias, targets)
    given = (advantages, row_weight, old_logp, ref_logp, sampler_logp)
    options = (temperature, softcap, objective, needs, rows)
    if costate is None or not any(needs):
        return _Loss(*head, given, *options).run()
    third = (seed, tau, costate, embedding, sequence, position, costate_scale)
    return _with_costate(*head, given, *options, third)


class _Loss:
    """One call without a costate: the rows that have a gradient, in either form."""

    def __init__(
        self, hidden, weight, bias, targets, given, temperature, softcap, objective, needs, rows
    ):  # fmt: skip
        self.weight, self.bias, self.needs, self.rows = weight, bias, needs, rows
        self.scalars, self.objective, self.given = (temperature, softcap), objective, given
        self.policy = policy_kernels if rows is row_kernels else rows
        count, vocab = hidden.shape[0], weight.shape[0]
        advantages, row_weight = given[:2]
        always = objective[6] != 0 or objective[13] != 0  # KL, entropy
        self.count = count
        self.kept = live.kept(hidden, vocab, lambda: live.alive(advantages, row_weight, always))
        hidden, targets, *self.mine = (live.taken(x, self.kept) for x in (hidden, targets, *given))
        replaced = live.replaced if rows is row_kernels else live.replaced_by_torch
        copy = needs[1] and self.kept is None
        self.hidden, self.targets = replaced(
            hidden, targets, *self.mine[:2], vocab, always, copy
        )  # fmt: skip

    def run(self):
        narrow = self.hidden.dtype != torch.float32
        width, size = self.hidden.shape[1], self.hidden.element_size()
        if self.rows is row_kernels and narrow and recompute_pays(width, size):
            return self.recomputed()
        return self.materialised()

    def materialised(self):
        n, vocab = self.hidden.shape[0], self.weight.shape[0]
        logp, entropy = (self.hidden.new_empty(n, dtype=torch.float32) for _ in range(2))
        scale = torch.empty_like(logp) if self.hidden.dtype == torch.float16 else None
        grads = self.grads(self.hidden)
        for part in memory.chunks(n, vocab, self.hidden.device):
            logits = linear.mm32(self.hidden[part], self.weight.t())
            dz = linear.over(logits, self.hidden.dtype) if any(self.needs) else None
            up = None if scale is None else scale[part]
            self.rows.row_policy(
                logits, self.bias, self.targets[part], *(t if t is None else t[part]
                for t in self.mine), logp[part], entropy[part], up, *self.scalars, IGNORED,
                self.objective, dz
            )  # fmt: skip
            if dz is not None:
                grads.products(part, dz, up)
            del logits, dz  # before the next chunk's are made
        logp = self.spread(logp)
        _, _, partial = self.terms(logp, self.spread(entropy))
        loss, counts = self.policy.totals(partial)
        return loss, logp, counts, *self.finish(grads)

    def recomputed(self):
        head = (self.hidden, self.weight, self.bias, self.targets)
        logp, entropy, lse = statistics(*head, *self.scalars, IGNORED)
        full = self.spread(logp)
        c, e, partial = self.terms(full, self.spread(entropy))
        loss, counts = self.policy.totals(partial)
        if not any(self.needs):
            return loss, full, counts, *self.finish(self.grads(self.hidden))
        c, e = live.taken(c, self.kept), live.taken(e, self.kept)
        rows = (self.hidden, self.targets, logp, entropy, lse, c, e)
        # of the rows that are here, those that the objective has left a gradient
        moved = live.kept(self.hidden, self.weight.shape[0], lambda: (c != 0) | (e != 0))
        hidden, *rows, c, e = (live.taken(x, moved) for x in rows)
        self.kept = moved if self.kept is None else live.taken(self.kept, moved)
        grads = self.grads(hidden)
        n, vocab, size = hidden.shape[0], self.weight.shape[0], hidden.element_size()
        c, e, scale = grads.scaled(c, e, 1 / self.scalars[0])
        for part in memory.chunks(n, vocab, hidden.device, size):
            dz = hidden.new_empty(hidden[part].shape[0], vocab)
            linear_grad(
                hidden[part], self.weight, self.bias, *(x[part] for x in (*rows, c, e)),
                *self.scalars, IGNORED, dz
            )  # fmt: skip
            grads.products(part, dz, None if scale is None else scale[part])
            del dz  # before the next chunk's is made
        return loss, full, counts, *self.finish(grads)

    def grads(self, hidden):
        options = (*self.scalars, IGNORED, self.rows)
        return linear.Grads(hidden, self.weight, self.bias, self.needs, *options)

    def terms(self, logp, entropy):
        """(c, e, sums and extremes) of all rows, those that are left out included."""
        tokens = (None if t is None else t[:, None] for t in (logp, *self.given, entropy))
        c, e, partial = self.policy.policy_terms(*tokens, self.objective)
        return c[:, 0], e[:, 0], partial

    def spread(self, x):
        return live.spread(x, self.kept, self.count)

    def finish(self, grads):
        dhidden, *others = grads.finish(as_input=False)
        return (self.spread(dhidden) if self.needs[0] else dhidden), *others


def _with_costate(
    hidden, weight, bias, targets, given, temperature, softcap, objective, needs, rows, third
):  # fmt: skip
    policy = policy_kernels if rows is row_kernels else rows
    vocab = weight.shape[0]
    always = objective[6] != 0 or objective[13] != 0
    alive = live.alive(*given[:2], always)
    costates = linear.Costates(*third)
    # a row that is read for its costate alone: a NaN there would spoil the gradients unseen
    carried = costates.live & ~alive
    targets = live.in_vocab(targets, vocab).masked_fill_(~(alive | carried), IGNORED)
    spoiled = torch.zeros((), dtype=torch.bool, device=hidden.device)
    if needs[1]:
        hidden = linear.clean(hidden, alive | carried)
    grads = linear.Grads(hidden, weight, bias, needs, temperature, softcap, IGNORED, rows)
    logp = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    partials = []
    for part in memory.chunks(hidden.shape[0], 2 * vocab, hidden.device) or [slice(0, 0)]:
        logits = linear.mm32(hidden[part], weight.t())
        stats = rows.row_stats(logits, bias, targets[part], temperature, softcap, IGNORED)
        spoiled = spoiled | (carried[part] & stats[0].isnan()).any()
        logp[part] = stats[0].masked_fill(carried[part], 0)
        tokens = (None if t is None else t[part][:, None] for t in (logp, *given))
        c, e, partial = policy.policy_terms(*tokens, stats[1][:, None], objective)
        partials.append(partial)
        if logits.shape[0]:
            grads.add(part, logits, targets[part], *stats, c[:, 0], e[:, 0], costates)
        del logits
    loss, counts = policy.totals(torch.cat(partials))
    loss = loss.masked_fill(spoiled, torch.nan)
    return loss, logp, counts, *grads.finish(as_input=False)
