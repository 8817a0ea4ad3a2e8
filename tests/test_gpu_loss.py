"""The loss path of the GPU backends: both forms, chunks, rows that are left out, memory errors."""

import types

import conftest
import pytest
import torch
from oracle import check

import vgkern
from vgkern import cases
from vgkern.kernels import linear, linear_policy_loss, live, memory
from vgkern.ops import _check

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GPU = [b for b in conftest.BACKENDS if b in conftest.EMULATED]
# each option of the row kernels, odd sizes, blocked ids, a costate
CASES = ["grpo-h7-v31", "dr_grpo-h123-v1035", "dapo-packed", "reinforce-softcap", "full-bias",
         "blocked", "peaked", "sampler-token", "costate-full", "zero-rows"]  # fmt: skip


FORMS = [(b, f) for b in GPU for f in ("materialised", "recomputed")[: 1 + (b == "triton")]]


@pytest.fixture(params=GPU)
def gpu(request):
    conftest.skip_unless_runs(request.param)
    return request.param


@pytest.fixture(params=FORMS, ids=lambda x: "-".join(x))
def gpu_form(request, monkeypatch):
    """(backend, form): the cuda backend has one of them."""
    backend, form = request.param
    conftest.skip_unless_runs(backend)
    pays = form == "recomputed"
    monkeypatch.setattr(linear_policy_loss, "recompute_pays", lambda width, size: pays)
    return backend, form


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_both_forms_and_many_chunks(name, dtype, gpu_form, monkeypatch):
    """16-bit gradients over their own fp32 rows, the head's gradient summed by its products."""
    case = cases.by_name(f"linear_policy_loss-{name}")
    monkeypatch.setattr(memory, "CHUNK_BYTES", 4 * 1035 * 7)
    kept = len(conftest.RATIOS)
    check(case, gpu_form[0], dtype)
    del conftest.RATIOS[kept:]


def batch(dtype=F32, rows=(6, 7), width=32, vocab=203):
    """Hidden, head, targets, mask, advantages: a third masked, one sample without an advantage."""
    g = torch.Generator().manual_seed(3)
    h = torch.randn(*rows, width, generator=g).to(dtype)
    w = (torch.randn(vocab, width, generator=g) / width**0.5).to(dtype)
    y = torch.randint(vocab, rows, generator=g)
    mask = torch.rand(rows, generator=g) > 0.33
    a = torch.randn(rows[0], generator=g)
    a[2] = 0
    return h, w, y, mask, a


def losses(given, gpu, **options):
    h, w, y, mask, a = given
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    old = torch.full(y.shape, -5.0)  # some ratios leave the clip range
    out = vgkern.linear_policy_loss(
        h, w, y, a, mask=mask, old_logp=old, objective="dapo", backend=gpu, **options
    )
    (2 * out.loss).backward()
    return [out.loss.detach(), h.grad, w.grad, *out.metrics.values()]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_rows_left_out_change_nothing(dtype, gpu_form, monkeypatch):
    """Masked, without an advantage, clipped: what they hold does not matter."""
    gpu, form = gpu_form
    given = batch(dtype)
    wanted = losses(given, gpu)
    h, w, y, mask, a = given
    h, y = h.masked_fill(~mask[..., None], torch.nan), y.masked_fill(~mask, -7)
    monkeypatch.setattr(live, "LOOK_PAYS", 0)
    looked = []
    which = live.which
    monkeypatch.setattr(live, "which", lambda x: (looked.append(int(x.sum())), which(x))[1])
    got = losses((h, w, y, mask, a), gpu)
    assert looked and looked[0] == int((mask & (a != 0)[:, None]).sum()) < mask.numel()
    if form == "recomputed" and dtype != F32:
        assert looked[1] < looked[0]  # clipped rows
    tolerance = {F32: 1e-6, BF16: 1e-2, F16: 2e-3}[dtype]
    for x, reference in zip(got, wanted, strict=True):
        assert float((x - reference).float().norm()) <= tolerance * float(reference.float().norm())
    assert not got[1][~mask].any()


def test_nothing_left(gpu_form, monkeypatch):
    gpu = gpu_form[0]
    monkeypatch.setattr(live, "LOOK_PAYS", 0)
    h, w, y, mask, a = batch(BF16)
    for dead in (torch.zeros_like(mask), mask):
        loss, dh, dw, *_ = losses((h, w, y, dead, a if dead is not mask else a * 0), gpu)
        assert float(loss) == 0 and not dh.any() and not dw.any()


def test_no_look_where_waiting_is_forbidden(monkeypatch):
    monkeypatch.setattr(live, "LOOK_PAYS", 0)
    device = types.SimpleNamespace(type="cuda")
    hidden = types.SimpleNamespace(is_cuda=True, device=device, shape=(9, 9))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    assert live.looks(hidden, 9)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 2)
    assert not live.looks(hidden, 9)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not live.looks(hidden, 9)


@pytest.mark.parametrize("stray", [-100, -1, 203, 2**40])
@pytest.mark.parametrize("costate", [False, True])
def test_target_that_is_no_id(stray, costate, gpu_form, monkeypatch):
    """Where nobody can look, a live row whose target is no id makes the loss NaN, no other row."""
    monkeypatch.setattr(_check, "can_look", lambda device: False)
    gpu, options = gpu_form[0], {}
    h, w, y, mask, a = batch(BF16)
    if costate:
        lam = torch.zeros(*y.shape, w.shape[1], dtype=BF16)
        lam[0, 0] = 1
        options["costate"] = vgkern.Costate(lam, w)
    assert losses((h, w, y, mask, a), gpu, **options)[0].isfinite()
    mask[1, 2] = True
    y[1, 2] = stray
    loss, dh, *_ = losses((h, w, y, mask, a), gpu, **options)
    assert loss.isnan()
    assert dh[0].isfinite().all() and dh[3:].isfinite().all()


@pytest.mark.parametrize("op", ["linear_policy_loss", "linear_logprobs", "noisy_embedding"])
def test_out_of_memory_says_what_fits(op, gpu, monkeypatch):
    h, w, y, mask, a = batch()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if op == "linear_policy_loss":
        monkeypatch.setattr(linear, "mm32", full)
    monkeypatch.setattr(linear.Grads, "products", full)
    with pytest.raises(torch.OutOfMemoryError, match=f"{op}.*42 rows of hidden") as e:
        if op == "linear_policy_loss":
            losses((h, w, y, mask, a), gpu)
        elif op == "linear_logprobs":
            lp = vgkern.linear_token_logprobs(h.requires_grad_(), w, y, backend=gpu)
            lp.logp.sum().backward()
        else:
            x = vgkern.noisy_embedding(
                h.requires_grad_(), w, w, y, relaxation="expected", backend=gpu
            )
            x.sum().backward()
    assert "CUDA out of memory" in str(e.value) and "[203, 32]" in str(e.value)


def test_rows_that_fit(monkeypatch):
    """A head's gradient may not fit whatever the rows; else their number is in the message."""
    hidden = types.SimpleNamespace(
        shape=(4096, 64), is_cuda=True, device="cuda", element_size=lambda: 2
    )
    weight = types.SimpleNamespace(shape=(1000, 64))

    def message(free, needs):
        monkeypatch.setattr(memory, "free", lambda device: free)
        return memory.what_fits("op", hidden, weight, needs)

    fixed, each = memory.needed(64, 1000, 2, [True, True, False])
    assert fixed == 4 * 64 * 1000 and each == 4 * 64 + 2 * 64 + 32
    block = 4 * 128 * 1000
    assert "About 1000 rows fit" in message(fixed + block + 1000 * each, [True, True, False])
    assert "freeze it" in message(block, [True, True, False])
    assert "Free memory first" in message(1 << 40, [True, False, False])


def test_chunks_by_the_device(monkeypatch):
    """Few, of equal lengths, whole tiles; by the device's memory, not by what is free, until that
    is short: the order of the sums must not depend on it."""
    gpu = types.SimpleNamespace(type="cuda")
    free = 60 << 30
    monkeypatch.setattr(memory, "total", lambda device: 85_000_000_000)
    monkeypatch.setattr(memory, "free", lambda device: free)
    monkeypatch.setattr(memory, "capturing", lambda device: False)

    def sizes(*args):
        return [s.stop - s.start for s in memory.chunks(*args)]

    assert sizes(8192, 131072, gpu) == [4096, 4096]
    assert sizes(8192, 49152, gpu) == [8192]
    assert sizes(8192, 131072, gpu, 2) == [8192]
    assert sizes(9000, 131072, gpu) == [3072, 3072, 2856]
    assert sizes(1024, 512, gpu) == [1024]
    assert sizes(0, 512, gpu) == []
    assert sizes(3, 1 << 40, gpu) == [1, 1, 1]
    free = 5 << 30
    assert sizes(8192, 131072, gpu) == [4096, 4096]
    free = 3 << 30
    assert sizes(8192, 131072, gpu) == [2048] * 4
    assert sizes(8192, 131072, torch.device("cpu")) == [512] * 16
    monkeypatch.setattr(memory, "capturing", lambda device: True)
    assert sizes(8192, 131072, gpu) == [4096, 4096]


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_divergence", "noisy_embedding"])
def test_other_ops_leave_rows_out(op, gpu, monkeypatch):
    """The same values and gradients, whatever the rows without a gradient hold."""
    if (op, gpu) in conftest.LACKS:
        pytest.skip(f"{op} has no kernels for {gpu}")
    h, w, y, mask, _ = batch()

    def run(h, y):
        h, head = h.detach().requires_grad_(), w.detach().requires_grad_()
        if op == "linear_token_logprobs":
            out = vgkern.linear_token_logprobs(h, head, y.where(mask, -100), backend=gpu)
        elif op == "linear_divergence":
            out = vgkern.linear_divergence(h, head, h.detach() + 1, w, mask=mask, backend=gpu)
        else:
            x = vgkern.noisy_embedding(h, head, w, y, relaxation="expected", backend=gpu)
            (x * mask[..., None]).sum().backward()
            return [x.detach(), h.grad, head.grad]
        (out[0] + 2 * out[1]).where(mask, 0).sum().backward()
        return [*(x.detach() for x in out), h.grad, head.grad]

    wanted = run(h, y)
    monkeypatch.setattr(live, "LOOK_PAYS", 0)
    looked = []
    which = live.which
    monkeypatch.setattr(live, "which", lambda x: (looked.append(int(x.sum())), which(x))[1])
    if op != "noisy_embedding":  # whose rows are all looked at on a CPU
        h = h.masked_fill(~mask[..., None], torch.nan)
    got = run(h, y)
    assert looked and max(looked) == int(mask.sum())
    for x, reference in zip(got, wanted, strict=True):
        assert float((x - reference).norm()) <= 1e-6 * float(reference.norm())


def test_tf32_has_one_kind_of_logits(gpu, monkeypatch):
    """Under "high" the fused forward would not have the logits of backward and of the sampler."""
    h, w, y, *_ = batch()
    made = []
    mm32 = linear.mm32
    monkeypatch.setattr(linear, "mm32", lambda *a: (made.append(1), mm32(*a))[1])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        plain = vgkern.linear_token_logprobs(h, w, y, backend=gpu)
        assert len(made) == (gpu == "cuda")
        torch.set_float32_matmul_precision("high")
        made.clear()
        out = vgkern.linear_token_logprobs(h, w, y, backend=gpu)
        assert made
        vgkern.linear_token_logprobs(h.bfloat16(), w.bfloat16(), y, backend=gpu)
        assert len(made) == 1 + (gpu == "cuda")  # 16 bits are as they were
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(out, plain, rtol=1e-3, atol=1e-3)
