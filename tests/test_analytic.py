"""Analytic objectives against exact enumeration: the mean over all sequences is the gradient."""

import itertools

import pytest
import torch

from vgkern import linear_policy_loss, linear_token_logprobs
from vgkern.costate import Teacher, analytic, analytic_loss, future_advantages
from vgkern.objectives import PRESETS

V, T, H, STOP = 3, 3, 4, 0  # 15 sequences: token 0 ends one


def sequences():
    """Every sequence, padded with 0, and its mask: shorter ones end with STOP."""
    tokens, masks = [], []
    for ids in itertools.product(range(V), repeat=T):
        length = next((i + 1 for i, y in enumerate(ids) if y == STOP), T)
        if any(ids[length:]):
            continue  # the same sequence as the one that is padded with 0
        tokens.append(ids)
        masks.append([t < length for t in range(T)])
    return torch.tensor(tokens), torch.tensor(masks)


class World:
    """A policy with a hidden state of its own for every prefix, a reference and a teacher."""

    def __init__(self):
        g = torch.Generator().manual_seed(7)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.tokens, self.mask = sequences()
        seen = [[tuple(row[:t]) for t in range(T)] for row in self.tokens.tolist()]
        names = sorted({prefix for row in seen for prefix in row})
        self.prefix = torch.tensor([[names.index(prefix) for prefix in row] for row in seen])
        self.table = draw(len(names), H).requires_grad_()
        self.weight = draw(V, H).requires_grad_()
        self.bias = draw(V).requires_grad_()
        self.others = [(draw(len(names), 2), draw(V, 2), draw(V)) for _ in range(2)]

    @property
    def parameters(self):
        return self.table, self.weight, self.bias

    def hidden(self, rows):
        return self.table[self.prefix[rows]]

    def log_softmax(self, rows, of=None):
        h, w, b = (self.table, self.weight, self.bias) if of is None else self.others[of]
        return (h[self.prefix[rows]] @ w.T + b).log_softmax(-1)

    def costs(self, rows, beta, alpha, kind="reverse_kl"):
        """f_t of whole sequences, written out."""
        lp = self.log_softmax(rows)
        f = alpha * (lp.exp() * lp).sum(-1)
        for k, coef in enumerate(beta):
            lq = self.log_softmax(rows, k)
            one, two = (lp, lq) if kind == "reverse_kl" else (lq, lp)
            f = f + coef * (one.exp() * (one - two)).sum(-1)
        return f.where(self.mask[rows], 0)

    def logp(self, rows):
        lp = self.log_softmax(rows).gather(-1, self.tokens[rows][..., None])[..., 0]
        return lp.where(self.mask[rows], 0)

    def teachers(self, rows, beta, kind="reverse_kl"):
        return [
            Teacher(h[self.prefix[rows]], w, b, kind, coef, f"kl{k}")
            for k, (coef, (h, w, b)) in enumerate(zip(beta, self.others, strict=False))
        ]

    def gradient(self, loss):
        grads = torch.autograd.grad(loss, self.parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])

    def estimator(self, size, loss):
        """Over every group of `size` sequences: mean and mean square of the gradient of
        loss(rows, hidden, groups) with respect to the table of hidden states."""
        p = self.logp(everything(self)).sum(1).exp().detach()
        rows = torch.cartesian_prod(*[everything(self)] * size)
        p, count, rows = p[rows].prod(1), len(rows), rows.flatten()
        hidden = self.hidden(rows).detach().requires_grad_()
        groups = torch.arange(count).repeat_interleave(size)
        (dh,) = torch.autograd.grad(loss(rows, hidden, groups), hidden)
        at = self.prefix[rows].flatten() + len(self.table) * groups.repeat_interleave(T)
        each = dh.new_zeros(count * len(self.table), H).index_add(0, at, dh.flatten(0, 1))
        each = count * each.view(count, -1)  # the loss is a mean over sequences
        return p @ each, p @ each.square().sum(1)

    def truth(self, loss):
        return torch.autograd.grad(loss, self.table)[0].flatten()


@pytest.fixture(scope="module")
def world():
    return World()


def everything(world):
    return torch.arange(len(world.tokens))


BETA, ALPHA = (0.7, 0.4), 0.3


@pytest.mark.parametrize("kind, size", [("reverse_kl", 2), ("forward_kl", 2), ("reverse_kl", 3)])
def test_its_mean_over_all_sequences_is_the_gradient(world, kind, size):
    rows = everything(world)
    f = world.costs(rows, BETA, ALPHA, kind).sum(1)
    truth = world.truth((world.logp(rows).sum(1).exp() * f).sum())

    def loss(rows, hidden, groups):
        return analytic_loss(
            hidden, world.weight, world.tokens[rows], world.teachers(rows, BETA, kind),
            entropy_coef=ALPHA, groups=groups, bias=world.bias, mask=world.mask[rows],
        ).loss  # fmt: skip

    mean, _ = world.estimator(size, loss)
    assert (mean - truth).abs().max() < 1e-12 < truth.norm()


def test_entropy_alone(world):
    rows = everything(world)
    f = world.costs(rows, (), ALPHA).sum(1)
    truth = world.truth((world.logp(rows).sum(1).exp() * f).sum())

    def loss(rows, hidden, groups):
        return analytic_loss(
            hidden, world.weight, world.tokens[rows], entropy_coef=ALPHA, groups=groups,
            bias=world.bias, mask=world.mask[rows],
        ).loss  # fmt: skip

    mean, _ = world.estimator(2, loss)
    assert (mean - truth).abs().max() < 1e-12 < truth.norm()


def test_the_baseline_does_not_change_the_mean(world, monkeypatch):
    def loss(rows, hidden, groups):
        return analytic_loss(
            hidden, world.weight, world.tokens[rows], world.teachers(rows, BETA), groups=groups,
            bias=world.bias, mask=world.mask[rows],
        ).loss  # fmt: skip

    mean, _ = world.estimator(2, loss)

    def plain(cost, groups, *, mask, **_):
        f = cost.where(mask, 0)
        return f - f.flip(1).cumsum(1).flip(1)

    monkeypatch.setattr(analytic, "future_advantages", plain)
    same, _ = world.estimator(2, loss)
    assert (same - mean).abs().max() < 1e-12 < same.norm()


def test_a_cost_that_all_states_have_has_no_score():
    cost, groups = torch.rand(6, 9), torch.arange(6) // 3
    want = future_advantages(cost, groups, discount=0.9)
    got = future_advantages(cost + 1000, groups, discount=0.9)
    assert (got - want).abs().max() < 2e-3 < want.norm()


def test_weight_and_discount_of_the_future(world):
    """The mean is df plus `future` times the discounted score, enumerated term by term."""
    future, discount = 0.5, 0.7
    rows = everything(world)
    f, logp = world.costs(rows, BETA, ALPHA), world.logp(rows)
    p, loss = logp.sum(1).exp().detach(), f.sum(1)
    for t in range(T):
        for s in range(t + 1, T):
            loss = loss + future * discount ** (s - t - 1) * f[:, s].detach() * logp[:, t]
    truth = world.truth((p * loss).sum())

    def estimate(rows, hidden, groups):
        return analytic_loss(
            hidden, world.weight, world.tokens[rows], world.teachers(rows, BETA), groups=groups,
            entropy_coef=ALPHA, bias=world.bias, mask=world.mask[rows], future=future,
            discount=discount,
        ).loss  # fmt: skip

    mean, _ = world.estimator(2, estimate)
    assert (mean - truth).abs().max() < 1e-12 < truth.norm()


def test_own_costs_of_sampled_log_ratios(world):
    """`own`: the score of sampled log-ratios to go is the gradient of the sequence's KL."""
    rows = everything(world)
    lq = world.log_softmax(rows, 0).gather(-1, world.tokens[..., None])[..., 0]
    ratio = (world.logp(rows) - lq).where(world.mask, 0)
    truth = world.truth((world.logp(rows).sum(1).exp() * world.costs(rows, (1.0,), 0).sum(1)).sum())

    def estimate(rows, hidden, groups):
        advantages = future_advantages(ratio[rows], groups, mask=world.mask[rows], own=True)
        return linear_policy_loss(
            hidden, world.weight, world.tokens[rows], advantages, objective="rloo",
            bias=world.bias, mask=world.mask[rows],
        ).loss  # fmt: skip

    mean, _ = world.estimator(2, estimate)
    assert (mean - truth).abs().max() < 1e-12 < truth.norm()


def test_future_0_is_the_direct_term(world):
    rows = everything(world)
    out = analytic_loss(
        world.hidden(rows), world.weight, world.tokens, world.teachers(rows, BETA),
        entropy_coef=ALPHA, future=0, bias=world.bias, mask=world.mask,
    )  # fmt: skip
    want = world.costs(rows, BETA, ALPHA).sum() / len(rows)
    assert (world.gradient(out.loss) - world.gradient(want)).abs().max() < 1e-13
    assert torch.allclose(out.loss, want) and "future" not in out.metrics


def test_it_is_its_reference(world):
    rows = torch.tensor([0, 3, 5, 5, 14, 9, 2])
    groups = torch.tensor([4, 9, 4, 9, 4, 9, 4])  # ragged, interleaved
    options = dict(entropy_coef=ALPHA, future=0.8, discount=0.9)
    out = analytic_loss(
        world.hidden(rows), world.weight, world.tokens[rows], world.teachers(rows, BETA),
        groups=groups, bias=world.bias, mask=world.mask[rows], **options,
    )  # fmt: skip
    logits = world.hidden(rows) @ world.weight.T + world.bias
    others = [(world.log_softmax(rows, k), coef) for k, coef in enumerate(BETA)]
    want = analytic.analytic_loss_ref(
        logits, others, world.tokens[rows], groups, world.mask[rows], **options
    )
    assert torch.allclose(out.loss, want, rtol=1e-12)
    assert (world.gradient(out.loss) - world.gradient(want)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_is_the_reference_and_a_task_is_one_pass(world, backend, dtype):
    """With rewards, bias, two teachers, in fp32 and half precision, against fp64."""
    if backend == "cuda":
        pytest.skip("linear_divergence has no kernels for cuda")
    rows = torch.tensor([0, 3, 5, 5, 14, 9, 2, 12])
    groups, rewards = torch.arange(8) // 4, torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1])

    def run(dtype, backend):
        h = world.hidden(rows).detach().to(dtype).requires_grad_()
        w = world.weight.detach().to(dtype).requires_grad_()
        low = [
            Teacher(
                t.hidden.to(dtype), t.weight.to(dtype), t.bias.float(), coef=t.coef, name=t.name
            )
            for t in world.teachers(rows, BETA)
        ]
        up = torch.float64 if dtype == torch.float64 else torch.float32
        b = world.bias.detach().to(up).requires_grad_()
        out = analytic_loss(
            h, w, world.tokens[rows], low, entropy_coef=ALPHA, groups=groups, rewards=rewards,
            objective="grpo", bias=b, mask=world.mask[rows], backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss, (h, w, b))
        return out.loss.double(), torch.cat([g.double().flatten() for g in grads])

    loss, grads = run(dtype, backend)
    want, dwant = run(torch.float64, "torch")
    near = 2e-6 if dtype == torch.float32 else 2e-2
    assert abs(loss - want) < near * 10 and (grads - dwant).norm() < near * 2 * dwant.norm()


def test_a_task_reward_adds_the_policy_loss(world):
    rows, groups = torch.tensor([0, 3, 5, 6]), torch.zeros(4, dtype=torch.int64)
    rewards = torch.tensor([1.0, 0, 0, 1])
    where = (world.hidden(rows), world.weight, world.tokens[rows])
    options = dict(bias=world.bias, mask=world.mask[rows])
    for name in ("grpo", "dapo", "gspo", "cispo_relative", "sapo", "gmpo", "rloo_clip"):
        with_task = analytic_loss(
            *where, world.teachers(rows, BETA), groups=groups, rewards=rewards, objective=name,
            **options,
        ).loss  # fmt: skip
        own = analytic.SCORE.replace(reduction=PRESETS[name].reduction)
        terms = analytic_loss(
            *where, world.teachers(rows, BETA), groups=groups, objective=own, **options
        ).loss
        task = linear_policy_loss(
            *where, rewards=rewards, groups=groups, objective=name, **options
        ).loss
        got, want = world.gradient(with_task), world.gradient(terms) + world.gradient(task)
        assert (got - want).abs().max() < 1e-12, name


def test_masked_rows_are_not_looked_at(world):
    rows, groups = torch.tensor([0, 3, 5, 6]), torch.zeros(4, dtype=torch.int64)
    mask = world.mask[rows]

    def run(garbage):
        fill = (~mask)[..., None]
        h = world.hidden(rows).masked_fill(fill, torch.nan if garbage else 0)
        low = [
            Teacher(
                t.hidden.masked_fill(fill, torch.nan if garbage else 0),
                t.weight,
                t.bias,
                name=t.name,
            )
            for t in world.teachers(rows, BETA)
        ]
        y = world.tokens[rows].masked_fill(~mask, 2**40 if garbage else 0)
        return analytic_loss(
            h, world.weight, y, low, entropy_coef=ALPHA, groups=groups, bias=world.bias, mask=mask
        ).loss

    assert torch.equal(run(True), run(False))
    assert torch.equal(world.gradient(run(True)), world.gradient(run(False)))


def test_a_blocked_id_adds_nothing():
    """A bias of -1e9 in both heads, as padding has: the terms of the head without that row."""
    g = torch.Generator().manual_seed(3)
    h, w = torch.randn(2, 3, 8, generator=g), 40 * torch.randn(5, 8, generator=g)
    th, tw = torch.randn(2, 3, 4, generator=g), 40 * torch.randn(5, 4, generator=g)
    w[1] *= 1e3  # a row that nothing ever trains may hold anything
    bias, kept = torch.tensor([0.0, -1e9, 0, 0, -1e9]), [0, 2, 3]
    y, groups = torch.randint(3, (2, 3), generator=g), torch.zeros(2, dtype=torch.int64)
    options = dict(entropy_coef=ALPHA, groups=groups)
    got = analytic_loss(
        h, w, torch.tensor(kept)[y], Teacher(th, tw, bias), bias=bias, **options
    ).loss
    want = analytic_loss(h, w[kept], y, Teacher(th, tw[kept]), **options).loss
    assert torch.allclose(got, want, rtol=1e-5) and want.isfinite()


@pytest.mark.parametrize("blocked", [-1e9, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_id_that_only_the_student_blocks(dtype, blocked):
    """In fp16 a bias of -1e9 is -inf: the reverse KL, with p = 0 there, stays finite."""
    g = torch.Generator().manual_seed(3)
    h, w, th, tw = (torch.randn(*n, generator=g) for n in ((2, 3, 8), (5, 8), (2, 3, 4), (5, 4)))
    h, w, th, tw = (x.to(dtype).requires_grad_() for x in (h, w, th, tw))
    bias, y = torch.tensor([0.3, blocked, -0.2, 0, 0]), torch.full((2, 3), 2)
    got = analytic_loss(h, w, y, Teacher(th, tw), future=0, bias=bias)
    lp = (h.double() @ w.double().T + bias).log_softmax(-1).where(bias > -1e8, -200.0)
    lq = (th.double() @ tw.double().T).log_softmax(-1)
    want = (lp.exp() * (lp - lq)).sum(-1).mean()
    assert abs(got.metrics["kl"] - want) < 1e-5 * want
    got, want = (torch.autograd.grad(x, (h, w)) for x in (got.loss, 3 * want))
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        assert (a - b).double().norm() < near * b.double().norm()


def test_a_bias_that_starts_at_zero_is_trained(world):
    rows = torch.tensor([0, 3, 5, 6])
    teacher = world.teachers(rows, (1.0, 1.0))[0]

    def gradients(bias):
        loss = analytic_loss(
            world.hidden(rows), world.weight, world.tokens[rows],
            Teacher(teacher.hidden, teacher.weight), future=0, bias=bias, mask=world.mask[rows],
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, [bias, world.weight])

    zero = torch.zeros(V, dtype=torch.float64).requires_grad_()
    (got, _), (want, _) = gradients(zero), gradients((zero + 1e-12).detach().requires_grad_())
    assert torch.allclose(got, want, rtol=1e-9) and got.abs().max() > 1e-3


def test_the_baseline_is_of_those_who_got_there():
    cost = torch.tensor([[1.0, 2, 3], [5, 7, 9], [2, torch.nan, torch.inf]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    got = future_advantages(cost, torch.zeros(3, dtype=torch.int64), mask=mask)
    # to go: [5, 3, 0], [16, 9, 0], [0, -, -]
    want = torch.tensor([[8.0 - 5, 9 - 3, 0], [2.5 - 16, 3 - 9, 0], [10.5, 0, 0]])
    assert torch.equal(got, want)
    own = future_advantages(cost, torch.zeros(3, dtype=torch.int64), mask=mask, future=0, own=True)
    assert torch.equal(own[:, 0], torch.tensor([3.5 - 1, 1.5 - 5, 3.0 - 2]))


def test_metrics_are_means_over_tokens(world):
    rows, groups = torch.tensor([0, 3, 5, 6]), torch.zeros(4, dtype=torch.int64)
    out = analytic_loss(
        world.hidden(rows), world.weight, world.tokens[rows], world.teachers(rows, BETA),
        groups=groups, bias=world.bias, mask=world.mask[rows],
    )  # fmt: skip
    live = world.mask[rows]
    kl = world.costs(rows, (1.0,), 0.0)[live].mean()
    assert torch.allclose(out.metrics["kl0"], kl)
    entropy = linear_token_logprobs(
        world.hidden(rows), world.weight, world.tokens[rows], bias=world.bias
    ).entropy
    assert torch.allclose(out.metrics["entropy"], entropy[live].mean())
    assert not any(m.requires_grad for m in out.metrics.values())


def test_bad_arguments_are_named(world):
    rows, groups = torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int64)
    where = (world.hidden(rows), world.weight, world.tokens[rows])
    teacher = world.teachers(rows, BETA)[0]

    def fails(match, *more, **options):
        with pytest.raises((ValueError, TypeError), match=match):
            analytic_loss(*where, *more, **options)

    fails(r"groups: got None; allowed: int64 ids \[B\], or future=0", teacher)
    fails(r"groups: got a group of one", teacher, groups=torch.arange(2))
    fails(r"future: got .*-1", teacher, groups=groups, future=-1)
    fails(r"gamma: got", teacher, groups=groups, discount=1.5)
    grpo = PRESETS["grpo"]
    fails(r"objective.beta: .*pass the reference as a Teacher", objective=grpo.replace(beta=1.0))
    fails(r"objective.entropy_coef: ", objective=grpo.replace(entropy_coef=1.0))
    fails(r"softcap: got .*None with teachers", teacher, groups=groups, softcap=30.0)
    fails(r"teachers\[0\]: got", [world.weight], groups=groups)
    fails(r"advantages, rewards: got both", advantages=torch.zeros(2), rewards=torch.zeros(2))
    wider = Teacher(teacher.hidden, torch.zeros(V + 1, 2, dtype=torch.float64), name="reference")
    fails(r"teacher 'reference': weight: got .*the vocabulary of the student", wider, groups=groups)
    other = Teacher(teacher.hidden[:, :2], teacher.weight)
    fails(r"teacher_hidden: got", other, groups=groups)
    blocked = torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64)
    fails(
        r"teacher 'kl': reverse_kl is infinite at row \[0, 0\]",
        Teacher(teacher.hidden, teacher.weight, blocked), groups=groups,
    )  # fmt: skip
    one = torch.arange(V, dtype=torch.float64)[:, None].repeat(1, 2)
    twins = [Teacher(teacher.hidden, one, name=name) for name in ("a", "b", "a")]
    fails(r"teachers\[2\]\.name: got 'a'; allowed: .*of no other", twins, groups=groups)
    for name in ("entropy", "future", "loss", "clip_high", "tokens"):
        named = Teacher(teacher.hidden, one, name=name)
        fails(rf"teachers\[0\]\.name: got '{name}'; allowed: ", named, groups=groups)
    with pytest.raises(ValueError, match=r"teacher.kind: got"):
        Teacher(teacher.hidden, teacher.weight, kind="k3")
    with pytest.raises(ValueError, match=r"teacher.coef: got"):
        Teacher(teacher.hidden, teacher.weight, coef=-1.0)
