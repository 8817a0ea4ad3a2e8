"""What is special to noisy_embedding: a hard forward, the surrogate behind it, replay, memory."""

import itertools

import conftest
import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, check

import vgkern
from vgkern import case_inputs, cases

NATIVE = [b for b in conftest.BACKENDS if b != "torch"]


def relaxed(hidden, weight, bias, embedding, noise, tau, temperature, softcap):
    """q E [N, He]: what the backward pass believes the forward pass computed."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    if noise is not None:
        z = (z + noise.gumbel(weight.shape[0], z.dtype)) / tau
    return z.softmax(-1) @ embedding


def model(n=12, h=16, v=200, he=9, seed=0, dtype=torch.float32, **kw):
    x, _, _ = case_inputs.head((n,), h, v, dtype, seed, **kw)
    g = torch.Generator().manual_seed(seed + 1)
    x["tokens"] = x.pop("targets")
    x["embedding"] = torch.randn(v, he, generator=g).to(dtype)
    return x


def noise(n, seed=3, position=0):
    return vgkern.Noise(seed, torch.arange(n) + 2**35, torch.tensor(position))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relaxation", ["gumbel", "expected"])
def test_forward_is_the_lookup(backend, dtype, relaxation):
    x = model(dtype=dtype)
    x["embedding"][0, 0] = -0.0
    x["tokens"][0] = 0
    out = vgkern.noisy_embedding(**x, noise=noise(12), relaxation=relaxation, backend=backend)
    want = x["embedding"][x["tokens"]]
    assert out.dtype == dtype and torch.equal(out.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"bias": "plain", "softcap": 5.0}, {"bias": "blocked"}],
    ids=str,
)
def test_replayed_noise_chooses_the_sampled_token(backend, options):
    """The q that the gradient goes through peaks, at tau -> 0, where linear_sample sampled."""
    n, v = 40, 300
    x = model(n=n, v=v, he=v, **options)
    x["embedding"] = torch.eye(v)
    del x["tokens"]
    head = {k: t for k, t in x.items() if k != "embedding"}
    drawn = vgkern.linear_sample(**head, noise=noise(n), backend=backend)
    z = F.linear(x["hidden"].double(), x["weight"].double())
    z = z if "bias" not in x else z + x["bias"].double()
    if "softcap" in x:
        z = x["softcap"] * torch.tanh(z / x["softcap"])
    score = z / x.get("temperature", 1.0) + noise(n).gumbel(v, torch.float64)
    two = score.topk(2).values
    clear = two[:, 0] - two[:, 1] > 1e-3
    assert clear.sum() > 30 and torch.equal(score.argmax(-1)[clear], drawn.token[clear])
    # dz = q (u - <q, u>) / tau, with u a unit vector: its sign says whether q_y > 1/2
    bias = torch.zeros(v) if "bias" not in x else x["bias"].clone()
    eye = {**head, "bias": bias.requires_grad_(), "embedding": torch.eye(v)}
    for i in clear.nonzero().flatten()[:8]:
        row = {**eye, "hidden": x["hidden"][i : i + 1]}
        one = vgkern.Noise(3, noise(n).sequence[i : i + 1], torch.tensor(0))
        y = drawn.token[i : i + 1]
        out = vgkern.noisy_embedding(**row, tokens=y, noise=one, backend=backend)
        up = F.one_hot(y, v).float()
        (g,) = torch.autograd.grad((out * up).sum(), bias)  # q_y (onehot - q) * slope
        q = torch.softmax(score[i], -1)
        slope = 1.0
        if "softcap" in x:
            slope = 1 - (z[i] / x["softcap"]).square()
        want = q[y] * (up[0].double() - q) * slope / x.get("temperature", 1.0)
        torch.testing.assert_close(
            g.double(), want.where(z[i] > -torch.inf, 0), rtol=1e-4, atol=1e-6
        )


PAIRS = list(itertools.product(("torch", *NATIVE), repeat=2))


@pytest.mark.parametrize(("sampler", "trainer"), PAIRS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_backend_replays_the_noise_of_every_sampler(sampler, trainer, softcap):
    """The largest q of the row that one backend's backward works with is the id that another one's
    sampler drew: with a head of ones on the diagonal the hidden gradient is dz itself."""
    conftest.skip_unless_runs(sampler), conftest.skip_unless_runs(trainer)
    n, v, a, b = 24, 130, 7, 90
    g = torch.Generator().manual_seed(1)
    z, eye = 2 * torch.randn(n, v, generator=g), torch.eye(v)
    drawn = noise(n, seed=2**64 - 5, position=2**32 - 2)
    options = {"temperature": 0.8, "softcap": softcap}
    token = vgkern.linear_sample(z, eye, drawn, **options, backend=sampler).token
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    score = capped.double() / 0.8 + drawn.gumbel(v, torch.float64)
    two = score.topk(2).values
    clear = two[:, 0] - two[:, 1] > 1e-3
    assert clear.sum() > n - 3

    def other_ids(k):  # q_v q_k of v != k, from dz_v = q_v (u_v - <q, u>) with u = 1 at id k
        h = z.clone().requires_grad_()
        x = vgkern.noisy_embedding(h, eye, eye, token, drawn, **options, backend=trainer)
        (dz,) = torch.autograd.grad(x[:, k].sum(), h)
        return -(dz if softcap is None else dz / (1 - (capped / softcap).square()))

    one, two = other_ids(a), other_ids(b)
    rest = torch.ones(v, dtype=torch.bool)
    rest[[a, b]] = False
    ratio = one[:, rest].sum(-1) / two[:, rest].sum(-1)  # q_a / q_b
    one[:, a] = one[:, b] * ratio
    assert torch.equal(one.argmax(-1)[clear], token[clear])
    assert len(token.unique()) > 10


def straight_through(x, g, tau, temperature=1.0):
    """What the op is said to be, with every part written out."""
    z = (F.linear(x["hidden"], x["weight"]) / temperature + g) / tau
    hard = F.embedding(x["tokens"], x["embedding"])
    soft = torch.softmax(z, -1) @ x["embedding"].detach()
    return hard + soft - soft.detach()


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_backward_is_that_of_the_surrogate(backend, tau):
    up = torch.randn(12, 9, generator=torch.Generator().manual_seed(7))
    x = model()
    names = ("hidden", "weight", "embedding")
    leaves = [x[k].requires_grad_() for k in names]
    out = vgkern.noisy_embedding(**x, noise=noise(12), tau=tau, temperature=0.8, backend=backend)
    got = torch.autograd.grad((out * up).sum(), leaves)
    d = {k: t.detach().double().requires_grad_() if k in names else t for k, t in x.items()}
    soft = straight_through(d, noise(12).gumbel(200, torch.float64), tau, 0.8)
    want = torch.autograd.grad((soft * up).sum(), [d[k] for k in names])
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 5e-6 * b.norm()
    lookup = torch.zeros(200, 9).index_add(0, x["tokens"], up)
    torch.testing.assert_close(got[2], lookup)


def test_tied_head_and_table_add(backend):
    x = model(he=16)
    up = torch.randn(12, 16, generator=torch.Generator().manual_seed(7))
    w = x["weight"].clone().requires_grad_()
    tied = {**x, "weight": w, "embedding": w}
    out = vgkern.noisy_embedding(**tied, noise=noise(12), backend=backend)
    (got,) = torch.autograd.grad((out * up).sum(), w)
    a, b = x["weight"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    out = vgkern.noisy_embedding(
        **{**x, "weight": a, "embedding": b}, noise=noise(12), backend=backend
    )
    parts = torch.autograd.grad((out * up).sum(), (a, b))
    assert all(p.abs().sum() > 0 for p in parts)
    torch.testing.assert_close(got, parts[0] + parts[1])


def test_expected_is_the_linearised_enumeration(backend):
    """For a linear function of the embedding, the gradient of the exact expectation over the next
    token: d/dz sum_y p_y <a, E_y>."""
    x = model(n=5, v=31)
    a = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    h = x["hidden"].requires_grad_()
    out = vgkern.noisy_embedding(**x, relaxation="expected", backend=backend)
    (got,) = torch.autograd.grad((a * out).sum(), h)
    d = h.detach().double().requires_grad_()
    p = torch.softmax(d @ x["weight"].double().T, -1)
    value = sum(p[:, y] * (a.double() @ x["embedding"][y].double()) for y in range(31))
    (want,) = torch.autograd.grad(value.sum(), d)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relaxation", ["gumbel", "expected"])
def test_rows_without_a_costate_are_not_looked_at(backend, relaxation):
    x = model()
    x["hidden"][4] = torch.nan
    leaves = [x[k].requires_grad_() for k in ("hidden", "weight", "embedding")]
    out = vgkern.noisy_embedding(**x, noise=noise(12), relaxation=relaxation, backend=backend)
    up = torch.zeros(12, 9)
    up[[2, 9]] = torch.tensor([1.5, -2.0])[:, None] * torch.arange(9)
    gh, gw, ge = torch.autograd.grad((out * up).sum(), leaves)
    assert all(g.isfinite().all() for g in (gh, gw, ge))
    assert sorted(gh.abs().sum(-1).nonzero().flatten().tolist()) == [2, 9]
    few = {k: t[[2, 9]] if k in ("hidden", "tokens") else t for k, t in x.items()}
    n = vgkern.Noise(3, noise(12).sequence[[2, 9]], torch.tensor(0))
    out = vgkern.noisy_embedding(**few, noise=n, relaxation=relaxation, backend=backend)
    want = torch.autograd.grad((out * up[[2, 9]]).sum(), leaves)
    for a, b in zip((gh, gw, ge), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    out = vgkern.noisy_embedding(**x, noise=noise(12), relaxation=relaxation, backend=backend)
    (none,) = torch.autograd.grad((out * 0).sum(), leaves[:1])
    assert (none == 0).all()


def test_nan_logits_spoil_only_their_own_row(backend):
    x = model()
    x["hidden"][4] = torch.nan
    h = x["hidden"].requires_grad_()
    out = vgkern.noisy_embedding(**x, noise=noise(12), backend=backend)
    (g,) = torch.autograd.grad(out.sum(), h)
    assert g[4].isnan().all() and g[torch.arange(12) != 4].isfinite().all()


@pytest.mark.parametrize("relaxation", ["gumbel", "expected"])
def test_a_row_without_a_possible_id_has_no_soft_gradient(backend, relaxation):
    x = model(bias="plain")
    x["bias"] = torch.full((200,), -torch.inf)
    names = ("hidden", "weight", "bias", "embedding")
    y = {k: v.clone().requires_grad_() if k in names else v for k, v in x.items()}
    out = vgkern.noisy_embedding(**y, noise=noise(12), relaxation=relaxation, backend=backend)
    *soft, table = torch.autograd.grad(out.sum(), [y[k] for k in names])
    assert all(not g.any() for g in soft)
    assert table.sum() == out.numel()


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(backend, other):
    x, grads = model(), []
    for on in (False, True):
        y = {k: x[k].clone().requires_grad_() for k in ("hidden", "weight", "embedding")}
        with torch.autocast("cpu", dtype=other, enabled=on):
            out = vgkern.noisy_embedding(**{**x, **y}, noise=noise(12), backend=backend)
            grads.append(torch.autograd.grad(out.square().sum(), list(y.values())))
    for plain, cast in zip(*grads, strict=True):
        assert torch.equal(plain, cast)


def test_table_sums_are_fp32_and_repeat(backend, threads):
    """4096 times the same token in bf16: a running bf16 sum would stop at 256."""
    n = 4096
    x = model(n=n, h=4, v=7, he=5, dtype=torch.bfloat16)
    x["tokens"].fill_(3)
    e = x["embedding"].requires_grad_()
    seen = []
    for count in (1, 2, 2):
        threads(count)
        out = vgkern.noisy_embedding(**x, noise=noise(n), backend=backend)
        seen.append(torch.autograd.grad(out.sum(), e)[0])
    assert (seen[0][3] == n).all() and seen[0].sum() == 5 * n
    assert all(torch.equal(g, seen[0]) for g in seen)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "embedding", "hidden weight", "all but e"])
def test_frozen_inputs(backend, frozen):
    x = model(bias="plain")
    names = ("hidden", "weight", "bias", "embedding")
    up = torch.randn(12, 9, generator=torch.Generator().manual_seed(7))

    def grads(leaves):
        y = {k: t.clone().requires_grad_(k in leaves) if k in names else t for k, t in x.items()}
        out = vgkern.noisy_embedding(**y, noise=noise(12), backend=backend)
        return dict(zip(leaves, torch.autograd.grad((out * up).sum(), [y[k] for k in leaves]),
                        strict=True))  # fmt: skip

    left = ["embedding"] if frozen == "all but e" else [k for k in names if k not in frozen.split()]
    want = grads(names)
    for k, g in grads(left).items():
        assert torch.equal(g, want[k]), k


def test_gradients_of_the_reference_fp64():
    x = model(n=3, h=4, v=6, he=3, dtype=torch.float64, bias="plain")
    leaves = tuple(x[k].clone().requires_grad_() for k in ("hidden", "weight", "bias"))
    drawn = vgkern.Noise(5, torch.arange(3), torch.zeros(3, dtype=torch.int64))

    def soft(h, w, b):
        return relaxed(h, w, b, x["embedding"], drawn, 0.7, 1.3, 4.0)

    def hard(h, w, b):
        return vgkern.noisy_embedding(
            h, w, x["embedding"], x["tokens"], drawn, bias=b, tau=0.7, temperature=1.3, softcap=4.0
        )

    assert torch.autograd.gradcheck(soft, leaves)
    up = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = (torch.autograd.grad(f(*leaves), leaves, up) for f in (soft, hard))
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-15)

    def gradient(h, w, b, up):  # a function like any other: the second derivative is right
        return torch.autograd.grad(hard(h, w, b), (h, w, b), up, create_graph=True)

    assert torch.autograd.gradcheck(gradient, (*leaves, up.requires_grad_()))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", ["h7-v31-3d", "h123-v1035-all"])
def test_strides(name, layout, backend):
    check(cases.by_name(f"noisy_embedding-{name}"), backend, torch.float32, layout)


def test_second_derivative_raises_on_fused_backends(backend):
    if backend == "torch":
        pytest.skip("the reference is differentiable twice")
    x = model()
    h = x["hidden"].requires_grad_()
    out = vgkern.noisy_embedding(**x, noise=noise(12), backend=backend)
    (g,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="torch"):
        g.sum().backward()


BAD = [
    ({"tokens": torch.full((12,), 200)}, ValueError, "tokens"),
    ({"tokens": torch.full((12,), -1)}, ValueError, "tokens"),
    ({"tokens": torch.zeros(12)}, TypeError, "tokens"),
    ({"tokens": torch.zeros(11, dtype=torch.int64)}, ValueError, "tokens"),
    ({"embedding": torch.zeros(199, 9)}, ValueError, "embedding"),
    ({"embedding": torch.zeros(200, 9, dtype=torch.int64)}, TypeError, "embedding"),
    ({"weight": torch.zeros(200, 15)}, ValueError, "hidden, weight"),
    ({"weight": torch.zeros(200, 16, dtype=torch.bfloat16)}, TypeError, "weight"),
    ({"tau": 0.0}, ValueError, "tau"),
    ({"tau": -1.0}, ValueError, "tau"),
    ({"tau": float("nan")}, ValueError, "tau"),
    ({"tau": 2.0, "relaxation": "expected"}, ValueError, "tau"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"relaxation": "straight"}, ValueError, "relaxation"),
    ({"noise": None}, TypeError, "noise"),
    ({"noise": 3}, TypeError, "noise"),
    ({"noise": 3, "relaxation": "expected"}, TypeError, "noise"),
    ({"noise": vgkern.Noise(0, torch.arange(5), torch.tensor(0))}, ValueError, "noise"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_names_the_argument(change, error, name):
    with pytest.raises(error, match=f"^{name}: got .*allowed: "):
        vgkern.noisy_embedding(**{**model(), "noise": noise(12), **change})


@pytest.mark.skipif("cpu" not in NATIVE, reason="the cpu backend's own memory")
def test_peak_memory():
    """Two blocks of 150 MiB together, the fp32 gradients and slack: not the 3 x 393 MiB of
    [N, V] logits, noise and u, in a process of its own."""
    import json
    import subprocess
    import sys

    program = """
import json, resource, torch, vgkern
n, h, v = 2048, 64, 50304
x = torch.randn(n, h, requires_grad=True); w = torch.randn(v, h, requires_grad=True)
e = torch.randn(v, h); y = torch.arange(n)
noise = vgkern.Noise(0, torch.arange(n), torch.tensor(0))
vgkern.noisy_embedding(x[:4], w, e, y[:4], vgkern.Noise(0, torch.arange(4), torch.tensor(0)),
                       backend="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vgkern.noisy_embedding(x, w, e, y, noise, backend="cpu").sum().backward()
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gradients = 2 * 4 * (2048 + 50304) * 64 / 2**20
    assert json.loads(done.stdout) < 150 + gradients + 60
