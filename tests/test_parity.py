"""Every case x backend x dtype against fp64 truth and plain PyTorch; the rule is in vgkern.cases.

`python -m pytest tests/test_parity.py --ratios` prints the measured errors.
"""

import importlib
import inspect
from dataclasses import dataclass

import conftest
import pytest
import torch
import torch.nn.functional as F

import vgkern
from vgkern import cases, objectives

# Plain PyTorch, as a user without this package writes it. In fp64 it is the truth. --------------


def eager_token_logprobs(logits, targets, temperature=1.0, softcap=None, ignore_index=-100):
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z.masked_fill(logits == -torch.inf, -torch.inf)
    lp = F.log_softmax(z / temperature, -1)
    keep = targets != ignore_index
    logp = lp.gather(-1, targets.clamp(0, lp.shape[-1] - 1)[..., None]).squeeze(-1)
    entropy = -(lp.exp() * lp.masked_fill(lp == -torch.inf, 0)).sum(-1)
    return {"logp": logp.where(keep, 0), "entropy": entropy.where(keep, 0)}


def eager_linear_token_logprobs(hidden, weight, targets, bias=None, **options):
    return eager_token_logprobs(F.linear(hidden, weight, bias), targets, **options)


def eager_group_advantages(rewards, groups, estimator):
    out = rewards.clone()
    for g in groups.unique():
        r = rewards[groups == g]
        if (r == r[0]).all() and estimator != "none":
            out[groups == g] = 0
        elif estimator == "grpo":
            out[groups == g] = (r - r.mean()) / (r.std() + 1e-4)
        elif estimator == "dr_grpo":
            out[groups == g] = r - r.mean()
        elif estimator == "rloo":
            out[groups == g] = r - (r.sum() - r) / (len(r) - 1)
    return {"advantages": out}


def eager_policy_loss(
    logp, advantages, objective, old_logp=None, ref_logp=None, sampler_logp=None, entropy=None,
    mask=None
):  # fmt: skip
    o = objectives.resolve(objective)
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    f = mask.to(logp.dtype)
    A = advantages if advantages.ndim == logp.ndim else advantages[:, None]
    lp = logp.where(mask, 0)
    old = lp.detach() if old_logp is None else old_logp.where(mask, 0)
    d = lp - old
    if o.ratio == "sequence":
        d = (d * f).sum(-1, keepdim=True) / f.sum(-1, keepdim=True).clamp(min=1)
    r = torch.exp(d)
    if o.surrogate == "clip":
        s = torch.min(r * A, r.clamp(1 - o.clip_low, 1 + o.clip_high) * A)
        if o.dual_clip is not None:
            s = torch.where(A < 0, torch.max(s, o.dual_clip * A), s)
    else:
        s = A * (lp if o.ratio == "none" else r)
    if o.sampler_correction != "none":
        gap = (old - sampler_logp).where(mask, 0)
        gap = gap.sum(-1, keepdim=True) if o.sampler_correction.startswith("sequence") else gap
        w = torch.exp(gap)
        truncate = o.sampler_correction.endswith("truncate")
        s = s * (w.clamp(max=o.sampler_max) if truncate else w * (w <= o.sampler_max))
    loss = -s
    if o.beta:
        e = (ref_logp - lp).where(mask, 0)
        k2 = 0.5 * e * e
        kl = {"k1": -e, "k2": k2, "k3": e.exp() - e - 1, "abs": e.abs()}[o.kl]
        kl = k2 + (kl - k2).detach() if o.kl_straight_through else kl
        loss = loss + o.beta * (kl * r if o.kl_ratio_corrected else kl)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * entropy.where(mask, 0)
    loss = loss * f
    n, (b, t) = f.sum(), (logp.shape if logp.ndim == 2 else (len(logp), 1))
    total = {
        "token": lambda x: x.sum() / n.clamp(min=1),
        "seq": lambda x: (x.sum(-1) / f.sum(-1).clamp(min=1)).sum() / max(b, 1),
        "seq_sum": lambda x: x.sum() / max(b, 1),
        "fixed": lambda x: x.sum() / max(b * (o.max_length or t), 1),
        "sum": lambda x: x.sum(),
    }[o.reduction]
    return {"loss": total(loss), "scale": total(loss.detach().abs())}


def eager_linear_policy_loss(
    hidden, weight, targets, bias=None, temperature=1.0, softcap=None, **k
):
    mask = k.get("mask")
    y = targets if mask is None else targets.where(mask, 0)
    lp = eager_linear_token_logprobs(
        hidden, weight, y, bias, temperature=temperature, softcap=softcap
    )
    return eager_policy_loss(lp["logp"], **k, entropy=lp["entropy"])


def eager_linear_sample(
    hidden, weight, noise, bias=None, temperature=1.0, softcap=None, top_k=None, top_p=None,
    min_p=None
):  # fmt: skip
    x = F.linear(hidden, weight, bias)
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    z = z.masked_fill(x == -torch.inf, -torch.inf).reshape(-1, weight.shape[0])
    t = torch.as_tensor(temperature, dtype=z.dtype).expand(hidden.shape[:-1]).reshape(-1)
    s, q = noise.rows(hidden.shape[:-1], z.device)
    words = vgkern.Noise(noise.seed, s, q).words(z.shape[-1]).to(torch.float64)
    u = ((words + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    gumbel = -torch.log(-torch.log1p(-u))
    token, logp, entropy, gap = [], [], [], []
    for row, temp, g in zip(z, t, gumbel, strict=True):
        if temp == 0:
            order = row.argsort(descending=True, stable=True)
            keep = order[:1]
        else:
            row = row / temp
            order = row.argsort(descending=True, stable=True)
            keep = order[: top_k or len(order)]
            p = row[keep].softmax(-1)
            if top_p is not None:
                below = torch.cat([p.new_zeros(1), p.cumsum(-1)[:-1]])
                keep = keep[(below < top_p) | (below == 0)]
            if min_p is not None:
                keep = keep[p[: len(keep)] >= min_p * p[0]]
        lp = row[keep].log_softmax(-1)
        score = row[keep].double() + g[keep]
        two = score.sort(descending=True).values[:2]
        gap.append(two[0] - two[1] if len(two) > 1 else two[0].new_tensor(torch.inf))
        token.append(keep[score.argmax()])
        logp.append(lp[score.argmax()])
        entropy.append(-(lp.exp() * lp.masked_fill(lp == -torch.inf, 0)).sum())
    shape = hidden.shape[:-1]
    out = {"logp": logp, "entropy": entropy, "gap": gap, "token": token}
    return {k: torch.stack(v).reshape(shape) if v else z.new_zeros(shape) for k, v in out.items()}


# The comparison ---------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "transposed", "sliced", "every other row")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values under other strides, never overlapping."""
    if x.ndim == 0 or layout == "contiguous":
        return x.clone()
    if layout == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    junk = torch.nan if x.is_floating_point() else 1
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), junk)
        wide[..., 3:-2] = x
        return wide[..., 3:-2]
    tall = x.new_full((2 * x.shape[0], *x.shape[1:]), junk)
    tall[::2] = x
    return tall[::2]


@dataclass(frozen=True)
class Ratio:
    op: str
    case: str
    backend: str
    dtype: str
    tensor: str
    error: float  # relative to the norm of the truth
    eager: float
    used: float  # share of the allowed error


def measure(got, eager, truth, floor_dtype, scale=None):
    """(error, eager's error, share of what is allowed), the worst of norm and rows."""
    got, eager, truth = (x.detach().double() for x in (got, eager, truth))
    assert got.shape == truth.shape
    infinite = truth == -torch.inf
    assert bool((got[infinite] == -torch.inf).all()), "probability 0 must be -inf"
    got, truth = got.masked_fill(infinite, 0), truth.masked_fill(infinite, 0)
    eager = eager.masked_fill(infinite | ~eager.isfinite(), 0)
    assert bool(got.isfinite().all()), "not finite, or not written"
    if truth.numel() == 0:
        return 0.0, 0.0, 0.0
    floor = cases.FLOOR[floor_dtype]
    info = torch.finfo(floor_dtype)
    tiny = info.smallest_normal * info.eps * truth.numel() ** 0.5 + 1e-30
    rows = [x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1) for x in (got, eager, truth)]
    base = truth.norm() if scale is None else scale.double()
    error, other = float((got - truth).norm()), float((eager - truth).norm())
    used = error / (2 * other + floor * float(base) + tiny)
    norm = rows[2].norm(dim=-1) if scale is None else scale.double().reshape(1)
    guard = norm.clamp(min=1e-2 * float(norm.max())) + tiny
    worst = float(((rows[0] - rows[2]).norm(dim=-1) / guard).max())
    worst_eager = float(((rows[1] - rows[2]).norm(dim=-1) / guard).max())
    used = max(used, worst / (2 * worst_eager + 4 * floor + tiny / float(guard.min())))
    base = float(base) + tiny
    return error / base, other / base, used


def fp64(inputs):
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def run(function, inputs, names, upstream):
    """Outputs of `function`, and the gradient of <outputs, upstream> for `names`."""
    inputs = dict(inputs)
    leaves = [k for k in names if k in inputs]
    for k in leaves:
        inputs[k] = inputs[k].detach().requires_grad_()
    out = function(**inputs)
    out = out if isinstance(out, dict) else outputs(out)
    total = sum((out[k] * u.to(out[k].dtype)).sum() for k, u in upstream.items() if k in out)
    grads = torch.autograd.grad(total, [inputs[k] for k in leaves]) if leaves else []
    return out, {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def outputs(out):
    if isinstance(out, torch.Tensor):
        return {"advantages": out}
    return {k: v for k, v in out._asdict().items() if isinstance(v, torch.Tensor)}


def check(case, backend, dtype, layout="contiguous", seed=0):
    """Runs one case; AssertionError where the rule does not hold. The measured `Ratio`s."""
    inputs = case.make(dtype, seed)
    eager = globals()[f"eager_{case.op}"]
    truth, dtruth = run(eager, fp64(inputs), case.grads, up := upstream(case, inputs))
    plain, dplain = run(eager, inputs, case.grads, up)
    given = {
        k: laid_out(v, layout) if k in (*case.grads, "targets", "mask", "rewards") else v
        for k, v in inputs.items()
    }
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    op = getattr(vgkern, case.op)
    got, dgot = run(lambda **k: op(**k, backend=backend), given, case.grads, up)
    for k, v in before.items():
        assert torch.equal(v.nan_to_num(), given[k].nan_to_num()), f"{k} was modified"
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    decided = truth["gap"] > 1e-3 if case.op == "linear_sample" else None
    if decided is not None:
        assert torch.equal(got["token"][decided], truth["token"][decided])
        assert got["token"].dtype == torch.int64
    rows = []
    for k in [k for k in (*got, *dgot) if k != "token"]:
        a, b, c = (({**x, **dx})[k] for x, dx in ((got, dgot), (plain, dplain), (truth, dtruth)))
        expected = inputs[k[1:]].dtype if k in dgot else stats
        expected = inputs["rewards"].dtype if case.op == "group_advantages" else expected
        assert a.dtype == expected, f"{k} is {a.dtype}, not {expected}"
        if decided is not None:
            same = (plain["token"] == truth["token"]) | (k == "entropy")
            a, b, c = a[decided], b.where(same, torch.nan)[decided], c[decided]
        scale = truth["scale"] if k == "loss" else None
        error, other, used = measure(a, b, c, a.dtype, scale)
        name = str(dtype).removeprefix("torch.")
        rows.append(Ratio(case.op, case.name, backend, name, k, error, other, used))
        conftest.RATIOS.append(rows[-1])
        assert used <= 1, f"{k}: error {error:.2e}, eager's {other:.2e}, {used:.2f} of allowed"
    return rows


def upstream(case, inputs):
    """Gradients that arrive from above: random per row, and never 1."""
    g = torch.Generator().manual_seed(5)
    if case.op.endswith("policy_loss"):
        return {"loss": torch.tensor(-1.75)}
    if not case.grads:
        return {}
    shape = inputs["targets"].shape
    return {k: torch.randn(shape, generator=g) for k in ("logp", "entropy")}


def dtypes(case, backend):
    return [d for d in case.dtypes if d != torch.float64 or backend == "torch"]


GRID = [
    pytest.param(c, b, d, id=f"{c}-{b}-{str(d).removeprefix('torch.')}")
    for c in cases.CASES
    for b in ("torch", "cpu")
    for d in dtypes(c, b)
]


@pytest.mark.parametrize(("case", "backend", "dtype"), GRID)
def test_parity(case, backend, dtype):
    conftest.skip_unless_runs(backend)
    check(case, backend, dtype)


# One case per op and layout; dtypes add nothing to strides.
STRIDED = ("token_logprobs-v31-3d", "token_logprobs-v1035-ignore", "group_advantages-grpo-ragged",
           "linear_token_logprobs-h7-v31-3d", "linear_token_logprobs-h123-v1035-all",
           "policy_loss-full", "policy_loss-gspo", "linear_policy_loss-full-bias",
           "linear_policy_loss-gspo", "linear_sample-h123-v1035-3d",
           "linear_sample-all-cuts")  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", STRIDED)
def test_strides(name, layout, backend):
    check(cases.by_name(name), backend, torch.float32, layout)


# The oracle has to bite: each of these must fail it. ----------------------------------------------


def _scaled_gradient(x, by=1.01):
    return x.detach() + by * (x - x.detach())


def _logprobs(change):
    return lambda ref: lambda *a: change(ref, *a)


MUTATIONS = {
    "token_logprobs: off-by-one target": (
        "token_logprobs-v31-3d", _logprobs(
            lambda ref, z, y, *a: ref(z, (y + 1) % z.shape[-1], *a))),
    "token_logprobs: entropy without gradient": (
        "token_logprobs-v33-temperature", _logprobs(
            lambda ref, *a: (o := ref(*a))._replace(entropy=o.entropy.detach()))),
    "token_logprobs: temperature not in the gradient": (
        "token_logprobs-v33-temperature", _logprobs(
            lambda ref, z, *a: ref(_scaled_gradient(z, 0.7), *a))),
    "linear_token_logprobs: dW 1% too large": (
        "linear_token_logprobs-h64-v1000-ignore", _logprobs(
            lambda ref, h, w, *a: ref(h, _scaled_gradient(w), *a))),
    "linear_token_logprobs: one row of dh is zero": (
        "linear_token_logprobs-h64-v1000-ignore", _logprobs(
            lambda ref, h, *a: ref(torch.cat([h[:1], h[1:2].detach(), h[2:]]), *a))),
    "linear_token_logprobs: no bias gradient": (
        "linear_token_logprobs-h7-v31-3d", _logprobs(
            lambda ref, h, w, b, *a: ref(h, w, 0 * b + b.detach(), *a))),
    "group_advantages: biased deviation": (
        "group_advantages-grpo", _logprobs(
            lambda ref, r, *a: ref(r, *a) * 1.01)),
    "policy_loss: entropy term dropped": (
        "policy_loss-full", _logprobs(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(entropy_coef=0.0), *r))),
    "policy_loss: clip bounds swapped": (
        "policy_loss-dapo", _logprobs(
            lambda ref, lp, a, w, o, *r: ref(
                lp, a, w, o.replace(clip_low=0.28, clip_high=0.2), *r))),
    "policy_loss: sequence ratio without gradient of the others": (
        "policy_loss-gspo", _logprobs(
            lambda ref, lp, a, w, o, *r: ref(_scaled_gradient(lp, 0.98), a, w, o, *r))),
    "linear_policy_loss: mask ignored": (
        "linear_policy_loss-grpo-h7-v31", _logprobs(
            lambda ref, h, w, b, y, rows, *a: ref(
                h, w, b, y.clamp(max=0), (rows[0], rows[1] + 1e-3, *rows[2:]), *a))),
    "linear_policy_loss: dW in bfloat16": (
        "linear_policy_loss-dapo-temperature", _logprobs(
            lambda ref, h, w, *a: ref(h, w.detach() + (w - w.detach()) * (1 + 2.0**-8), *a))),
    "linear_sample: log-prob before truncation": (
        "linear_sample-top-k", _logprobs(
            lambda ref, *a: ref(*a)._replace(logp=ref(*a[:6], 0, *a[7:]).logp))),
    "linear_sample: noise of the next position": (
        "linear_sample-h7-v31", _logprobs(
            lambda ref, h, w, b, n, *a: ref(
                h, w, b, vgkern.Noise(n.seed, n.sequence, n.position + 1), *a))),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_fails(mutation, monkeypatch):
    name, change = MUTATIONS[mutation]
    case = cases.by_name(name)
    module = importlib.import_module(f"vgkern.ops.{case.op}")
    reference = getattr(module, f"{case.op}_ref")
    check(case, "torch", torch.float32)
    monkeypatch.setattr(module, f"{case.op}_ref", change(reference))
    kept = len(conftest.RATIOS)
    with pytest.raises(AssertionError):
        check(case, "torch", torch.float32)
    del conftest.RATIOS[kept:]


def test_unwritten_memory_is_nan():
    assert torch.empty(7).isnan().all()
    assert torch.full((7,), 1.0).new_empty(7).isnan().all()


def test_every_op_has_cases():
    known = {n.removeprefix("eager_") for n, f in globals().items() if inspect.isfunction(f)}
    for op in {c.op for c in cases.CASES}:
        assert op in known
        assert op in vgkern.__all__


@pytest.mark.parametrize("op", sorted({c.op for c in cases.CASES}))
def test_flop_and_byte_models(op):
    for case in [c for c in cases.CASES if c.op == op]:
        x = case.make(torch.float32, 0)
        assert case.flops(x) >= 0 and case.bytes(x) >= 0
        assert "zero" in case.name or case.bytes(x) > 0
