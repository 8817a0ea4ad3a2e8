"""The launches of real use: every launcher of kernels/ at the shapes that people train with.

A shape of Llama 3, one of SmolLM2, and one where nothing is a multiple of 16; the options that
choose other code in a kernel. The tensors have no data. A test holds that every kernel that any
launcher can launch is launched by one of these.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.gate.coverage import KERNELS
from vgkern.gate.record import Launch
from vgkern.ops._truncate import Cut

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", F16: "fp16", F32: "fp32"}
FILES = {  # of the operators that do not have the name of their file
    "linear_logprobs_fwd": "linear_token_logprobs",
    "linear_logprobs_bwd": "linear_token_logprobs",
    "linear_truncated_logprobs_fwd": "linear_token_logprobs",
    "linear_truncated_logprobs_bwd": "linear_token_logprobs",
}
SEED = 0x1234_5678_9ABC_DEF1
IGNORE = -100
ALL, FROZEN_HEAD = [True, True, True], [True, False, False]


class Head(NamedTuple):
    """A model's head: N rows of H to V."""

    name: str
    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {SHORT[self.dtype]}"

    def tensors(self, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight, bias."""
        h = torch.empty(self.rows, self.hidden, dtype=self.dtype)
        w = torch.empty(self.vocab, self.hidden, dtype=self.dtype)
        return h, w, torch.empty(self.vocab, dtype=self.dtype) if bias else None


LLAMA = Head("V128256 H4096", 4096, 4096, 128256, BF16)
SMOL = Head("V49152 H576", 4096, 576, 49152, BF16)
ODD = Head("V50257 H770", 999, 770, 50257, F32)
FEW = Head("V128256 H4096 N32", 32, 4096, 128256, BF16)
WIDE_ODD = Head("V50257 H4096", 999, 4096, 50257, BF16)  # rows of [N, V] start at odd addresses
FEW_ODD = Head("V50257 H770 N3", 3, 770, 50257, F32)
HALF = Head("V49152 H576", 4096, 576, 49152, F16)


def launcher(operator: str) -> Callable[..., Any]:
    """The launcher of an operator, which has its name and the arguments of its schema."""
    module: Any = importlib.import_module(f"vgkern.kernels.{_file(operator)}")
    found: Callable[..., Any] = getattr(module, operator)
    return found


def f32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=F32)


def ids(rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.int64)


def noise(rows: int) -> tuple[int, Tensor, Tensor]:
    return SEED, ids(rows), ids(rows)


def three(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and lse of a forward, or any three statistics of a row."""
    return f32(rows), f32(rows), f32(rows)


def launches(only: str = "") -> list[Launch]:
    """All launches, or those of operators whose name starts with `only`."""
    makers = (
        _logprobs,
        _linear,
        _truncated,
        _sample,
        _policy,
        _linear_policy,
        _credit,
        _continuous,
    )
    found = [launch for make in makers for launch in make()]
    there = {path.stem for path in KERNELS.glob("*.py")}
    return [x for x in found if x.operator.startswith(only) and _file(x.operator) in there]


def _file(operator: str) -> str:
    return FILES.get(operator, operator.removesuffix("_fwd").removesuffix("_bwd"))


def _launch(operator: str, label: str, arguments: Callable[[], tuple[Any, ...]]) -> Launch:
    return Launch(operator, label, lambda: launcher(operator)(*arguments()))


def _logprobs() -> Iterator[Launch]:
    def case(label: str, head: Head, softcap: float = 0.0, sliced: bool = False) -> list[Launch]:
        def logits() -> Tensor:
            if sliced:  # rows that do not start at multiples of 16 bytes
                return torch.empty(head.rows, head.vocab + 1, dtype=head.dtype)[:, 1:]
            return torch.empty(head.rows, head.vocab, dtype=head.dtype)

        def fwd() -> tuple[Any, ...]:
            return logits(), ids(head.rows), 0.7, softcap, IGNORE

        def bwd() -> tuple[Any, ...]:
            n = head.rows
            stats = (*three(n), f32(n), f32(n))
            return logits(), ids(n), *stats, 0.7, softcap, IGNORE

        return [
            _launch("token_logprobs_fwd", f"{head} {label}", fwd),
            _launch("token_logprobs_bwd", f"{head} {label}", bwd),
        ]

    yield from case("", LLAMA)
    yield from case("softcap", HALF, 30.0)
    yield from case("", ODD)
    yield from case("sliced", SMOL, sliced=True)


def _linear() -> Iterator[Launch]:
    def case(head: Head, bias: bool, softcap: float, needs: list[bool]) -> list[Launch]:
        def fwd() -> tuple[Any, ...]:
            return *head.tensors(bias), ids(head.rows), 1.0, softcap, IGNORE

        def bwd() -> tuple[Any, ...]:
            n = head.rows
            stats = (*three(n), f32(n), f32(n))
            return *head.tensors(bias), ids(n), *stats, 1.0, softcap, IGNORE, needs

        extra = "bias softcap" if bias else "frozen head" if needs == FROZEN_HEAD else ""
        made = [_launch("linear_logprobs_fwd", f"{head} {extra}", fwd)]
        if head.rows > 64:  # fewer are scored, not trained on
            made.append(_launch("linear_logprobs_bwd", f"{head} {extra}", bwd))
        return made

    yield from case(LLAMA, False, 0.0, ALL)
    yield from case(SMOL, True, 30.0, ALL)
    yield from case(ODD, False, 0.0, FROZEN_HEAD)
    yield from case(FEW, False, 0.0, ALL)
    yield from case(FEW_ODD, False, 0.0, ALL)
    yield from case(WIDE_ODD, True, 30.0, ALL)

    def grad(head: Head, bias: bool = False, softcap: float = 0.0) -> Launch:
        def arguments() -> tuple[Any, ...]:
            n = head.rows
            stats = (*three(n), f32(n), f32(n))
            out = torch.empty(n, head.vocab, dtype=head.dtype)
            return *head.tensors(bias), ids(n), *stats, 1.0, softcap, IGNORE, out

        return _launch("linear_grad", f"{head} {'bias softcap' if bias else ''}", arguments)

    yield grad(LLAMA)
    yield grad(SMOL)
    yield grad(HALF, True, 30.0)
    yield grad(FEW)
    yield grad(ODD)
    yield grad(WIDE_ODD, True, 30.0)


def _truncated() -> Iterator[Launch]:
    def case(head: Head, bias: bool, softcap: float, cut: Callable[[int], Cut]) -> list[Launch]:
        n = head.rows

        def fwd() -> tuple[Any, ...]:
            return *head.tensors(bias), ids(n), softcap, IGNORE, *cut(n)

        def bwd() -> tuple[Any, ...]:
            given = (*head.tensors(bias), ids(n), f32(n), f32(n), softcap, IGNORE, *cut(n))
            return *given, [True, True, bias]

        label = f"{head}{' bias softcap' if bias else ''}"
        return [
            _launch("linear_truncated_logprobs_fwd", label, fwd),
            _launch("linear_truncated_logprobs_bwd", label, bwd),
        ]

    yield from case(LLAMA, False, 0.0, lambda n: Cut(1.0, 50, 0.95, 0.05, f32(n)))
    yield from case(ODD, True, 30.0, lambda n: Cut(1.0, 0, 0.95))


def _sample() -> Iterator[Launch]:
    def case(
        label: str, head: Head, rows: int, bias: bool, softcap: float, cut: Callable[[int], Cut]
    ) -> Launch:
        def arguments() -> tuple[Any, ...]:
            rolled = head._replace(rows=rows)
            return *rolled.tensors(bias), *noise(rows), softcap, *cut(rows)

        return _launch("linear_sample_fwd", f"{head} B{rows} {label}", arguments)

    def every(n: int) -> Cut:
        return Cut(1.0, 0, 1.0, 0.0, f32(n), ids(n), f32(n), f32(n))

    yield case("", LLAMA, 256, False, 0.0, lambda n: Cut())
    yield case("top_k top_p min_p", LLAMA, 256, False, 0.0, lambda n: Cut(1.0, 50, 0.95, 0.05))
    yield case("top_p", SMOL, 64, False, 0.0, lambda n: Cut(1.0, 0, 0.95))
    yield case("min_p", SMOL, 64, False, 0.0, lambda n: Cut(1.0, 0, 1.0, 0.05))
    yield case("of each row", LLAMA, 64, False, 0.0, every)
    yield case("bias softcap", ODD, 1, True, 30.0, lambda n: Cut())
    yield case("of each row bias softcap", ODD, 1, True, 30.0, every)


def _policy() -> Iterator[Launch]:
    def case(label: str, o: objectives.Objective, shape: tuple[int, int], extras: bool) -> Launch:
        def arguments() -> tuple[Any, ...]:
            logs = [f32(*shape) if extras else None for _ in range(4)]
            return f32(*shape), f32(*shape), f32(*shape), *logs, o.pack()

        return _launch("policy_loss_fwd", f"{label} {list(shape)}", arguments)

    every = objectives.GRPO.replace(beta=0.04, entropy_coef=0.01)
    yield case("grpo", objectives.GRPO, (64, 1024), False)
    yield case("grpo all terms", every, (64, 1024), True)
    yield case("gspo", objectives.GSPO, (63, 777), True)
    yield case("vespo all terms", objectives.VESPO.replace(beta=0.04), (64, 1024), True)
    yield case("gmpo", objectives.GMPO, (64, 1024), False)

    def packed() -> tuple[Any, ...]:
        n, everything = 4096, objectives.GSPO.replace(beta=0.04, entropy_coef=0.01)
        return *(f32(n, 1) for _ in range(7)), everything.pack(), ids(65)

    yield _launch("policy_loss_fwd", "gspo all terms packed", packed)
    yield _launch("group_advantages_fwd", "B512", lambda: (f32(512).double(), ids(512), 0))
    yield _launch("group_advantages_fwd", "B37", lambda: (f32(37).double(), ids(37), 2))


def _linear_policy() -> Iterator[Launch]:
    def case(
        head: Head, label: str, extras: bool, bias: bool, softcap: float, needs: list[bool],
        costate: bool = False,
    ) -> Launch:  # fmt: skip
        def arguments() -> tuple[Any, ...]:
            n = head.rows
            logs = [f32(n) if extras else None for _ in range(3)]
            o = objectives.GRPO.replace(beta=0.04, entropy_coef=0.01) if extras else objectives.GRPO
            rows = (ids(n), f32(n), f32(n), *logs)
            third: tuple[Any, ...] = ()
            if costate:
                seed, sequence, position = noise(n)
                third = (seed, 0.5, *head.tensors()[:2], sequence, position, f32(1).view(()))
            return *head.tensors(bias), *rows, 1.0, softcap, o.pack(), needs, *third

        return _launch("linear_policy_loss_fwd", f"{head} {label}", arguments)

    yield case(LLAMA, "", False, False, 0.0, ALL)
    yield case(SMOL, "all terms bias softcap", True, True, 30.0, ALL)
    yield case(ODD, "frozen head", False, False, 0.0, FROZEN_HEAD)
    yield case(LLAMA, "costate", False, False, 0.0, ALL, costate=True)
    yield case(SMOL, "costate all terms bias softcap", True, True, 30.0, ALL, costate=True)


def _credit() -> Iterator[Launch]:
    def noisy(head: Head, bias: bool, softcap: float, expected: bool) -> Launch:
        def arguments() -> tuple[Any, ...]:
            n = head.rows
            table, dx = torch.empty_like(head.tensors()[1]), torch.empty_like(head.tensors()[0])
            options = (0.5, 1.0, softcap, expected, [True, True, bias, True])
            return *head.tensors(bias), table, ids(n), dx, *noise(n), *options

        extra = ("bias softcap " if bias else "") + ("expected" if expected else "")
        return _launch("noisy_embedding_bwd", f"{head} {extra}", arguments)

    yield noisy(LLAMA, False, 0.0, False)
    yield noisy(SMOL, True, 30.0, True)
    yield noisy(ODD, False, 0.0, False)

    def divergence(
        head: Head, teacher: int, kind: int, caps: tuple[float, float] = (0.0, 0.0)
    ) -> list[Launch]:
        def tensors() -> tuple[Any, ...]:
            other = head._replace(hidden=teacher)
            mask = torch.empty(head.rows, dtype=torch.bool)
            return *head.tensors()[:2], *other.tensors()[:2], mask

        def bwd() -> tuple[Any, ...]:
            n = head.rows
            out = tuple(f32(n) for _ in range(7))
            return *tensors(), *out, 1.0, kind, *caps, [True, True]

        label = f"{head} {('forward_kl', 'reverse_kl', 'jsd')[kind]}{' softcap' * any(caps)}"
        return [
            _launch("linear_divergence_fwd", label, lambda: (*tensors(), 1.0, kind, *caps)),
            _launch("linear_divergence_bwd", label, bwd),
        ]

    yield from divergence(LLAMA, 8192, 0)
    yield from divergence(SMOL, 960, 1)
    yield from divergence(ODD, 770, 2)
    yield from divergence(SMOL, 960, 1, (30.0, 20.0))


def _continuous() -> Iterator[Launch]:
    def gaussian(n: int, width: int, dtype: torch.dtype) -> list[Launch]:
        def mean() -> Tensor:
            return torch.empty(n, width, dtype=dtype)

        label = f"[{n}, {width}] {SHORT[dtype]}"
        return [
            _launch("gaussian_action_fwd", label, lambda: (mean(), mean(), *noise(n))),
            _launch("gaussian_action_bwd", label, lambda: (mean(), f32(n), mean(), *noise(n))),
        ]

    yield from gaussian(4096, 64, F32)
    yield from gaussian(4096, 17, BF16)

    def recurrence(b: int, t: int, n: int, diagonal: bool, done: bool) -> list[Launch]:
        def jacobian() -> Tensor:
            return f32(b, t, n) if diagonal else f32(b, t, n, n)

        def ends() -> Tensor | None:
            return torch.empty(b, t, dtype=torch.bool) if done else None

        def states() -> Tensor:
            return f32(b, t + 1, n)

        def scan() -> tuple[Any, ...]:
            return jacobian(), f32(b, t, n), f32(b, n), ends(), 0.99

        def scan_bwd() -> tuple[Any, ...]:
            return jacobian(), states(), states(), ends(), 0.99, [True] * 3

        def rollout() -> tuple[Any, ...]:
            return jacobian(), f32(b, t, n), f32(b, t, n), f32(b, n), *noise(b * t)

        def rollout_bwd() -> tuple[Any, ...]:
            return jacobian(), f32(b, t, n), states(), states(), *noise(b * t), [True] * 4

        label = f"[{b}, {t}, {n}]{' diagonal' if diagonal else ''}{' done' if done else ''}"
        made = [("costate_scan_fwd", scan), ("costate_scan_bwd", scan_bwd)]
        if not done:
            made += [("linear_rollout_fwd", rollout), ("linear_rollout_bwd", rollout_bwd)]
        return [_launch(operator, label, arguments) for operator, arguments in made]

    yield from recurrence(64, 256, 16, False, True)
    yield from recurrence(64, 256, 64, False, False)
    yield from recurrence(16, 256, 200, False, False)
    yield from recurrence(64, 256, 4096, True, True)
    yield from recurrence(7, 33, 5, True, False)
