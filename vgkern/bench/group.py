"""One op at one shape: every variant on the same tensors, and its check against ours."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import vgkern

from . import inputs
from .clock import Call
from .rivals import DEFAULT, RIVALS, Ours, Outputs, Rival, Skip
from .work import BOTH, Inputs, Work, bare_products, differentiated, size, tensors

GEMM = "bare GEMMs"
# What a rival may differ from us, relative: more is another formula, not another rounding. Logits
# that are rounded to bf16 move a log-prob by 3e-2.
TOLERANCE = {"fp32": 2e-3, "bf16": 0.15, "fp16": 0.05}
ROTATE = 4  # times the L2 cache
_loaded: dict[tuple[str, str], Rival | Skip] = {}


def library(name: str, device: torch.device) -> Rival:
    """The adapter of that name, loaded once; raises the same Skip every time."""
    key = (name, device.type)
    if key not in _loaded:
        ours = name.startswith("vgkern ")
        kind = next((r for r in RIVALS if r.name == name), None)
        rival = Ours(name.removeprefix("vgkern ")) if ours else kind() if kind else None
        if rival is None:
            raise KeyError(name)
        try:
            rival.load(device)
            _loaded[key] = rival
        except Skip as why:
            _loaded[key] = why
        except Exception as error:  # a library that breaks at import must not end the run
            _loaded[key] = Skip(f"{type(error).__name__}: {first_line(error)}")
    found = _loaded[key]
    if isinstance(found, Skip):
        raise found
    return found


def base(device: torch.device) -> str:
    """vgkern's own choice of backend here: the first that runs."""
    for backend in DEFAULT[device.type]:
        try:
            library(f"vgkern {backend}", device)
            return f"vgkern {backend}"
        except Skip:
            continue
    raise AssertionError("the torch backend always runs")


class Group:
    def __init__(self, work: Work, device: torch.device, copies: int = 0) -> None:
        self.work, self.device = work, device
        self.base = base(device)
        x = inputs.make(work, device)
        self.leaves = [k for k in work.case.grads if k in x] if work.pass_ == BOTH else []
        self.xs = [self._leaves(x)]
        for _ in range((copies or self._copies(x)) - 1):
            new = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
            self.xs.append(self._leaves(new))
        self.upstream: list[Tensor] = []
        self.expected: tuple[Outputs, list[Tensor]] | None = None

    def _leaves(self, x: Inputs) -> Inputs:
        return {k: v.detach().requires_grad_() if k in self.leaves else v for k, v in x.items()}

    def _copies(self, x: Inputs) -> int:
        if self.device.type != "cuda":
            return 1
        l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 50 << 20)
        return min(max(math.ceil(ROTATE * l2 / max(size(*tensors(x)), 1)), 1), 16)

    def call(self, name: str, x: Inputs | None = None) -> Call:
        """One call of a variant; raises Skip when it has none."""
        if name == GEMM:
            products = bare_products(self.work, x or self.xs[0])
            if products is None:
                raise Skip("no product with a head")
            return products
        forward, x = library(name, self.device).forward(self.work.op), x or self.xs[0]
        count, leaves = differentiated(self.work.op), [x[k] for k in self.leaves]

        def only_forward() -> Outputs:
            with torch.no_grad():
                return forward(x)

        def both() -> Outputs:
            for leaf in leaves:
                leaf.grad = None
            out = forward(x)
            down = [t for t in out[:count] if t is not None]
            torch.autograd.backward(down, self._upstream(down))
            return out

        return both if self.leaves else only_forward

    def _upstream(self, out: Sequence[Tensor]) -> list[Tensor]:
        """What arrives from behind: the same for every variant; 1 for a loss."""
        if not self.upstream:
            g = torch.Generator().manual_seed(7)
            for t in out:
                u = torch.randn(t.shape, generator=g) if t.ndim else torch.ones(())
                self.upstream.append(u.to(self.device))
        pairs = zip(self.upstream, out, strict=False)
        return [u.reshape(t.shape).to(t.dtype) for u, t in pairs]

    def forget(self) -> None:
        for x in self.xs:
            for k in self.leaves:
                x[k].grad = None

    def result(self, name: str) -> tuple[Outputs, list[Tensor]]:
        """Values and gradients of one call; of copy 0."""
        out = self.call(name)()
        grads = [self.xs[0][k].grad for k in self.leaves]
        return tuple(t if t is None else t.detach() for t in out), grads  # type: ignore[attr-defined,return-value]

    def check(self, name: str) -> float:
        """The largest relative difference to ours; raises Skip beyond TOLERANCE."""
        if name == GEMM:
            return 0.0
        if self.work.op == "linear_sample":
            return self._check_sample(name)
        if self.expected is None:
            self.expected = self.result(self.base)
            self.forget()
        if name == self.base:
            return 0.0
        (out, grads), (true, true_grads) = self.result(name), self.expected
        errors = [difference(a, b, 0.1) for a, b in zip(out, true, strict=False) if a is not None]
        for k, a, b in zip(self.leaves, grads, true_grads, strict=True):
            if a is None:
                raise Skip(f"it gives no gradient of {k}")
            errors.append(difference(a, b, 0.0))
        self.forget()
        return self._verdict(max(errors))

    def _check_sample(self, name: str) -> float:
        """Draws differ: the log-prob of each drawn token is checked, and that on average it is
        minus the entropy, within six standard errors."""
        x = self.xs[0]
        token, logp = self.result(name)[0][:2]
        assert token is not None and logp is not None
        h, w = x["hidden"], x["weight"]
        true = vgkern.linear_token_logprobs(h, w, token, backend=self.base.split()[1])
        gap = true.logp + true.entropy
        error = float(gap.std() / math.sqrt(len(gap)))
        if len(gap) > 1 and abs(float(gap.mean())) > 6 * error:
            raise Skip(f"draws from another distribution: mean log-prob {float(gap.mean()):+.2g} "
                       f"from minus the entropy, standard error {error:.2g}")  # fmt: skip
        return self._verdict(difference(logp, true.logp, 0.1))

    def _verdict(self, error: float) -> float:
        allowed = TOLERANCE[self.work.dtype]
        if not error <= allowed:  # NaN too
            raise Skip(f"computes something else: {error:.2g} from ours, allowed: {allowed:.2g}")
        return error


def difference(a: Tensor, b: Tensor | None, least: float) -> float:
    """|a - b| / |b|, norms; |b| counts as at least `least` an element. A head's worth at a time."""
    if b is None or a.shape != b.shape:
        return math.inf
    above = below = 0.0
    for p, q in zip(a.reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True):
        above += float((p.float() - q.float()).square().sum(dtype=torch.float64))
        below += float(q.float().square().sum(dtype=torch.float64))
    scale = max(math.sqrt(below), least * math.sqrt(a.numel()))
    return math.sqrt(above) / scale if scale else (0.0 if above == 0 else math.inf)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:160]
