"""A number that changes with every step compiles at most twice, and 0-d tensors are numbers."""

import conftest
import pytest
import torch
import torch._dynamo.testing

import vgkern
from vgkern import Objective, objectives
from vgkern.case_inputs import head

STEPS = 100  # of one number
FEW = 4  # elsewhere: a number that is burnt in makes four graphs of them

G = torch.Generator().manual_seed(0)
X, LOGP, _ = head((2, 3), 8, 33, torch.float32, 0)
H, W, Y = X["hidden"], X["weight"], X["targets"]
LEAF = H.clone().requires_grad_()  # where the numbers are backward's
TH, TW = torch.randn(2, 3, 5, generator=G), torch.randn(33, 5, generator=G)
A = torch.tensor([1.0, -1.0])
LP = LOGP.float()
OLD, REF, SAMPLER = (LP + 0.3 * torch.randn(LP.shape, generator=G) for _ in range(3))
ROWS = torch.arange(6).view(2, 3)
J = torch.randn(2, 3, 4, 4, generator=G)


def noise(seed=0):
    return vgkern.Noise(seed, ROWS, torch.zeros((), dtype=torch.int64))


def scored(**k):
    return vgkern.linear_token_logprobs(H, W, Y, **k).logp


def sampled(**k):
    return vgkern.linear_sample(H, W, k.pop("noise", noise()), **k).logp


def fused(**k):
    return vgkern.linear_policy_loss(H, W, Y, A, old_logp=OLD, **k).loss


def embedded(**k):
    given = k.pop("noise", noise())
    return vgkern.noisy_embedding(LEAF, W, W + 0.0, Y, given, relaxation="gumbel", **k)


# (op, number): a call that takes it, and the first of its values
CALLS = {
    ("token_logprobs", "temperature"): (
        lambda t, b: vgkern.token_logprobs(H @ W.T, Y, temperature=t, backend=b).logp, 0.5),
    ("token_logprobs", "softcap"): (
        lambda t, b: vgkern.token_logprobs(H @ W.T, Y, softcap=t, backend=b).logp, 5.0),
    ("linear_token_logprobs", "temperature"): (lambda t, b: scored(temperature=t, backend=b), 0.5),
    ("linear_token_logprobs", "softcap"): (lambda t, b: scored(softcap=t, backend=b), 5.0),
    ("linear_policy_loss", "temperature"): (
        lambda t, b: fused(objective="dapo", temperature=t, backend=b), 0.5),
    ("linear_policy_loss", "softcap"): (
        lambda t, b: fused(objective="dapo", softcap=t, backend=b), 5.0),
    ("linear_policy_loss", "normalizer"): (
        lambda t, b: fused(objective="dapo", normalizer=t, backend=b), 5.0),
    ("linear_policy_loss", "temperature of sequences"): (
        lambda t, b: fused(objective="gspo", temperature=t, backend=b), 0.5),
    **{("linear_token_logprobs", cut): (lambda t, b, cut=cut: scored(backend=b, **{cut: t}), first)
       for cut, first in (("top_k", 9), ("top_p", 0.7), ("min_p", 0.01))},
    **{("linear_sample", cut): (lambda t, b, cut=cut: sampled(backend=b, **{cut: t}), first)
       for cut, first in (("top_k", 9), ("top_p", 0.7), ("min_p", 0.01))},
    ("linear_sample", "softcap"): (lambda t, b: sampled(softcap=t, backend=b), 5.0),
    ("linear_sample", "temperature"): (lambda t, b: sampled(temperature=t, backend=b), 0.5),
    ("linear_sample", "seed"): (lambda t, b: sampled(noise=noise(t), backend=b), 3),
    ("linear_divergence", "temperature"): (
        lambda t, b: vgkern.linear_divergence(H, W, TH, TW, temperature=t, backend=b).divergence,
        0.5),
    ("linear_divergence", "softcap"): (
        lambda t, b: vgkern.linear_divergence(H, W, TH, TW, softcap=t, backend=b).divergence, 5.0),
    ("linear_divergence", "teacher_softcap"): (
        lambda t, b: vgkern.linear_divergence(
            H, W, TH, TW, teacher_softcap=t, backend=b).divergence, 5.0),
    ("noisy_embedding", "tau"): (lambda t, b: embedded(tau=t, backend=b), 0.5),
    ("noisy_embedding", "temperature"): (lambda t, b: embedded(temperature=t, backend=b), 0.5),
    ("noisy_embedding", "softcap"): (lambda t, b: embedded(softcap=t, backend=b), 5.0),
    ("noisy_embedding", "seed"): (lambda t, b: embedded(noise=noise(t), backend=b), 3),
    ("costate_scan", "gamma"): (
        lambda t, b: vgkern.costate_scan(J, H[..., :4], H[:, 0, :4], gamma=t, backend=b), 0.3),
    ("gaussian_action", "seed"): (
        lambda t, b: vgkern.gaussian_action(H, -H.abs(), noise(t), backend=b).action, 3),
    ("linear_rollout", "seed"): (
        lambda t, b: vgkern.linear_rollout(
            J, H[..., :4], H[..., :4].abs(), H[:, 0, :4], noise(t), backend=b), 3),
}  # fmt: skip

KNOBS = {
    "clip_low": (Objective(), 0.1), "clip_high": (Objective(), 0.1),
    "dual_clip": (Objective(), 1.5), "delta": (Objective(), 1.5),
    "beta": (Objective(kl="k3"), 0.1), "entropy_coef": (Objective(), 0.01),
    "sampler_max": (Objective(sampler_correction="token_truncate"), 1.1),
    "sampler_min": (Objective(sampler_correction="sequence_mask"), 0.1),
    "tau_pos": (objectives.SAPO, 1.0), "tau_neg": (objectives.SAPO, 1.0),
    "vespo_k_pos": (objectives.VESPO, 2.0), "vespo_lambda_pos": (objectives.VESPO, 2.0),
    "vespo_k_neg": (objectives.VESPO, 2.0), "vespo_lambda_neg": (objectives.VESPO, 2.0),
}  # fmt: skip


def LONG(value):
    """For a run of `STEPS` values."""
    return value


def held(call, first, backend, made=lambda v: v):
    """The compiled call gives what the plain one does, in at most two graphs."""
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=graphs)
    steps = STEPS if made is LONG and backend not in conftest.EMULATED else FEW
    for i in range(steps):
        value = first + (i if isinstance(first, int) else i / 256)
        got = compiled(made(value), backend)
        if i == 1:  # one for the first value, one for those that change
            made_of_two = graphs.frame_count
        if i % 10 in (0, 1, 2):
            torch.testing.assert_close(got, call(made(value), backend), rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == made_of_two


@pytest.mark.parametrize(("op", "number"), CALLS)
def test_numbers(op, number, backend):
    if (op, backend) in conftest.LACKS:
        pytest.skip(f"{op} has no kernels for {backend}")
    held(*CALLS[op, number], backend, *[LONG] * ((op, number) == ("token_logprobs", "temperature")))


def policy(o, backend):
    given = {"sampler_logp": SAMPLER} if o.sampler_correction != "none" else {}
    if o.beta:
        given["ref_logp"] = REF
    entropy = LP.abs() if o.entropy_coef else None
    return vgkern.policy_loss(
        LP, A, objective=o, old_logp=OLD, entropy=entropy, backend=backend, **given
    ).loss


@pytest.mark.parametrize("knob", KNOBS)
def test_knobs_of_an_objective_made_in_the_graph(knob, backend):
    o, first = KNOBS[knob]
    held(lambda v, b: policy(o.replace(**{knob: v}), b), first, backend)


@pytest.mark.parametrize("knob", ["clip_high", "beta", "vespo_k_pos"])
def test_knobs_of_an_objective_that_is_handed_in(knob, backend):
    o, first = KNOBS[knob]
    held(policy, first, backend, lambda v: o.replace(**{knob: v}))


@pytest.mark.parametrize("knob", ["clip_high", "entropy_coef"])
def test_knobs_of_the_fused_loss(knob, backend):
    o, first = KNOBS[knob]
    held(lambda v, b: fused(objective=o.replace(**{knob: v}), backend=b), first, backend)


@pytest.mark.parametrize("number", ["tau", "weight", "seed"])
def test_costates(number, backend):
    def call(value, backend):
        given = {"noise": noise(value)} if number == "seed" else {number: value}
        costate = vgkern.Costate(H, W, given.pop("noise", noise()), "gumbel", **given)
        return vgkern.linear_policy_loss(
            H, W, Y, A, objective="dapo", costate=costate, backend=backend
        ).loss

    held(call, 3 if number == "seed" else 0.5, backend)


def test_the_gradient_of_a_compiled_schedule(backend):
    """Backward takes the number of its own step."""
    h = H.clone().requires_grad_()

    def call(h, t):
        return vgkern.linear_token_logprobs(h, W, Y, temperature=t, backend=backend).logp

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for t in (0.5, 0.7, 0.9):
        (got,) = torch.autograd.grad(compiled(h, t).sum(), h)
        (want,) = torch.autograd.grad(call(h, t).sum(), h)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "number"), [k for k in CALLS if k[1] not in ("seed", "top_k")])
def test_tensors_of_no_dimension(op, number, dtype, backend):
    """Where a float is: the same result; and in a graph, which is made once."""
    if (op, backend) in conftest.LACKS:
        pytest.skip(f"{op} has no kernels for {backend}")
    call, first = CALLS[op, number]
    want = call(first, backend)
    torch.testing.assert_close(call(torch.tensor(first, dtype=dtype), backend), want,
                               rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("knob", KNOBS)
def test_knobs_of_no_dimension(knob):
    o, first = KNOBS[knob]
    made = o.replace(**{knob: torch.tensor(first, dtype=torch.float64)})
    assert made == o.replace(**{knob: first}) and isinstance(getattr(made, knob), float)


def test_a_bad_number_is_still_refused_by_name():
    for bad in (torch.tensor(0.0), torch.tensor(torch.nan), torch.tensor(-1.0), 0, -1.0, True, "1"):
        with pytest.raises(ValueError, match=r"^temperature: got .*; allowed: a finite number > 0"):
            vgkern.token_logprobs(H @ W.T, Y, temperature=bad)
    with pytest.raises(ValueError, match=r"objective\.clip_low"):
        Objective(clip_low=torch.tensor(2.0))
