"""The comparison of every backend with fp64 truth and with plain PyTorch in the same dtype.

The rule is in vgkern.cases; plain PyTorch is in tests/eager, one file per family of ops.
"""

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path

import conftest
import torch

import vgkern
from vgkern import cases

_FAMILIES = [
    importlib.import_module(f"eager.{p.stem}")
    for p in sorted(Path(__file__).with_name("eager").glob("*.py"))
]
EAGER = {
    name.removeprefix("eager_"): f
    for family in _FAMILIES
    for name, f in vars(family).items()
    if name.startswith("eager_")
}
MUTATIONS = {name: m for family in _FAMILIES for name, m in family.MUTATIONS.items()}
NOT_DIFFERENTIABLE = ("token", "gap", "scale")
AS_INPUT = ("action", "costates", "states")  # values in the dtype of the inputs, not statistics
LAYOUTS = ("contiguous", "transposed", "sliced", "every other row")


ROWS = ("targets", "logp", "rewards", "hidden", "mean", "initial", "terminal")  # one is there


def by_rows(x, change):
    """The inputs of a case, those that have its rows changed."""
    rows = next(x[k] for k in ROWS if k in x).shape[0]

    def changed(t):
        return change(t) if t.ndim and t.shape[0] == rows else t

    out = {}
    for k, v in x.items():
        if isinstance(v, torch.Tensor) and k not in ("weight", "teacher_weight", "embedding"):
            v = changed(v)
        elif isinstance(v, vgkern.Noise):
            v = vgkern.Noise(v.seed, changed(v.sequence), changed(v.position))
        elif isinstance(v, vgkern.Costate):
            drawn = v.noise
            if drawn is not None:
                drawn = vgkern.Noise(drawn.seed, changed(drawn.sequence), changed(drawn.position))
            v = dataclasses.replace(v, value=changed(v.value), noise=drawn)
        out[k] = v
    return out


def inputs(case, dtype, backend):
    """Those of a case; for an emulated backend three of its rows. This is for tests of how an op
    may be called: the values are compared at every size by the tests of parity."""
    x = case.make(dtype, 0)
    return by_rows(x, lambda t: t[:3]) if few_rows(case, backend) else x


def few_rows(case, backend):
    """Whether a few rows of a case are to do: not where they are groups that belong together."""
    return backend in conftest.EMULATED and case.op != "group_advantages"


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
    total = sum((out[k] * u.to(out[k].dtype)).sum() for k, u in upstream.items() if k in out)
    grads = []
    if leaves:  # an input that no step uses has gradient 0
        wanted = [inputs[k] for k in leaves]
        grads = torch.autograd.grad(total, wanted, materialize_grads=True)
    return out, {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def outputs(out, single):
    """Outputs by name; an op that returns one tensor has it under the name `single`."""
    if isinstance(out, torch.Tensor):
        return {single: out}
    return {k: v for k, v in out._asdict().items() if isinstance(v, torch.Tensor)}


def moved(x, device):
    """A tensor, noise or costate on another device; anything else as it is."""
    if isinstance(x, vgkern.Costate):
        given = {f.name: moved(getattr(x, f.name), device) for f in dataclasses.fields(x)}
        return vgkern.Costate(**given)
    if isinstance(x, vgkern.Noise):
        return vgkern.Noise(x.seed, x.sequence.to(device), x.position.to(device))
    return x.to(device) if isinstance(x, torch.Tensor) else x


def check(case, backend, dtype, layout="contiguous", seed=0, device="cpu"):
    """Runs one case; AssertionError where the rule does not hold. The measured `Ratio`s. Truth and
    plain PyTorch are of the CPU, whatever the device of the backend."""
    inputs = case.make(dtype, seed)
    eager = EAGER[case.op]
    up = upstream(case, eager(**fp64(inputs)))
    truth, dtruth = run(eager, fp64(inputs), case.grads, up)
    plain, dplain = run(eager, inputs, case.grads, up)
    given = {
        k: laid_out(v.to(device), layout) if isinstance(v, torch.Tensor) else moved(v, device)
        for k, v in inputs.items()
    }
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    op = getattr(vgkern, case.op)
    single = next(iter(truth))
    above = {k: v.to(device) for k, v in up.items()}
    got, dgot = run(lambda **k: outputs(op(**k, backend=backend), single), given, case.grads, above)
    for k, v in before.items():
        assert torch.equal(v.nan_to_num(), given[k].nan_to_num()), f"{k} was modified"
    got, dgot = ({k: v.cpu() for k, v in x.items()} for x in (got, dgot))
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
        expected = dtype if k in AS_INPUT else expected
        expected = inputs["embedding"].dtype if k == "x" else expected
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


def upstream(case, out):
    """Gradients that arrive from above: random per element, and never 1."""
    if not case.grads:
        return {}
    g = torch.Generator().manual_seed(5)
    if case.op.endswith("policy_loss"):
        return {"loss": torch.tensor(-1.75)}
    names = [k for k in out if k not in NOT_DIFFERENTIABLE]
    return {k: torch.randn(out[k].shape, generator=g) for k in names}


def dtypes(case, backend):
    """fp64 is the reference's. An emulated backend has fp16 in one case per op: its conversions are
    the same code everywhere. Cases of many steps are there for the sums, which are fp32."""
    if backend == "torch":
        return case.dtypes
    slow = backend in conftest.EMULATED
    return [d for d in case.dtypes if d != torch.float64
            and not (slow and d == torch.float16 and str(case) not in HALF)
            and not (slow and d == torch.bfloat16 and str(case) in LONG)]  # fmt: skip


HALF = ("token_logprobs-v1035-ignore", "linear_token_logprobs-h123-v1035-all",
        "linear_token_logprobs-all-cuts", "linear_policy_loss-full-bias", "linear_sample-all-cuts",
        "gaussian_action-n7-3d", "costate_scan-n33-done", "linear_rollout-n4-shared",
        "noisy_embedding-h123-v1035-all", "linear_divergence-h123-v1035-jsd",
        "linear_token_logprobs-costate-all", "linear_policy_loss-costate-full")  # fmt: skip
LONG = ("costate_scan-long", "costate_scan-diagonal-long", "linear_rollout-long",
        "linear_rollout-diagonal-long-number")  # fmt: skip
