"""TRITON_INTERPRET=1 as a user sets it: the package alone, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vgkern import cases

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
# Values and gradients of a small case of each op against the torch backend. No module of the tests
# may be there.
SCRIPT = """
import sys
import torch, vgkern
from vgkern import cases

assert not {"interpreter", "conftest", "pytest"} & set(sys.modules)
torch.manual_seed(0)

def run(case, inputs, backend):
    inputs = {k: v.detach().requires_grad_(k in case.grads) if isinstance(v, torch.Tensor)
              and v.is_floating_point() else v for k, v in inputs.items()}
    out = getattr(vgkern, case.op)(**inputs, backend=backend)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
    asked = [inputs[k] for k in case.grads if inputs.get(k) is not None]
    if not asked:
        return out
    total = sum(x.double().nan_to_num().sum() for x in out if x.requires_grad)
    return [*out, *torch.autograd.grad(total, asked, allow_unused=True)]

for name in sys.argv[2:]:
    case = cases.by_name(name)
    dtype = getattr(torch, sys.argv[1])
    got, said = (run(case, case.make(dtype, 0), b) for b in ("triton", "torch"))
    for a, b in zip(got, said, strict=True):
        if b is None:
            assert a is None
            continue
        eps = 2e-5 if dtype == torch.float32 else 2e-2
        assert a.isfinite().equal(b.isfinite()), name
        gap = (a.double() - b.double()).nan_to_num().norm()
        assert gap <= eps * b.double().nan_to_num().norm() + eps, (name, float(gap))
"""
OWN_KERNEL = """
import torch, triton
import triton.language as tl
import vgkern
from triton.runtime import interpreter
from triton.language.extra import libdevice

before = {k: v for x in (interpreter.InterpreterBuilder, libdevice) for k, v in vars(x).items()}
vgkern.token_logprobs(torch.randn(2, 9), torch.tensor([1, 2]), backend="triton")
after = {k: v for x in (interpreter.InterpreterBuilder, libdevice) for k, v in vars(x).items()}
assert before == after, "what other kernels of the process see has changed"
"""
CASES = ("token_logprobs-v31-3d", "linear_token_logprobs-h7-v31-3d", "linear_token_logprobs-top-p",
         "group_advantages-grpo", "policy_loss-full", "linear_policy_loss-grpo-h7-v31",
         "linear_sample-h7-v31", "gaussian_action-n7-3d", "costate_scan-n4",
         "linear_rollout-n4-shared", "noisy_embedding-h7-v31-3d",
         "linear_divergence-h7-v31-3d")  # fmt: skip


def alone(script: str, *arguments: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_op_is_right(dtype):
    assert {cases.by_name(name).op for name in CASES} == {c.op for c in cases.CASES}
    alone(SCRIPT, dtype, *CASES)


def test_other_kernels_see_the_interpreter_as_it_is():
    alone(OWN_KERNEL)


def test_every_function_of_libdevice_that_a_kernel_calls_is_there():
    text = "".join(p.read_text() for p in (ROOT / "kernels").glob("*.py"))
    called = set(re.findall(r"libdevice\.(\w+)", text))
    shipped = (ROOT / "vgkern/ops/_interpreter.py").read_text()
    assert called and {x for x in called if f'"{x}"' not in shipped} == set()
