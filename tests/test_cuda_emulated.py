"""The cuda backend on the host: what test_parity.py does not see of it. See tests/emulation."""

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from emulation import build as emulation

import vgkern
from vgkern import cases
from vgkern.ops import _compile, _cuda
from vgkern.ops import linear_sample as sampling
from vgkern.ops._truncate import Cut
from vgkern.ops.noise import Noise

pytestmark = pytest.mark.skipif(conftest.INTERPRETED, reason="runs beside Triton's interpreter")
TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def emulated():
    conftest.skip_unless_runs("cuda")


# --- rows: what no public op reaches


def rows(n, v, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, v, generator=g)).to(dtype)
    return logits, torch.randint(0, v, (n,), generator=g), g


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize(
    ("v", "softcap", "dtype", "out"),  # one column, odd, off the block, 16-bit, in place
    [(1, 0.0, "float32", None), (31, 4.0, "float32", None), (1000, 0.0, "float32", "bfloat16"),
     (130, 0.0, "bfloat16", None), (36, 0.0, "float32", "in place")],
)  # fmt: skip
def test_row_grad_has_all_three_terms(v, softcap, dtype, out, expected):
    logits, y, g = rows(5, v, dtype=getattr(torch, dtype))
    c, e = (torch.randn(5, generator=g) for _ in range(2))
    u = torch.randn(5, v, generator=g)
    c[1] = e[1] = 0
    y[2] = -100
    noise = Noise(2**63 + 7, torch.arange(5) + 2**40, torch.full((5,), 2**31 + 3))
    tau, temperature = 1.0 if expected else 0.7, 1.3
    x = logits.double().requires_grad_()
    z = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
    lp = z.log_softmax(-1)
    at = lp.gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    total = ((y != -100) * (c * at - e * (lp.exp() * lp).sum(-1))).sum()
    shift = 0 if expected else noise.gumbel(v, torch.float64)
    q = ((z + shift) / tau).softmax(-1)
    (want,) = torch.autograd.grad(total + (q * u).sum(), x)
    stats = _cuda.row_stats(logits, None, y, temperature, softcap, -100)
    given = logits.clone()
    to = torch.empty(5, v, dtype=logits.dtype if out is None else getattr(torch, out, None))
    to = given if out == "in place" else to
    got = _cuda.row_grad(
        given, None, y, *stats, c, e, u, noise.seed - 2**64, noise.sequence, noise.position, tau,
        expected, temperature, softcap, -100, to
    )  # fmt: skip
    assert got is to
    loose = 1e-2 if got.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got.double(), want, rtol=loose, atol=loose)


def test_targets_elsewhere_and_out_of_range():
    logits, y, _ = rows(6, 37)
    y[1], y[2], y[3], y[4] = 37, 38, -1, -(2**40)
    before = logits.clone()
    logits[5], y[5] = torch.nan, -100
    logp, entropy, lse = _cuda.row_stats(logits, None, y, 1.0, 0.0, -100)
    want = before.double().logsumexp(-1)
    torch.testing.assert_close(lse[:2].double(), want[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logp[1], -lse[1])
    assert logp[2:5].isnan().all() and entropy[1] > 0 and logp[5] == 0 and lse[5] == 0
    one = torch.ones(6)
    out = torch.empty_like(logits)
    _cuda.row_grad(
        logits, None, y, logp, entropy, lse, one, 0 * one, None, 0, None, None, 1.0, False, 1.0,
        0.0, -100, out
    )  # fmt: skip
    assert (out[2:] == 0).all()
    torch.testing.assert_close(out[1], -before[1].softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("v", [1, 5, 64, 1000])
def test_row_sample_cuts_are_exact_with_ties(v, monkeypatch):
    """Few distinct logits, so that every cut falls among equals: the lowest ids stay."""
    g = torch.Generator().manual_seed(v)
    logits = torch.randint(-2, 3, (6, v), generator=g).float()
    logits[:, 0] = -torch.inf if v > 1 else 0.0
    logits[3] = -0.0
    noise = Noise(11, torch.arange(6), torch.full((6,), 4))
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.0])
    monkeypatch.setattr(sampling, "linear_logits_ref", lambda hidden, weight, bias: hidden)
    for k, p, m in [(3, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.999, 0.0), (7, 0.6, 0.0), (2, 0.9, 0.3),
                    (0, 1.0, 0.2), (v, 1e-9, 0.0), (1, 1.0, 1.0)]:  # fmt: skip
        cut = (min(k, v), p, m)
        token, logp, entropy = _cuda.row_sample(
            logits, None, 11, noise.sequence, noise.position, 0.0, Cut(1.0, *cut, temperature)
        )
        head = torch.empty(v, 1)
        want = sampling.linear_sample_ref(
            logits.double(), head, None, noise, temperature, 0.0, *cut
        )
        assert torch.equal(token, want.token), cut
        torch.testing.assert_close(logp.double(), want.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), want.entropy, rtol=1e-5, atol=1e-5)


# --- every kernel once: schedules, sanitizers

EVERY_KERNEL = (
    "token_logprobs-v1035-ignore", "linear_sample-h7-v31", "policy_loss-full",
    "policy_loss-gspo", "group_advantages-grpo-ragged", "gaussian_action-n33-one",
    "costate_scan-n33-done", "costate_scan-diagonal-n33-done", "linear_rollout-n33",
    "linear_policy_loss-grpo-h7-v31",
)  # fmt: skip


def outcome(name, dtype=torch.float32):
    """Outputs and gradients of a case on the cuda backend."""
    case = cases.by_name(name)
    x = case.make(dtype, 0)
    leaves = [k for k in case.grads if k in x]
    x |= {k: x[k].detach().requires_grad_() for k in leaves}
    out = getattr(vgkern, case.op)(**x, backend="cuda")
    tensors = [out] if isinstance(out, torch.Tensor) else [t for t in out if torch.is_tensor(t)]
    total = sum(t.float().sin().sum() for t in tensors if t.requires_grad)
    grads = torch.autograd.grad(total, [x[k] for k in leaves]) if leaves else ()
    return [t.detach() for t in (*tensors, *grads)]


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_no_schedule_changes_a_bit(name, monkeypatch):
    first = outcome(name)
    for schedule in ("rev", "1", "2"):
        monkeypatch.setenv("VG_SCHED", schedule)
        again = outcome(name)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), schedule


def test_no_schedule_changes_a_cut(monkeypatch):
    logits = torch.randn(2, 300).mul(2).round()
    at = torch.arange(2)
    seen = []
    for schedule in ("fwd", "rev", "1"):
        monkeypatch.setenv("VG_SCHED", schedule)
        seen.append(_cuda.row_sample(logits, None, 1, at, at, 0.0, Cut(1.0, 50, 0.8, 0.01)))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_rows_do_not_depend_on_their_batch():
    logits, y, _ = rows(9, 1035)
    whole = torch.stack(_cuda.row_stats(logits, None, y, 0.9, 0.0, -100), 1)
    for part in (slice(0, 1), slice(3, 7)):
        own = torch.stack(_cuda.row_stats(logits[part], None, y[part], 0.9, 0.0, -100), 1)
        assert torch.equal(own, whole[part])
    # The same values at an address that no vector load may take.
    shifted = torch.zeros(9, 1036)[:, 1:]
    shifted.copy_(logits)
    again = torch.stack(_cuda.row_stats(shifted, None, y, 0.9, 0.0, -100), 1)
    assert torch.equal(again, whole)


SANITIZED = """
import sys, time
import torch
sys.path.insert(0, {tests!r})
import oracle
from vgkern import cases
from vgkern.ops import _cuda
from vgkern.ops._truncate import Cut
for name in {names!r}:
    began = time.monotonic()
    oracle.check(cases.by_name(name), "cuda", torch.float32, "sliced")
    print(name, round(time.monotonic() - began, 1), flush=True)
for dtype in (torch.float32, torch.bfloat16, torch.float16):  # odd rows, and both kinds of loads
    wide = torch.randn(3, 43).round().to(dtype)
    for logits in (wide, wide[:, 1:41].contiguous()):
        v, at = logits.shape[1], torch.arange(3)
        cut = Cut(1.0, 5, 0.7, 0.1, torch.ones(3), at, torch.full((3,), 0.7), torch.ones(3) / 10)
        _cuda.row_sample(logits, None, 1, at, at, 2.0, cut)
        stats = _cuda.row_stats(logits, None, at, 1.0, 0.0, -100)
        _cuda.row_grad(logits, None, at, *stats, torch.ones(3), torch.ones(3), torch.randn(3, v),
                       1, at, at, 0.5, False, 1.0, 0.0, -100, torch.empty_like(logits))
print("clean")
"""
SMALL = ("token_logprobs-v31-3d", "linear_sample-h7-v31", "policy_loss-full", "policy_loss-gspo",
         "group_advantages-grpo-ragged", "gaussian_action-n7-3d", "costate_scan-n4",
         "costate_scan-n33-done", "costate_scan-diagonal-n33-done", "linear_rollout-n33",
         "linear_policy_loss-grpo-h7-v31")  # fmt: skip


def test_under_address_and_undefined_behaviour_sanitizers():
    library = emulation.build(sanitize=True)
    compiler = _compile.find_compiler().command
    asan = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer to preload")
    env = {
        **os.environ, "LD_PRELOAD": asan, "VGKERN_CUDA_LIBRARY": str(library), "VG_SCHED": "3",
        "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    code = SANITIZED.format(tests=str(TESTS), names=SMALL)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]


# --- the emulation itself: a bug that is planted is a bug that is seen

PLANTED = """
#include "device.cuh"
using namespace vgkern;
struct Cells { float of[64]; };
__global__ void kernel(float* out) {
  VG_SHARED(Cells, cells);
  const int i = threadIdx.x;
  BODY
}
int main() {
  float* out = static_cast<float*>(malloc(64 * sizeof(float)));
  VG_LAUNCH(kernel, 1, 64, 0, nullptr, out);
  for (int i = 0; i < 64; ++i) if (out[i] != 63 - i) return 1;
  return 0;
}
"""
GOOD = "cells.of[i] = i; __syncthreads(); out[i] = cells.of[63 - i];"
BUGS = {
    "none": (GOOD, ""),
    "missing barrier": ("cells.of[i] = i; out[i] = cells.of[63 - i];", "wrong"),
    "divergent barrier": (GOOD.replace("__syncthreads()", "if (i != 7) __syncthreads()")
                          + " while (i == 7) __syncwarp();", "deadlock"),
    "half of a warp": (GOOD + " if (i < 16) out[i] += 0 * __shfl_xor_sync(~0u, out[i], 1);",
                       "deadlock|has left"),
    "write past the end": (GOOD + " out[i + 1] = 62 - i;", "AddressSanitizer"),
    "shared past the end": (GOOD.replace("of[i] = i", "of[i + 1] = i", 1), "Sanitizer|bounds"),
    "misaligned vector": (GOOD + " if (i == 0) *reinterpret_cast<float4*>(out + 1) = "
                          "*reinterpret_cast<float4*>(out + 1);", "misaligned"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug, tmp_path):
    body, sign = BUGS[bug]
    source, program = tmp_path / "planted.cu", tmp_path / "planted"
    source.write_text(PLANTED.replace("BODY", body))
    command = emulation.compile_command(
        source, tmp_path / "planted.o", f"-I{_compile.SOURCES}", "-O1", *emulation.SANITIZE
    )
    subprocess.run(command, check=True)
    link = [*_compile.find_compiler().command, *emulation.SANITIZE, str(tmp_path / "planted.o")]
    subprocess.run([*link, "-o", str(program)], check=True)
    seen = ""
    for schedule in ("fwd", "rev", "1"):
        env = {**os.environ, "VG_SCHED": schedule, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([program], env=env, capture_output=True, text=True, timeout=60)
        seen += done.stderr + ("wrong" if done.returncode == 1 and not done.stderr else "")
    if sign:
        assert any(s in seen for s in sign.split("|")), seen[-2000:]
    else:
        assert not seen
