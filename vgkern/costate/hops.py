"""Costates that pass through K sampled tokens, by K parallel backward passes (formulas ours).

    X [B, L, He]   input embeddings, X[:, i+1] = E[y_i]        h [B, L, H] = model(X)
    lambda^(0) = dD/dX of D, the differentiable part of an objective, through everything
    M: costate lambda at X[:, i+1] -> dh_i = J_i^T lambda, the sampled token's share of the row
       gradient (`noisy_embedding`) -> (dh/dX)^T dh, attention to the earlier inputs
    lambda = sum_{k <= K} M^k lambda^(0)

M is strictly causal, hence nilpotent. The result is the gradient of the straight-through rollout,
X[:, i+1] = (onehot + q - sg(q)) sg(E) + sg(onehot) E, truncated to paths that cross at most K
sampled tokens; with K = L - 1 it is its sequential backpropagation, exactly. K = 0 is ordinary
training. Each of the K passes is one backward over the teacher-forced sequences that asks for
dX alone; the last crossing rides in the one backward that makes the weights' gradient.

D must not hold the score A log pi: that estimator already accounts for what the sampled token
changes, and its costate, pushed through the token again, is pure bias. See `tests/test_costate_*`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vgkern.costate import _graph
from vgkern.ops import _check
from vgkern.ops.costate import Costate
from vgkern.ops.linear_sample import linear_sample
from vgkern.ops.linear_token_logprobs import linear_logits_ref
from vgkern.ops.noise import Noise
from vgkern.ops.noisy_embedding import noisy_embedding


@dataclass(eq=False)
class Hops:
    """What `hops` returns.

    value: [B, L-1, He] costate at the next input of each row, through at most K - 1 more sampled
        tokens; 0 where `mask` is; detached. It enters the row gradient as its third term.
    norms: [K] Frobenius norm of M^k lambda^(0) over all inputs, k = 0 .. K-1.
    """

    value: Tensor
    norms: Tensor
    _local: Tensor | None = field(repr=False)  # lambda^(0) [B, L, He]
    _link: "_Link" = field(repr=False)
    _objective: Tensor = field(repr=False)

    def costates(self) -> Tensor:
        """lambda [B, L, He] = sum_{k <= K} M^k lambda^(0), detached: one more activation backward.

        Call it before `backward`, which frees the graph.
        """
        local = self._local
        if local is None:  # K = 0
            return self._link.local(self._objective)
        return local + self._link.pull(self.value)

    def term(self, weight: float = 1.0) -> Costate:
        """The crossings as `costate=` of `linear_policy_loss` or `linear_token_logprobs` over the
        rows hidden[:, :-1]: policy, entropy and costate terms in one pass over the logits.

            loss = linear_policy_loss(hidden[:, :-1], ..., costate=h.term(a)).loss
            (loss + a * D).backward()

        is `h.backward(loss without it, weight=a)`, with one recompute of the logits less. A factor
        of that loss is a factor of the term: for (1 - a) * loss the weight is a / (1 - a). At
        a = 1 no loss is left to carry the term: `h.backward(None, weight=1.0)` then. Give the loss
        the temperature, bias, soft-cap and mask that `hops` got.
        """
        link = self._link
        relaxation, tau = link.options["relaxation"], link.options["tau"]
        return Costate(self.value, _detached(link.embedding), link.noise, relaxation, tau, weight)

    def backward(self, score_loss: Tensor | None = None, *, weight: float = 1.0) -> None:
        """One backward of `score_loss + weight * D`, D with paths through up to K sampled tokens.

        Gradients add up in `.grad` of every leaf, like `Tensor.backward`; the graph is freed. For a
        D that is also scored pass (1 - weight) * score_loss, see `Mix`. Raises ValueError when
        there is nothing to do.
        """
        roots = [] if score_loss is None else [score_loss]
        grads: list[Tensor | None] = [None] * len(roots)
        if weight:
            roots.append(self._objective)
            grads.append(torch.full_like(self._objective, weight))
            if self._local is not None:
                roots.append(self._link.tokens_to_inputs())
                grads.append((weight * self.value).to(roots[-1].dtype))
        if not roots:
            raise ValueError("weight: got 0 without a score_loss; allowed: one of the two")
        torch.autograd.backward(roots, grads)


def hops(
    objective: Tensor,  # scalar D, to be minimised, with its graph
    inputs_embeds: Tensor,  # [B, L, He], X
    hidden: Tensor,  # [B, L, H] = model(X), before the head
    weight: Tensor,  # [V, H] head
    embedding: Tensor,  # [V, He]: X[:, i+1] = embedding[tokens[:, i]]
    tokens: Tensor,  # [B, L-1] int64, y; anything where mask is 0
    k: int = 1,
    *,
    mask: Tensor | None = None,  # [B, L-1] bool or 0/1: was y_i sampled; None: all were
    noise: Noise | None = None,  # rows [B, L-1]: what `linear_sample` drew y with
    relaxation: str = "expected",
    tau: float = 1.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    agreement: float = 1.0,
    backend: str | None = None,
) -> Hops:
    """K backward passes over a teacher-forced batch; `Hops.backward` then makes the gradients.

    `inputs_embeds` is a leaf or E(ids) with a graph; in the latter case E gets onehot^T lambda and
    nothing else. A reward model or teacher with a table of its own reads it from the same tensor:
    X = cat([E, E2], -1)[ids], of which each model takes its columns, and embedding =
    cat([E, E2], -1).

    relaxation "gumbel" needs the noise that sampled y. On a CPU it is replayed: the share of
    tokens that hidden, head and noise choose again (near-ties count as chosen) must be at least
    `agreement`. Lower it for tokens of an older policy or of a truncated distribution.

    Run the model eagerly: a compiled one makes its weights' gradients in every pass, and may not
    allow a second pass at all.

    Raises ValueError / TypeError naming the argument: shapes, k < 0, tau <= 0, an embedding of
    another vocabulary, an embedding that did not make inputs_embeds or noise that did not draw the
    tokens (looked at on a CPU only), a hidden that does not depend on inputs_embeds, an objective
    that does not, or that holds the score of the sampled tokens. The latter is recognised where a
    fused op of this package, or any gather, indexing or cross-entropy of `tokens` over [..., V]
    (all sampled rows, shifted and padded with ignored labels or not), lies between objective and
    hidden or a trained head; not behind one-hot products or compiled graphs.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise _check.fail("k", k, "an int >= 0")
    _check.positive("tau", tau)
    x = _check.floating("inputs_embeds", inputs_embeds, 3)
    b, length, width = x.shape
    h = _check.floating("hidden", hidden, 3)
    if h.shape[:2] != x.shape[:2]:
        raise _check.fail("hidden", h, f"[{b}, {length}, H], a row for each of inputs_embeds")
    rows = torch.Size((b, max(length - 1, 0)))
    tokens = _check.targets("tokens", tokens, rows)
    _check.same_device(hidden=h, inputs_embeds=x, tokens=tokens, mask=mask)
    live = torch.ones(rows, dtype=torch.bool, device=h.device)
    if mask is not None:
        live = _check.row_mask("mask", mask, rows)
    tokens = _check.target_range("tokens", tokens, weight.shape[0], live).where(live, 0)
    if not 0 <= agreement <= 1:
        raise _check.fail("agreement", agreement, "0 <= agreement <= 1, a share of the tokens")
    options = {
        "bias": bias, "relaxation": relaxation, "tau": tau, "temperature": temperature,
        "softcap": softcap, "backend": backend,
    }  # fmt: skip
    link = _Link(x, h, weight, embedding, tokens, live, noise, options)
    if embedding.shape[1] != width:
        raise _check.fail("embedding", embedding, f"[V, {width}], the width of inputs_embeds")
    _check_table(x, embedding, tokens, live)
    if relaxation == "gumbel" and _check.can_look(h.device) and bool(live.any()):
        share = _replayed(link)
        if share < agreement:
            raise ValueError(
                f"noise: chooses {share:.1%} of the sampled tokens again; allowed: at least "
                f"{agreement:.1%}; pass the noise, head, temperature and soft-cap that drew them, "
                "lower `agreement` for tokens of an older policy, or use relaxation='expected'"
            )
    _check_graph(objective, link)
    if k == 0:
        return Hops(h.new_zeros(*rows, width, dtype=x.dtype), h.new_zeros(0), None, link, objective)
    local = total = step = link.local(objective)
    norms = [step.norm()]
    for _ in range(k - 1):
        if _check.can_look(h.device) and not bool(step.any()):
            norms.append(norms[-1])  # M is nilpotent: nothing is left to carry
            continue
        step = link.pull(step[:, 1:])
        total = total + step
        norms.append(step.norm())
    value = total[:, 1:].masked_fill(~live[..., None], 0)
    return Hops(value, torch.stack(norms), local, link, objective)


class _Link:
    """Sampled tokens as the edge from hidden row i to input i + 1, and the way back along it."""

    def __init__(
        self,
        inputs_embeds: Tensor,
        hidden: Tensor,
        weight: Tensor,
        embedding: Tensor,
        tokens: Tensor,
        live: Tensor,
        noise: Noise | None,
        options: dict,
    ) -> None:
        self.inputs, self.hidden, self.weight = inputs_embeds, hidden, weight
        self.embedding, self.tokens, self.live = embedding, tokens, live
        self.noise, self.options = noise, options
        self.row = hidden[:, :-1].detach().requires_grad_()  # asks for dh alone
        bias = options["bias"]
        frozen = {**options, "bias": bias if bias is None else bias.detach()}
        with torch.enable_grad():
            self.next = noisy_embedding(
                self.row, weight.detach(), _detached(embedding), tokens, noise, **frozen
            )

    def tokens_to_inputs(self) -> Tensor:
        """[B, L-1, He], E[y] whose gradient goes to hidden and head, and not to E: the lookup that
        made `inputs_embeds` has that one already."""
        return noisy_embedding(
            self.hidden[:, :-1], self.weight, _detached(self.embedding), self.tokens, self.noise,
            **self.options
        )  # fmt: skip

    def local(self, objective: Tensor) -> Tensor:
        """lambda^(0) [B, L, He]."""
        costate = self._activations(objective, None)
        _check.no_nan("objective", costate.flatten(0, -2).sum(-1), "its gradient at inputs_embeds")
        return costate

    def pull(self, costate: Tensor) -> Tensor:
        """M: costate at inputs 1 .. L-1 [B, L-1, He] -> costate at all inputs [B, L, He]."""
        sampled = costate.masked_fill(~self.live[..., None], 0).to(self.next.dtype)
        (dh,) = torch.autograd.grad(self.next, self.row, sampled, retain_graph=True)
        return self._activations(self.hidden, F.pad(dh, (0, 0, 0, 1)))

    def _activations(self, root: Tensor, grad: Tensor | None) -> Tensor:
        """d root / d inputs, and nothing else: `retain_grad` fires in autograd.grad too, so that a
        .grad kept on the way is put back."""
        kept = [(t, t.grad) for t in (self.inputs, self.hidden) if t.retains_grad]
        (out,) = torch.autograd.grad(root, self.inputs, grad, retain_graph=True)
        for t, before in kept:
            t.grad = before
        return out


def _detached(x: object) -> Tensor:
    return _check.tensor("embedding", x).detach()


def _check_table(x: Tensor, embedding: Tensor, tokens: Tensor, live: Tensor) -> None:
    """On a CPU: the sampled inputs are rows of `embedding`, up to rounding."""
    if not _check.can_look(x.device):
        return
    got, want = x.detach()[:, 1:][live], embedding.detach()[tokens[live]].to(x.dtype)
    if not torch.allclose(got, want, rtol=1e-2, atol=1e-6):
        at = live.nonzero()[int((got - want).abs().sum(-1).argmax())].tolist()
        raise ValueError(
            f"embedding: its row of tokens{at} is not inputs_embeds[{at[0]}, {at[1] + 1}]; allowed:"
            " the table that made inputs_embeds (times its scale), and tokens = ids[:, 1:]"
        )


def _check_graph(objective: Tensor, link: _Link) -> None:
    objective = _check.floating("objective", objective)
    if objective.numel() != 1:
        raise _check.fail("objective", objective, "one number")
    if not _graph.reaches(link.hidden, link.inputs):
        raise ValueError(
            "hidden: does not depend on inputs_embeds; the model ignores it, or ran without "
            "gradients; allowed: hidden states of a forward pass over inputs_embeds, which "
            "requires grad"
        )
    if not _graph.reaches(objective, link.inputs):
        raise ValueError(
            "objective: no gradient reaches inputs_embeds; allowed: the differentiable part of an "
            "objective, as a function of hidden or inputs_embeds; without one hops carry nothing"
        )
    name = _graph.score_node(
        objective, link.hidden, link.inputs, link.weight, link.tokens, link.live, len(link.weight)
    )
    if name:
        raise ValueError(
            f"objective: holds the log-probability of the sampled tokens ({name}); allowed: its "
            "differentiable part only. The score A log pi already carries the effect of the "
            "sampled token, and its costate pushed through the token again is pure bias: pass the "
            "score to Hops.backward(score_loss)"
        )


@torch.no_grad()
def _replayed(link: _Link) -> float:
    """Share of the sampled tokens that are the argmax again, or within rounding of it."""
    live, o = link.live, link.options
    assert link.noise is not None
    sequence, position = (
        t.view(live.shape)[live] for t in link.noise.rows(live.shape, live.device)
    )
    noise = Noise(link.noise.seed, sequence, position)
    h, y = link.hidden[:, :-1][live], link.tokens[live]
    keys = ("bias", "temperature", "softcap", "backend")
    again = linear_sample(h, link.weight, noise, **{key: o[key] for key in keys}).token
    other = (again != y).nonzero()[:, 0]
    noise = Noise(noise.seed, sequence[other], position[other])
    z = linear_logits_ref(h[other], link.weight, o["bias"])
    z = z if o["softcap"] is None else o["softcap"] * torch.tanh(z / o["softcap"])
    z = z / o["temperature"] + noise.gumbel(z.shape[-1], z.dtype)
    best = z.amax(-1, keepdim=True)
    rounding = max(torch.finfo(h.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    near = best - z.gather(-1, y[other, None]) <= rounding * best.abs().clamp(min=1)
    return 1 - int((~near).sum()) / len(y)
