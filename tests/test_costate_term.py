"""What is special to a costate in the fused losses; parity with plain PyTorch is by the cases."""

import dataclasses
import json
import subprocess
import sys

import conftest
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vgkern
from vgkern import case_inputs, objectives

NATIVE = [b for b in conftest.BACKENDS if b != "torch"]
GUMBEL = {"relaxation": "gumbel", "tau": 0.7}
NAMES = ("hidden", "weight", "bias")


def batch(b=6, t=5, h=16, v=200, he=9, mask=True, **kw):
    x, logp, _ = case_inputs.head((b, t), h, v, torch.float32, 0, bias="plain", temperature=0.8)
    x["mask"] = case_inputs.padding(b, t, 3) if mask else None
    x["costate"] = case_inputs.costates(x, 0, he=he, **kw)
    x["advantages"] = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, 0.5])[:b]
    return {**x, "old_logp": (logp + 0.05).float()}


def loss_grads(x, backend, by=1.0, **kw):
    y = {k: v.clone().requires_grad_() if k in NAMES else v for k, v in x.items()}
    out = vgkern.linear_policy_loss(**y, backend=backend, **kw)
    return out, torch.autograd.grad(by * out.loss, [y[k] for k in NAMES])


def logp_grads(x, backend, scalar):
    keep = {k: v for k, v in x.items() if k in (*NAMES, "targets", "temperature", "costate")}
    y = {k: v.clone().requires_grad_() if k in NAMES else v for k, v in keep.items()}
    if x["mask"] is not None:
        y["targets"] = y["targets"].where(x["mask"], -100)
    out = vgkern.linear_token_logprobs(**y, backend=backend)
    return torch.autograd.grad(scalar(out), [y[k] for k in NAMES])


def composed(x, backend):
    """The gradients of the term alone, by the right-hand side of the definition."""
    y = {k: x[k].clone().requires_grad_() for k in NAMES}
    c, live = x["costate"], x["mask"]
    value = c.value if live is None else c.value.masked_fill(~live[..., None], 0)
    e = vgkern.noisy_embedding(
        y["hidden"], y["weight"], c.embedding.detach(), x["targets"], c.noise, bias=y["bias"],
        relaxation=c.relaxation, tau=c.tau, temperature=0.8, backend=backend
    )  # fmt: skip
    return torch.autograd.grad(c.weight * (e * value).sum(), list(y.values()))


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * float(b.abs().max() + 1))


@pytest.mark.parametrize("options", [{}, GUMBEL, {"weight": -0.4, "tied": True}], ids=str)
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_the_loss_plus_the_term(backend, objective, options):
    """The gradients are those of the definition; loss and metrics are the loss's own, to the bit.
    Two sequences have zero advantage: their rows carry a costate and nothing else."""
    x = batch(**options)
    out, got = loss_grads(x, backend, by=-1.5, objective=objective)
    plain, want = loss_grads({**x, "costate": None}, backend, by=-1.5, objective=objective)
    assert torch.equal(out.loss, plain.loss) and out.metrics.keys() == plain.metrics.keys()
    for k, m in plain.metrics.items():
        assert torch.equal(out.metrics[k], m), k
    term = composed(x, backend)
    close(got, [w - 1.5 * t for w, t in zip(want, term, strict=True)])
    zero = {**x, "advantages": torch.zeros(6)}
    close(loss_grads(zero, backend, objective=objective)[1], term)
    assert all(bool(t.any()) for t in term)


@pytest.mark.parametrize("options", [{}, GUMBEL], ids=str)
def test_logprobs_carry_it_once_whatever_is_differentiated(backend, options):
    x = batch(**options)
    term = composed(x, backend)
    off = {**x, "costate": None}
    for scalar in (
        lambda o: 3 * o.logp.sum(), lambda o: 0 * o.logp.sum(), lambda o: o.entropy.mean(),
        lambda o: (o.logp * o.entropy).sum(),
    ):  # fmt: skip
        want = [w + t for w, t in zip(logp_grads(off, backend, scalar), term, strict=True)]
        close(logp_grads(x, backend, scalar), want)


class Calls(TorchDispatchMode):
    """Operators of this package, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("vgkern"):
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_one_recompute(backend, objective):
    """All three terms: one operator that makes logits for a backward, not three."""
    if backend == "torch":
        pytest.skip("the reference has no operators")
    x = batch(**GUMBEL)
    x["objective"] = objectives.resolve(objective).replace(entropy_coef=0.01)
    with Calls() as calls:
        loss_grads(x, backend)
    want = ["linear_policy_loss_fwd"]
    if objective == "gspo":
        want = ["linear_logprobs_fwd", "linear_logprobs_bwd"]
    assert [n for n in calls.names if n.startswith(("linear", "noisy"))] == want


def test_rows_without_a_costate_pay_none(backend):
    """A costate of 0 leaves the gradients alone to the bit, and never meets the table."""
    x = batch()
    value = torch.zeros_like(x["costate"].value)
    table = torch.full_like(x["costate"].embedding, torch.nan)
    none = dataclasses.replace(x["costate"], value=value, embedding=table)
    off = {**x, "costate": dataclasses.replace(x["costate"], weight=0.0)}
    plain = loss_grads({**x, "costate": None}, backend)[1]
    assert all(torch.equal(a, b) for a, b in zip(loss_grads(off, backend)[1], plain, strict=True))
    if backend != "torch":  # the reference multiplies by 0
        got = loss_grads({**x, "costate": none}, backend)[1]
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_one_live_row_among_many(backend):
    """Only its row of hidden has a gradient; hidden states of the dead ones may be NaN."""
    x = batch(mask=False, **GUMBEL)
    value = torch.zeros_like(x["costate"].value)
    value[3, 2] = x["costate"].value[3, 2]
    x["costate"] = dataclasses.replace(x["costate"], value=value)
    x["advantages"] = torch.zeros(6)
    want = composed({**x, "hidden": x["hidden"].clone()}, backend)
    live = value.any(-1)
    if backend != "torch":
        x["hidden"] = x["hidden"].masked_fill(~live[..., None], torch.nan)
    got = loss_grads(x, backend)[1]
    close(got, want)
    assert torch.equal(got[0].abs().sum(-1) != 0, live)


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_nan_in_a_row_with_nothing_but_a_costate_is_said(backend, objective):
    """Its gradients would be NaN: the loss must not be a number."""
    x = batch(mask=False)
    x["advantages"] = torch.zeros(6)
    x["hidden"] = x["hidden"].clone()
    x["hidden"][3, 3, 5] = torch.nan
    with pytest.raises(vgkern.NonFiniteError, match=r"^hidden: .*NaN"):
        loss_grads(x, backend, objective=objective)
    if objective == "grpo":
        with pytest.raises(vgkern.NonFiniteError, match=r"^hidden: .*NaN"):
            logp_grads(x, backend, lambda o: 0 * o.logp.sum())


@pytest.mark.parametrize("options", [{}, {"relaxation": "gumbel"}], ids=str)
def test_a_peaked_row_keeps_its_digits(backend, options):
    """u - <q, u> where q is one-hot but for e-14, u in the tens: each row of the gradient, which
    the others' would hide. (The reference is eager fp32 autograd, whose softmax does cancel.)"""
    if backend == "torch":
        pytest.skip("it is what the others are better than")
    x = batch(v=1035, he=32, mask=False, **options)
    row, x["temperature"] = x["weight"][x["targets"]], 1.0
    x["hidden"] = 0.05 * x["hidden"] + 28 * row / row.square().sum(-1, keepdim=True)
    x["advantages"] = torch.zeros(6)
    c = dataclasses.replace(x["costate"], value=10 * x["costate"].value)
    got = loss_grads({**x, "costate": c}, backend)[1][0]
    up = dataclasses.replace(c, value=c.value.double(), embedding=c.embedding.double())
    wide = {k: t.double() if k in (*NAMES, "old_logp") else t for k, t in x.items()}
    want = loss_grads({**wide, "costate": up}, "torch")[1][0]
    assert ((got - want).norm(dim=-1) <= 1e-4 * want.norm(dim=-1)).all()


@pytest.mark.parametrize("temperature", [1.0, 0.02, 1e-3])
@pytest.mark.parametrize("carried", [False, True])
def test_fp16_with_a_low_temperature_stays_in_range(backend, temperature, carried):
    """1 / temperature multiplies the gradient of the logits, which fp16 holds. The costate is large
    beside the coefficients of the loss, so that their bound alone would let it overflow."""
    x = batch(mask=False)
    c = x["costate"]
    x["weight"] = 0.01 * x["weight"]
    x |= {k: x[k].half() for k in NAMES}
    x["temperature"], x["old_logp"] = temperature, None
    c = dataclasses.replace(c, embedding=c.embedding.half(), value=1e4 * c.value)
    x["costate"], by = (c, 1e-4) if carried else (None, 1.0)
    got = loss_grads(x, backend, by)[1]
    up = {**x, **{k: x[k].float() for k in NAMES}}
    for a, b in zip(got, loss_grads(up, "torch", by)[1], strict=True):
        assert (a - b).norm() < 4e-3 * b.norm()


def test_what_is_given_is_left_alone(backend):
    x = batch(**GUMBEL, tied=True)
    c = dataclasses.replace(x["costate"], value=x["costate"].value.clone().requires_grad_())
    before = c.value.detach().clone()
    y = {**x, "weight": x["weight"].clone().requires_grad_(), "costate": c}
    vgkern.linear_policy_loss(**y, backend=backend).loss.backward()
    assert c.value.grad is None and torch.equal(before.nan_to_num(), c.value.detach().nan_to_num())
    # a table that is the head itself gets the head's gradient and no lookup's
    tied = x["weight"].clone().requires_grad_()
    own = dataclasses.replace(c, embedding=tied)
    vgkern.linear_policy_loss(
        **{**y, "weight": tied, "costate": own}, backend=backend
    ).loss.backward()
    assert torch.equal(tied.grad, y["weight"].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_table_of_another_dtype(backend, dtype):
    x = batch(**GUMBEL)
    c = dataclasses.replace(x["costate"], embedding=x["costate"].embedding.to(dtype))
    up = dataclasses.replace(c, embedding=c.embedding.float(), value=c.value.to(dtype).float())
    got = loss_grads({**x, "costate": c}, backend)[1]
    want = loss_grads({**x, "costate": up}, backend)[1]
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < (1e-6 if dtype == torch.float32 else 4e-3) * b.norm()


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_the_loss_keeps_its_dtype_beside_an_fp64_table(objective):
    x = batch(mask=False)
    wide = dataclasses.replace(x["costate"], embedding=x["costate"].embedding.double())
    plain = loss_grads(x, "torch", objective=objective)
    out, grads = loss_grads({**x, "costate": wide}, "torch", objective=objective)
    assert out.loss.dtype == torch.float32 and torch.equal(out.loss, plain[0].loss)
    close(grads, plain[1])


def test_same_bits_on_repeat(backend, threads):
    x = batch(v=1035, **GUMBEL)
    for count in (1, 2):
        threads(count)
        want = loss_grads(x, backend)[1]
        again = loss_grads(x, backend)[1]
        assert all(torch.equal(p, q) for p, q in zip(want, again, strict=True))


def test_torch_func_grad_of_a_tied_head(backend):
    x = batch(**GUMBEL, tied=True, mask=False)

    def loss(w):
        c = dataclasses.replace(x["costate"], embedding=w)
        return vgkern.linear_policy_loss(**{**x, "weight": w, "costate": c}, backend=backend).loss

    got = torch.func.grad(loss)(x["weight"])
    close([got], [loss_grads(x, backend)[1][1]])


@pytest.mark.parametrize(("options", "what"), [
    ({"top_k": 3}, "top_k"), ({"top_p": 0.5}, "top_p"), ({"min_p": 0.1}, "min_p"),
    ({"temperature": torch.ones(6, 5)}, "temperature per row"), ({"group": object()}, "group"),
])  # fmt: skip
def test_what_it_does_not_go_with_is_said(options, what):
    x = batch()
    with pytest.raises(NotImplementedError, match=f"^costate: not with .*{what}"):
        vgkern.linear_token_logprobs(
            x["hidden"], x["weight"], x["targets"], costate=x["costate"], **options
        )


def changed(**fields):
    return lambda c: dataclasses.replace(c, **fields)


BAD = [
    (lambda c: c.value, TypeError, "costate"),
    (changed(value=torch.zeros(6, 5, 8)), ValueError, "costate.value"),
    (changed(value=torch.zeros(6, 4, 9)), ValueError, "costate.value"),
    (changed(value=torch.zeros(6, 5, 9).long()), TypeError, "costate.value"),
    (changed(value=torch.full((6, 5, 9), torch.nan)), vgkern.NonFiniteError, "costate.value"),
    (changed(value=torch.full((6, 5, 9), 1e39, dtype=torch.float64),
             embedding=torch.zeros(200, 9).half()), vgkern.NonFiniteError, "costate.value"),
    (changed(embedding=torch.zeros(199, 9)), ValueError, "costate.embedding"),
    (changed(embedding=torch.zeros(200)), ValueError, "costate.embedding"),
    (changed(relaxation="straight"), ValueError, "costate.relaxation"),
    (changed(relaxation="gumbel"), TypeError, "costate.noise"),
    (changed(noise=3), TypeError, "costate.noise"),
    (changed(tau=0.0, noise=vgkern.Noise(0, torch.tensor(0), torch.tensor(0)),
             relaxation="gumbel"), ValueError, "costate.tau"),
    (changed(tau=1e-37, noise=vgkern.Noise(0, torch.tensor(0), torch.tensor(0)),
             relaxation="gumbel"), ValueError, "costate.tau"),
    (changed(tau=2.0), ValueError, "costate.tau"),
    (changed(weight=float("nan")), ValueError, "costate.weight"),
    (changed(weight=1e39), ValueError, "costate.weight"),
    (changed(weight=1e-46), ValueError, "costate.weight"),
    (changed(weight=True), ValueError, "costate.weight"),
    (changed(noise=vgkern.Noise(0, torch.arange(4), torch.tensor(0)), relaxation="gumbel"),
     ValueError, "costate.noise"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "name"), BAD, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("op", ["linear_policy_loss", "linear_token_logprobs"])
def test_bad_input_names_the_field(op, change, error, name):
    x = batch()
    given = (x["hidden"], x["weight"], x["targets"])
    given += (x["advantages"],) if op == "linear_policy_loss" else ()
    with pytest.raises(error, match=f"^{name}: got .*allowed: "):
        getattr(vgkern, op)(*given, costate=change(x["costate"]))


PEAK = """
import json, resource, torch, vgkern
def run(n, h, v, w, e):
    x, y = torch.randn(n, h, requires_grad=True), torch.arange(n)
    noise = vgkern.Noise(0, torch.arange(n), torch.tensor(0))
    c = vgkern.Costate(torch.randn(n, h), e, noise, "gumbel")
    vgkern.linear_policy_loss(x, w, y, torch.randn(n), objective="dapo", costate=c,
                              backend="cpu").loss.backward()
n, h, v = 2048, 64, 50304
w, e = torch.randn(v, h, requires_grad=True), torch.randn(v, h)
run(4, h, v, w, e)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(n, h, v, w, e)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
"""


@pytest.mark.skipif("cpu" not in NATIVE, reason="the cpu backend's own memory")
def test_peak_memory():
    """Logits and u of a chunk, 200 MiB together, the fp32 gradients and slack: none of the 393 MiB
    that [N, V] logits, noise or u would be, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gradients = 2 * 4 * (2048 + 50304) * 64 / 2**20
    assert json.loads(done.stdout) < 200 + gradients + 60
