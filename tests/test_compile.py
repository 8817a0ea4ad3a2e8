"""torch.compile, opcheck, autocast and torch.func over every op, by its cases."""

import subprocess
import sys

import conftest
import pytest
import torch
import torch._dynamo.testing
from oracle import by_rows, few_rows, inputs, outputs, run, upstream
from torch.utils._python_dispatch import TorchDispatchMode

import vgkern
from vgkern import cases
from vgkern.ops import _library

# One case per path of an op: plain, every option at once, sequence-level, truncated.
CASES = ("token_logprobs-v31-3d", "linear_token_logprobs-h123-v1035-all",
         "group_advantages-grpo-ragged", "group_advantages-rloo", "policy_loss-full",
         "policy_loss-gspo", "linear_policy_loss-full-bias", "linear_policy_loss-gspo",
         "linear_sample-h123-v1035-3d", "linear_sample-all-cuts", "linear_sample-cuts-of-each-row",
         "linear_token_logprobs-cuts-of-each-row", "gaussian_action-n7-3d",
         "costate_scan-n33-done", "costate_scan-diagonal-n33-done", "linear_rollout-n4-shared",
         "linear_rollout-diagonal-n33", "noisy_embedding-h123-v1035-all",
         "linear_divergence-h123-v1035-jsd", "linear_divergence-softcaps-reverse",
         "linear_token_logprobs-all-cuts",
         "linear_policy_loss-costate-full", "linear_policy_loss-costate-gspo",
         "linear_policy_loss-costate-expected", "linear_token_logprobs-costate-all")  # fmt: skip


def function(case, backend):
    op = getattr(vgkern, case.op)
    return lambda **k: outputs(op(**k, backend=backend), "out")


def test_every_op_is_here():
    assert {cases.by_name(n).op for n in CASES} == {c.op for c in cases.CASES}


@pytest.mark.parametrize("name", CASES)
def test_fullgraph(name, backend):
    """One graph, forward and backward, with the values and gradients of eager mode."""
    case = cases.by_name(name)
    x = inputs(case, torch.float32, backend)
    plain = function(case, backend)
    up = upstream(case, plain(**x))
    want, dwant = run(plain, x, case.grads, up)
    torch.compiler.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    got, dgot = run(compiled, x, case.grads, up)
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=1e-6, atol=1e-6)
    for k in dwant:
        torch.testing.assert_close(dgot[k], dwant[k], rtol=1e-5, atol=1e-6)


FIRST = """
import torch, vgkern
def logp(z, y):
    return vgkern.token_logprobs(z, y).logp
f = torch.compile(logp, fullgraph=True, backend="aot_eager")
print(f(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)))
"""


def test_the_first_call_may_be_a_compiled_one():
    """The kernels are found and loaded while the compiler traces."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert done.returncode == 0 and "-1.386" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("name", CASES)
def test_dynamic_shapes(name, backend):
    """Another number of rows neither breaks the graph nor recompiles it."""
    case = cases.by_name(name)
    plain = function(case, backend)
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(plain, fullgraph=True, backend=graphs, dynamic=True)
    with torch.no_grad():
        for n in (2, 3) if few_rows(case, backend) else (2, 3, 5):
            x = case.make(torch.float32, 0)
            if few_rows(case, backend):  # that many rows, elsewhere that many times all rows
                x = by_rows(x, lambda t: t[:n])  # noqa: B023
            else:
                x = by_rows(x, lambda t: torch.cat([t] * n))  # noqa: B023
            got, want = compiled(**x), plain(**x)
            for k in want:
                torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 1, "recompiled for another number of rows"


class Record(TorchDispatchMode):
    """The calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in _library.NAMESPACES.values():
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


SEEN: set = set()


FUSED = [b for b in conftest.BACKENDS if b != "torch"]  # the reference has no operators


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(("name", "dtype"), [
    (n, d) for n in CASES for d in (torch.float32, torch.bfloat16) if d in cases.by_name(n).dtypes
])  # fmt: skip
def test_opcheck(name, dtype, fused):
    conftest.skip_unless_runs(fused)
    if (name.partition("-")[0], fused) in conftest.LACKS:
        pytest.skip(f"no kernels for {fused}")
    case, backend = cases.by_name(name), fused
    x = inputs(case, dtype, backend)
    plain = function(case, backend)
    up = upstream(case, plain(**x))
    with Record() as record:
        run(plain, x, case.grads, up)
    assert record.calls
    for func, args in record.calls:
        SEEN.add(func.name())
        given = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(func, given, raise_exception=True)


def test_opcheck_saw_every_operator():
    """Runs after the tests above; alone it has nothing to look at."""
    if not SEEN:
        pytest.skip("test_opcheck did not run")
    for backend in FUSED:
        seen = {
            n.partition("::")[2] for n in SEEN if n.startswith(_library.NAMESPACES[backend] + ":")
        }
        lacking = {n for n in _library.names() for o, b in conftest.LACKS
                   if b == backend and n.startswith(o)}  # fmt: skip
        assert not seen or not set(_library.names()) - seen - lacking, backend
