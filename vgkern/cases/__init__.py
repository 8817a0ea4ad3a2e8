"""Per op: realistic inputs by name, and a byte/flop model. One source for tests and benchmarks.

Inputs are what training makes: targets sampled from the model's own softmax; old, reference and
sampler log-probs near the policy with some rows beyond the clip; 0/1 rewards with zero-variance
groups; left or right padding with one fully masked sequence and garbage where it is masked.

Tolerance, for every value and every gradient, with truth = the same maths in fp64 from the same
(already rounded) inputs and eager = plain PyTorch in the dtype of the inputs:

    error(backend) <= 2 error(eager) + FLOOR[dtype of the tensor] * scale

once for the norm of the tensor, and once, with four floors, for the worst row, relative to the
norm of that row (rows below a hundredth of the largest count as that; a logit of 16 is rounded by
1e-6, and its probability moves by as much). `tests/test_parity.py` holds it.
"""

from vgkern.cases import continuous, embedding, logprobs, policy, sample
from vgkern.cases._case import FLOOR, Case

_FAMILIES = (logprobs, policy, sample, continuous, embedding)

# V off any block size, H odd, one row, zero rows, 3-D rows, each option alone, then together.
CASES: tuple[Case, ...] = tuple(c for family in _FAMILIES for c in family.CASES)

# The sizes that are timed: a small trained model, SmolLM2-135M, and one long batch for memory.
BENCH: tuple[Case, ...] = tuple(c for family in _FAMILIES for c in family.BENCH)

__all__ = ["BENCH", "CASES", "FLOOR", "Case", "by_name"]


def by_name(name: str) -> Case:
    """The case whose `op-name` is `name`. Raises KeyError that lists the close ones."""
    for case in (*CASES, *BENCH):
        if str(case) == name:
            return case
    close = [str(c) for c in CASES if c.op in name]
    raise KeyError(f"no case {name!r}; known: {', '.join(close) or [str(c) for c in CASES]}")
