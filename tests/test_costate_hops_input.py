"""What `hops` and `teacher_forced` take and refuse, and the mix of hops with the score."""

import pytest
import torch
import torch.nn.functional as F
from test_costate_hops import MASK, NOISE, RELAXATIONS, B, D, L, V, llama, ours, sampled
from torch import nn

import vgkern
from vgkern import costate


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


SCORES = {
    "linear_policy_loss": lambda h, w, y, a: vgkern.linear_policy_loss(h, w, y, a).loss,
    "linear_token_logprobs": lambda h, w, y, a: vgkern.linear_token_logprobs(h, w, y).logp.sum(),
    "token_logprobs": lambda h, w, y, a: vgkern.token_logprobs(h @ w.T, y).logp.mean(),
    "policy_loss": lambda h, w, y, a: vgkern.policy_loss(
        vgkern.token_logprobs(h @ w.T, y).logp, a
    ).loss,
    "gather": lambda h, w, y, a: (h @ w.T).log_softmax(-1).gather(-1, y[..., None]).sum(),
    "index": lambda h, w, y, a: (h @ w.T).log_softmax(-1)[
        torch.arange(B)[:, None], torch.arange(L - 1), y
    ].sum(),
    "cross_entropy": lambda h, w, y, a: F.cross_entropy((h @ w.T).flatten(0, 1), y.flatten()),
    "only the sampled rows": lambda h, w, y, a: vgkern.linear_token_logprobs(
        h[MASK], w, y[MASK]
    ).logp.sum(),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # cpu, torch backends
@pytest.mark.parametrize("name", SCORES)
def test_the_score_is_refused(name, dtype):
    run = costate.teacher_forced(ours(dtype), sampled(ours(), RELAXATIONS["expected"]), MASK)
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=dtype)
    score = SCORES[name](run.hidden[:, :-1], run.weight, run.tokens, advantages)
    fine = run.inputs_embeds.square().mean()
    run.hops(fine)
    with pytest.raises(ValueError, match=r"objective: holds the log-probability.*Hops\.backward"):
        run.hops(fine + 0.1 * score)


def test_entropy_and_a_teachers_score_are_not_the_score():
    model, options = ours(torch.float32), RELAXATIONS["expected"]
    run = costate.teacher_forced(model, sampled(ours(), options), MASK)
    rows = run.hidden[:, :-1]
    for backend in ("cpu", "torch"):
        entropy = vgkern.linear_token_logprobs(
            rows, run.weight, run.tokens.where(run.mask, -100), backend=backend
        ).entropy
        assert float(run.hops(entropy.sum(), **options).norms[0]) > 0
    teacher = llama(False, torch.float32)
    body = teacher.model(inputs_embeds=run.inputs_embeds).last_hidden_state[:, :-1]
    lp = vgkern.linear_token_logprobs(body, teacher.lm_head.weight, run.tokens).logp
    assert float(run.hops(-lp.mean(), **options).norms[0]) > 0
    kl = vgkern.linear_divergence(
        rows, run.weight, body.detach(), teacher.lm_head.weight
    ).divergence
    assert float(run.hops(kl.mean(), **options).norms[0]) > 0


class Deaf(nn.Module):
    """Takes inputs_embeds, and looks elsewhere."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.embedding, self.head = inner, inner.embedding, inner.head

    def from_embeddings(self, x):
        return self.inner.from_embeddings(self.embedding.weight[torch.ones(x.shape[:2]).long()])


class Mute(Deaf):
    def from_embeddings(self, x):
        raise TypeError("forward() got an unexpected keyword argument 'inputs_embeds'")


@pytest.mark.parametrize("model", [Deaf, Mute, lambda m: nn.Linear(3, 3)])
def test_a_model_that_ignores_inputs_embeds(model):
    ids = sampled(ours(), RELAXATIONS["expected"])
    with pytest.raises((ValueError, TypeError), match=r"model: .* allowed: .*inputs_embeds"):
        costate.teacher_forced(model(ours()), ids, MASK)


def test_a_hidden_that_does_not_depend_on_the_inputs():
    run = costate.teacher_forced(ours(), sampled(ours(), RELAXATIONS["expected"]), MASK)
    fine = run.inputs_embeds.square().mean()
    for hidden in (run.hidden.detach(), run.hidden.detach().requires_grad_() * 2):
        with pytest.raises(ValueError, match="hidden: does not depend on inputs_embeds"):
            costate.hops(fine, run.inputs_embeds, hidden, *run[2:5])


def wrong(**change):
    return change


BAD = {
    "k": (wrong(k=-1), "k: got int -1; allowed: an int >= 0"),
    "k float": (wrong(k=1.0), "k: got float 1.0"),
    "tau": (wrong(tau=0.0), "tau: got float 0.0; allowed: a finite number > 0"),
    "tau of expected": (wrong(tau=0.5), "tau: .*'expected', which has no noise"),
    "relaxation": (wrong(relaxation="reinmax"), "relaxation: got reinmax"),
    "gumbel": (wrong(relaxation="gumbel"), "noise: got NoneType None"),
    "temperature": (wrong(temperature=0.0), "temperature: "),
    "vocabulary": (wrong(embedding=torch.zeros(V + 1, D).double()), r"embedding: .*V = 11"),
    "width": (wrong(embedding=torch.zeros(V, D + 1).double()), r"embedding: .*\[V, 16\]"),
    "table": (wrong(embedding=torch.ones(V, D).double()), r"embedding: .*not inputs_embeds\["),
    "shift": (wrong(tokens=torch.ones(B, L - 1).long()), r"embedding: .*tokens = ids\[:, 1:\]"),
    "tokens": (wrong(tokens=torch.ones(B, L).long()), r"tokens: .*shape \[3, 5\]"),
    "id": (wrong(tokens=torch.full((B, L - 1), V)), "tokens: got id 11"),
    "mask": (wrong(mask=torch.ones(B, L)), "mask: "),
    "hidden": (wrong(hidden=torch.zeros(B, L - 1, D)), "hidden: .*a row for each of inputs_embeds"),
    "inputs": (wrong(inputs_embeds=torch.zeros(B, L)), "inputs_embeds: "),
    "objective": (wrong(objective=torch.zeros(3)), "objective: .*one number"),
    "constant": (wrong(objective=torch.zeros(())), "objective: no gradient reaches inputs_embeds"),
    "agreement": (wrong(agreement=1.5), "agreement: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    run = costate.teacher_forced(ours(), sampled(ours(), RELAXATIONS["expected"]), MASK)
    given = dict(run._asdict(), objective=run.hidden.square().mean())
    costate.hops(**given)
    change, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        costate.hops(**{**given, **change})


def test_noise_that_did_not_draw_the_tokens():
    model, options = ours(), RELAXATIONS["gumbel"]
    run = costate.teacher_forced(model, sampled(model, options), MASK)
    loss = run.hidden.square().mean()
    run.hops(loss, **options)
    other = vgkern.Noise(10, NOISE.sequence, NOISE.position)
    late = vgkern.Noise(9, NOISE.sequence, NOISE.position + 1)
    for change in ({"noise": other}, {"noise": late}, {"temperature": 5.0}, {"bias": None}):
        if change == {"bias": None}:
            change = {"bias": -4 * model.bias + torch.arange(V)}
        with pytest.raises(ValueError, match=r"noise: chooses .* again; allowed.*agreement"):
            run.hops(loss, **{**options, **change})
    run.hops(loss, **{**options, "noise": other}, agreement=0.0)


def test_a_near_tie_is_no_disagreement():
    """Where two tokens are equally good up to rounding, the trainer may see the other one win."""
    model, options = ours(), RELAXATIONS["gumbel"]
    run = costate.teacher_forced(model, sampled(model, options), MASK)
    loss = run.hidden.square().mean()
    z = ((run.hidden[:, :-1] @ run.weight.T + run.bias) / 0.8 + NOISE.gumbel(V, torch.float64))[
        MASK
    ]
    best, second = z.topk(2).values.unbind(-1)
    row = (best - second).argmin()  # the closest race; the runner-up is lifted past the winner
    runner, gap = z[row].topk(2).indices[1], (best - second)[row]
    for over, share in ((1e-6, None), (1e-2, "91.7%")):
        bias = run.bias + 0.8 * (gap + over) * F.one_hot(runner, V)
        if share is None:
            run.hops(loss, **{**options, "bias": bias})
        else:
            with pytest.raises(ValueError, match=f"noise: chooses {share}"):
                run.hops(loss, **{**options, "bias": bias})
            run.hops(loss, **{**options, "bias": bias}, agreement=0.9)


def test_nothing_to_go_backward_through():
    run = costate.teacher_forced(ours(), sampled(ours(), RELAXATIONS["expected"]), MASK)
    with pytest.raises(ValueError, match="weight: got 0 without a score_loss"):
        run.hops(run.hidden.square().mean()).backward(weight=0.0)


def test_the_trainers_hugging_face_policy_and_its_model_are_one():
    """`teacher_forced` over the policy: its head, with the blocked ids in the bias."""
    from vgkern.train.hf import HFPolicy

    model = llama(True)
    ids = sampled(model, RELAXATIONS["expected"])
    a = costate.teacher_forced(HFPolicy(model, [0]), ids, MASK)
    b = costate.teacher_forced(model, ids, MASK)
    assert torch.equal(a.hidden, b.hidden) and a.weight is b.weight and a.embedding is b.embedding
    assert b.bias is None and float(a.bias[0]) < -1e8 and float(a.bias[1:].abs().max()) == 0
    want = model(input_ids=ids).logits
    assert torch.allclose(b.hidden @ b.weight.T, want, rtol=1e-9, atol=1e-12)


def test_a_model_that_scales_its_logits_is_refused():
    model = llama(False)
    model.config.logits_scaling = 4.0
    with pytest.raises(ValueError, match=r"model: .*scales its logits \(logits_scaling=4.0\)"):
        costate.teacher_forced(model, torch.ones(B, L).long())


def test_a_table_that_scales_its_rows():
    """Gemma's embedding layer multiplies what it looks up; u = E lambda needs the product."""

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3.0

    model = llama(False)
    layer = Scaled(V, D).double()
    model.set_input_embeddings(layer)
    run = costate.teacher_forced(model, torch.randint(V, (B, L)), MASK)
    assert torch.equal(run.embedding, 3 * layer.weight.detach())
    run.hops(run.hidden.square().mean()).backward()
    assert float(layer.weight.grad.norm()) > 0
