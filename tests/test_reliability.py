"""The failure modes R1 to R26 of fused ops, one test each, by id, on every backend that runs here.

R15 and R12 over every op are in test_autograd.py, R21 in test_compile.py; R24 and R25 in
test_native.py too, where the builds are.
"""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch

import vgkern
from vgkern import case_inputs
from vgkern.ops import _check, _compile

ROOT = Path(__file__).resolve().parent.parent
FUSED = [b for b in conftest.BACKENDS if b != "torch"]
# The products of the cpu backend are its own (csrc/isa_gemm.cpp) with AVX-512, else the vendor's.
OWN_PRODUCT = {_compile.cpu_isa(), os.environ.get("VGKERN_ISA", "v4")} == {"v4"}


def logits(n=5, v=33, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (2.5 * torch.randn(n, v, generator=g)).to(dtype), torch.randint(v, (n,), generator=g)


def head(shape=(6,), h=16, v=200, dtype=torch.float32, seed=0):
    x, logp, _ = case_inputs.head(shape, h, v, dtype, seed)
    return x["hidden"], x["weight"], x["targets"], logp


@pytest.fixture
def unseen(monkeypatch):
    """As on a GPU: no check reads a value."""
    monkeypatch.setattr(_check, "can_look", lambda device: False)


def test_r01_offsets_beyond_two_to_the_31(backend):
    """Rows whose offset does not fit 32 bits; the memory between them is never touched."""
    stride, v = 2**30 + 64, 33
    z, y = logits(3, v, dtype=torch.float16)
    far = torch.from_numpy(np.zeros(2 * stride + v, np.float16)).as_strided((3, v), (stride, 1))
    far.copy_(z)
    assert far.storage_offset() + 2 * far.stride(0) > 2**31
    for a, b in zip(vgkern.token_logprobs(far, y, backend=backend),
                    vgkern.token_logprobs(z, y, backend=backend), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    w = torch.randn(11, v, generator=torch.Generator().manual_seed(1)).half()
    y = y % 11
    got = vgkern.linear_token_logprobs(far, w, y, backend=backend).logp
    assert torch.equal(got, vgkern.linear_token_logprobs(z, w, y, backend=backend).logp)


def test_r01_program_ids_are_widened_before_they_are_multiplied():
    """Every Triton program id and CUDA block index becomes 64 bits where it is read."""
    seen = 0
    for path in (ROOT / "kernels").glob("*.py"):
        for line in path.read_text().splitlines():
            if "tl.program_id(" in line:
                seen += 1
                assert re.search(r"tl\.program_id\(\d\)\.to\(tl\.int64\)", line), (path.name, line)
    for path in (ROOT / "csrc").glob("*.cu*"):
        for line in path.read_text().splitlines():
            if "blockIdx" in line and not line.strip().startswith("//"):
                seen += 1
                assert re.search(r"int64_t|\b1u?ll\b", line), (path.name, line)
    assert seen > 10


@pytest.mark.gpu
def test_r01_two_billion_logits_on_a_gpu():
    z = torch.randn(16_896, 128_256, device="cuda", dtype=torch.bfloat16)
    y = torch.randint(128_256, (16_896,), device="cuda")
    last = vgkern.token_logprobs(z[-1:], y[-1:], backend="triton").logp
    assert torch.equal(vgkern.token_logprobs(z, y, backend="triton").logp[-1:], last)


def test_r02_a_narrow_slice_of_a_wide_parent(backend):
    z, y = logits(8, 33)
    parent = torch.full((2, 4, 1000), torch.nan)
    parent[..., 500:533] = z.view(2, 4, 33)
    got = vgkern.token_logprobs(parent[..., 500:533], y.view(2, 4), backend=backend).logp
    assert torch.equal(got.flatten(), vgkern.token_logprobs(z, y, backend=backend).logp)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_r03_a_bad_row_stays_alone(bad, backend, unseen):
    z, y = logits(5, 200)
    want = vgkern.token_logprobs(z, y, backend=backend)
    z[2, 7] = bad
    got = vgkern.token_logprobs(z, y, backend=backend)
    keep = torch.tensor([0, 1, 3, 4])
    assert torch.equal(got.logp[keep], want.logp[keep])
    assert torch.equal(got.entropy[keep], want.entropy[keep])
    assert got.logp[2].isnan() or bad == torch.inf


def test_r03_the_sampler_names_the_row(backend):
    h, w, _, _ = head()
    h[4] = torch.nan
    noise = vgkern.Noise(0, torch.arange(6), torch.tensor(0))
    with pytest.raises(vgkern.NonFiniteError, match=r"hidden.*row \[4\]"):
        vgkern.linear_sample(h, w, noise, backend=backend)


def test_r04_blocked_vocabulary(backend):
    z, y = logits(6, 200)
    block = torch.rand(6, 200, generator=torch.Generator().manual_seed(3)) < 0.5
    block.scatter_(1, y[:, None], False)
    z.masked_fill_(block, -torch.inf).requires_grad_()
    out = vgkern.token_logprobs(z, y, backend=backend)
    assert out.logp.isfinite().all() and out.entropy.isfinite().all()
    (out.logp.sum() + out.entropy.sum()).backward()
    assert z.grad.isfinite().all() and (z.grad[block] == 0).all()


def test_r05_a_fully_blocked_row(backend):
    z, y = logits(3, 33)
    z[1] = -torch.inf
    z.requires_grad_()
    out = vgkern.token_logprobs(z, y, backend=backend)
    out.logp[[0, 2]].sum().backward(retain_graph=True)
    assert out.logp[1] == -torch.inf and (z.grad[1] == 0).all() and z.grad.isfinite().all()


def test_r06_everything_ignored(backend):
    h, w, y, _ = head((2, 3))
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_policy_loss(h, w, y, torch.ones(2), mask=torch.zeros(2, 3), backend=backend)
    out.loss.backward()
    assert out.loss == 0 and out.metrics["tokens"] == 0
    assert (h.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (1, 1, 7)])
def test_r07_empty_and_single(shape, backend):
    z = torch.zeros(shape, requires_grad=True)
    y = torch.zeros(shape[:-1], dtype=torch.int64)
    out = vgkern.token_logprobs(z, y, backend=backend)
    out.logp.sum().backward()
    assert out.logp.shape == y.shape and z.grad.shape == z.shape and z.grad.isfinite().all()


BAD_IDS = [33, 38, -1, torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, 2**31, 2**32]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_r08_a_target_out_of_range_is_told(bad, backend):
    z, y = logits(5, 33)
    y[3] = bad
    with pytest.raises(ValueError, match=re.escape(f"targets: got id {bad} at [3]")):
        vgkern.token_logprobs(z, y, backend=backend)


@pytest.mark.parametrize("bad", BAD_IDS)
def test_r08_where_no_value_is_read_it_is_nan_and_has_no_gradient(bad, backend, unseen):
    """Never out of bounds, never a plausible number; the other rows keep their bits."""
    h, w, y, _ = head((5,), 16, 33)
    want = vgkern.linear_token_logprobs(h, w, y, backend=backend).logp
    y[3] = bad
    h.requires_grad_()
    got = vgkern.linear_token_logprobs(h, w, y, backend=backend).logp
    keep = torch.tensor([0, 1, 2, 4])
    assert got[3].isnan()
    if backend != "cpu" or OWN_PRODUCT:
        assert torch.equal(got[keep], want[keep])
    torch.testing.assert_close(got[keep], want[keep])
    got[keep].sum().backward()
    assert (h.grad[3] == 0).all() and h.grad.isfinite().all()


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[:, :1].expand_as(x),
    "permuted": lambda x: x[None].permute(1, 0, 2).contiguous()[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_r09_layouts(layout, backend):
    h, w, y, _ = head()
    x = LAYOUTS[layout](h)
    plain, given = x.contiguous().requires_grad_(), x.detach().requires_grad_()
    both = [vgkern.linear_token_logprobs(i, w, y, backend=backend).logp for i in (plain, given)]
    grads = [torch.autograd.grad(o.sum(), i)[0] for o, i in zip(both, (plain, given), strict=True)]
    exact = backend != "torch"  # the reference leaves its products to the vendor
    for a, b in (both, grads):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_r10_inputs_keep_their_bytes(backend):
    h, w, y, logp = head((2, 3))
    before = [t.clone() for t in (h, w, y)]
    h.requires_grad_(), w.requires_grad_()
    versions = [t._version for t in (h, w, y)]
    loss = vgkern.linear_policy_loss(
        h, w, y, torch.tensor([1.0, -1.0]), old_logp=logp.float(), backend=backend
    ).loss
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    assert versions == [t._version for t in (h, w, y)]
    assert all(torch.equal(a.detach(), b) for a, b in zip((h, w, y), before, strict=True))


def test_r11_any_upstream_gradient(backend):
    h, w, y, _ = head()
    h.requires_grad_()
    g = torch.linspace(-2, 3, 6)
    logp = vgkern.linear_token_logprobs(h, w, y, backend=backend).logp
    (one,) = torch.autograd.grad(logp, h, g, retain_graph=True)
    rows = torch.stack([torch.autograd.grad(logp[i], h, retain_graph=True)[0] for i in range(6)])
    torch.testing.assert_close(one, (g[:, None, None] * rows).sum(0), rtol=1e-5, atol=1e-6)
    (none,) = torch.autograd.grad(logp.sum(), h, torch.tensor(0.0).expand(()))
    assert (none == 0).all()


def test_r13_tied_weights(backend):
    """Embedding and head are one tensor: its gradient is the sum of both uses."""
    _, w, y, _ = head()
    ids = torch.tensor([3, 1, 4, 1, 5, 9])

    def grads(tied):
        e = w.clone().requires_grad_()
        o = e if tied else w.clone().requires_grad_()
        vgkern.linear_token_logprobs(e[ids], o, y, backend=backend).logp.sum().backward()
        return e.grad if tied else e.grad + o.grad

    torch.testing.assert_close(grads(True), grads(False), rtol=1e-6, atol=1e-7)


PAIRS = [(a, b) for a in _check.FLOATS for b in _check.FLOATS if a != b]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_r14_mixed_dtypes_are_refused_by_name(one, two):
    h, w, y, _ = head()
    with pytest.raises(TypeError, match=r"weight: .*as hidden"):
        vgkern.linear_token_logprobs(h.to(one), w.to(two), y)


@pytest.mark.parametrize("v", [1, 2, 3, 31, 33, 1000, 32000, 50257])
@pytest.mark.parametrize("h", [1, 7, 123])
def test_r16_sizes(v, h, backend):
    if backend not in ("torch", "cpu") and v > 1000:
        pytest.skip("emulated element by element: the large sizes take minutes")
    x, w, y, want = head((3,), h, v)
    got = vgkern.linear_token_logprobs(x, w, y, backend=backend).logp
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r17_logits_of_thirty_thousand(dtype, backend):
    z, y = logits(6, 200)
    z = (z * 1e4).clamp(-3e4, 3e4).to(dtype)
    want = z.double().log_softmax(-1)
    got = vgkern.token_logprobs(z, y, backend=backend)
    torch.testing.assert_close(got.logp.double(), want.gather(1, y[:, None])[:, 0], rtol=1e-6,
                               atol=1e-6)  # fmt: skip
    torch.testing.assert_close(got.entropy.double(), -(want.exp() * want).sum(-1), rtol=1e-5,
                               atol=1e-6)  # fmt: skip


def gradient(h, w, y, backend):
    h = h.clone().requires_grad_()
    out = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    (out.logp.sum() + 0.1 * out.entropy.sum()).backward()
    return out.logp.detach(), out.entropy.detach(), h.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r18_bit_equal_on_repeat_and_for_any_number_of_threads(dtype, backend, threads):
    h, w, y, _ = head((40,), 64, 1000, dtype)
    threads(1)
    want = gradient(h, w, y, backend)
    for count in (1, 2, 4):
        threads(count)
        for _ in range(3):
            for a, b in zip(gradient(h, w, y, backend), want, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r18_a_row_does_not_depend_on_its_batch(dtype):
    """Wherever the logits are our own product: the reference and the cuda backend leave theirs to
    the vendor, which promises no order, and so does cpu without AVX-512. On cpu dhidden too, for
    widths from 16 up."""
    if "cpu" in FUSED and not OWN_PRODUCT:
        pytest.skip("without AVX-512 the product of the cpu backend is the vendor's")
    h, w, y, _ = head((40,), 64, 1000, dtype)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for backend in set(FUSED) - {"cuda"}:
        conftest.skip_unless_runs(backend)
        want = gradient(h, w, y, backend)
        pieces = [gradient(h[order][a : a + n], w, y[order][a : a + n], backend)
                  for a, n in ((0, 1), (1, 6), (7, 33))]  # fmt: skip
        outs = 3 if backend == "cpu" else 2  # elsewhere dhidden is a product of torch's own
        for k in range(outs):
            assert torch.equal(torch.cat([p[k] for p in pieces]), want[k][order]), (backend, k)


def test_r18_a_row_of_logits_does_not_depend_on_its_batch(backend):
    z, y = logits(9, 1035)
    want = vgkern.token_logprobs(z, y, backend=backend)
    for i in range(9):
        got = vgkern.token_logprobs(z[i : i + 1], y[i : i + 1], backend=backend)
        assert torch.equal(got.logp, want.logp[i : i + 1])
        assert torch.equal(got.entropy, want.entropy[i : i + 1])


@pytest.mark.gpu
def test_r19_cuda_graph():
    h, w, y, _ = (t.cuda() for t in head((64,), 64, 1000))
    run = torch.cuda.graphs.make_graphed_callables
    f = run(lambda h: vgkern.linear_token_logprobs(h, w, y).logp, (h.clone().requires_grad_(),))
    other = torch.randn_like(h).requires_grad_()
    want = vgkern.linear_token_logprobs(other, w, y).logp
    assert torch.equal(f(other), want)


def test_r20_mixed_devices_are_refused():
    h, w, y, _ = head()
    with pytest.raises(ValueError, match="weight: got a tensor on meta"):
        vgkern.linear_token_logprobs(h, w.to("meta"), y)


def test_r22_the_sampler_is_unbiased_and_never_draws_the_impossible(backend):
    """Chi-square over 20,000 draws of 6 ids and one blocked id, at a fixed seed: p > 1e-3."""
    n = 20_000 if backend in ("torch", "cpu") else 500
    p = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04, 0.0])
    noise = vgkern.Noise(11, torch.arange(n), torch.tensor(3))
    out = vgkern.linear_sample(torch.ones(n, 1), p.log()[:, None], noise, backend=backend)
    counts = out.token.bincount(minlength=7).double()
    assert counts[6] == 0
    chi2 = ((counts - n * p).square() / (n * p))[:6].sum()
    assert chi2 < 20.5  # the 99.9 % point of 5 degrees of freedom
    torch.testing.assert_close(out.logp, p.log()[out.token], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4, torch.inf])
def test_r23_ratio_overflow(gap, backend):
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    out = vgkern.policy_loss(logp, torch.tensor([1.0, -1.0]), old_logp=logp.detach() - gap,
                             backend=backend)  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and logp.grad.isfinite().all()
    assert out.metrics["clamped"] > 0


def _in_child(queue):
    h, w, y, _ = head()
    queue.put(float(vgkern.linear_token_logprobs(h, w, y).logp.sum()))


def test_r24_use_after_fork():
    h, w, y, _ = head()
    want = float(vgkern.linear_token_logprobs(h, w, y).logp.sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == pytest.approx(want)
    child.join(10)
    assert child.exitcode == 0


PEAK = """
import torch, vgkern
from pathlib import Path
def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
def run(n, h, v):
    x, w = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    y, a = torch.randint(v, (n,)), torch.randn(n)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss = vgkern.linear_policy_loss(x, w, y, a, objective="dapo", backend="cpu").loss
    loss.backward()
    return resident("VmHWM") - before
run(8, 16, 64)
print(run(4096, 64, 30000))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_r26_peak_memory_is_what_is_promised():
    """A block of at most 150 MiB of logits, the gradients, and 40 MiB; [N, V] would be 469 MiB."""
    if conftest.INTERPRETED:
        pytest.skip("the cpu backend is another run's")
    conftest.skip_unless_runs("cpu")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    gradients = 2 * 4 * (4096 + 30000) * 64 / 2**20
    assert float(done.stdout.split()[-1]) < 150 + gradients + 40
