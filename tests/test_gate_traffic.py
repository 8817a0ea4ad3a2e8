"""No op moves more than 1.15 of what it must, takes more launches than it may, or waits: counted on
tensors without data, for both GPU backends (vgkern/gate/traffic)."""

import conftest
import pytest
import torch

import vgkern
from vgkern.gate import coverage
from vgkern.gate.traffic import calls, count, cuda, known, minimum, predict, report, triton
from vgkern.gate.traffic.count import tensor
from vgkern.gate.traffic.moved import Moved
from vgkern.kernels import linear, linear_policy_loss, memory

if conftest.INTERPRETED:
    pytest.skip("an interpreted kernel is no launch", allow_module_level=True)

LARGE = "linear_policy_loss full 8192x4096x131072"
SMOL = "linear_policy_loss full 8192x576x49152"
TINY = "linear_policy_loss full 1024x256x512"
CALLS = calls.calls()
EACH = [(x, backend) for x in CALLS for backend in x.backends]


@pytest.fixture(scope="module")
def rows():
    return {(x.call.name, x.backend): x for x in report.lines()}


@pytest.mark.parametrize("call, backend", EACH, ids=lambda x: getattr(x, "name", x))
def test_call(call, backend, rows):
    assert rows[call.name, backend].faults() == []


def test_predictions(rows):
    """42 ms and 3.0 ms, and 20 launches where there is little to do."""
    for name, bar in minimum.MILLISECONDS.items():
        assert 1e3 * rows[name, "triton"].time.total <= bar
    assert minimum.MILLISECONDS == {LARGE: 42.0, SMOL: 3.0}
    assert rows[TINY, "triton"].minimum.launches == 20


def test_the_page_is_what_the_code_does(rows):
    page = report.PAGE.read_text()
    again = "python -m vgkern doctor --traffic --write"
    assert page == report.written(page, list(rows.values())), f"not what is counted: {again}"


def test_every_bar_is_of_a_call():
    names = {f"{x.name} {backend}" for x in CALLS for backend in (*x.backends, "any")}
    assert known.names() <= names
    assert {*minimum.PEAK, *minimum.MILLISECONDS} <= {x.name for x in CALLS}
    assert set(minimum.FORMS) == {x.op for x in CALLS}
    assert len({x.name for x in CALLS}) == len(CALLS)


def test_every_kernel_has_a_model():
    assert set(triton.MODELS) == set(coverage.triton_kernels())
    assert set(cuda.MODELS) == set(cuda.arguments())


def test_every_kernel_is_counted(rows):
    """But for those of options that no call has."""
    seen = {one.name for x in rows.values() for one in x.found.launched if one.kind == "triton"}
    missing = set(triton.MODELS) - seen
    assert missing <= {"_recurrence_diagonal_kernel"}, missing


# --- that it bites


def faults(name, backend="triton"):
    return " ".join(report.line(calls.named(name), backend).faults())


def test_a_walk_over_the_logits_more_is_seen(monkeypatch):
    product = linear.mm32
    monkeypatch.setattr(
        linear_policy_loss.linear, "mm32",
        lambda a, b, out=None: product(a, b, out).clone() if out is None else product(a, b, out)
    )  # fmt: skip
    assert "bytes over the minimum" in faults(LARGE)
    assert "bytes over the minimum" in faults(SMOL, "cuda")


def test_a_product_that_is_added_is_seen(monkeypatch, rows):
    """As it was: a fresh product for each of sixteen chunks, added to the sum."""
    monkeypatch.setattr(memory, "CHUNK_BYTES", 256 << 20)
    monkeypatch.setattr(linear, "added32", lambda total, a, b: total.add_(linear.mm32(a, b)))
    said = faults(LARGE)
    assert all(x in said for x in ("bytes over", "launches", "milliseconds predicted"))
    monkeypatch.setattr(memory, "CHUNK_BYTES", None)  # two: within the bar, and the page says so
    now = report.cells(report.line(calls.named(LARGE), "triton"))
    assert now not in [report.cells(x) for x in rows.values()]


def test_small_launches_are_seen(monkeypatch):
    made = linear_policy_loss._Loss.terms

    def slower(self, *args):
        for _ in range(10):
            self.targets.clone()
        return made(self, *args)

    monkeypatch.setattr(linear_policy_loss._Loss, "terms", slower)
    for name in (TINY, SMOL):
        said = faults(name)
        assert "launches" in said and "bytes" not in said


def test_a_wait_is_seen(monkeypatch):
    made = linear_policy_loss._Loss.terms

    def waiting(self, *args):
        self.targets.nonzero()
        return made(self, *args)

    monkeypatch.setattr(linear_policy_loss._Loss, "terms", waiting)
    assert "the host waits for nonzero" in faults(TINY)


def test_memory_that_is_held_is_seen(monkeypatch):
    held, made = [], linear_policy_loss._Loss.terms

    def hoarding(self, *args):
        held.append(args[0].new_empty(1 << 30))
        return made(self, *args)

    monkeypatch.setattr(linear_policy_loss._Loss, "terms", hoarding)
    before = calls.named(SMOL).counted("triton").peak
    monkeypatch.undo()
    assert before - calls.named(SMOL).counted("triton").peak > 3 << 30


def test_a_debt_that_is_paid_is_seen(monkeypatch):
    monkeypatch.setitem(known.BYTES, "because", f"{LARGE} any 1.5")
    assert "known.py says that it is not" in faults(LARGE)


def test_a_kernel_without_a_model_is_named(monkeypatch):
    monkeypatch.delitem(triton.MODELS, "_row_policy_kernel")
    with pytest.raises(LookupError, match="_row_policy_kernel: no model in vgkern/gate/traffic"):
        faults(LARGE)


# --- the counter


def counted(f, backend="triton"):
    return count.count(f, backend)


def moves(f):
    """(name, bytes read, bytes written, launches) of each."""
    found = counted(f).launched
    return [(x.name, x.moved.read, x.moved.written, x.times) for x in found]


def test_what_launches_and_what_does_not():
    def call():
        x = tensor(8, 4)
        x.t()[1:].unsqueeze(0).expand(3, 3, 8).reshape(9, 8).detach()  # one copy
        x.view(2, 16).add_(1)
        x.to(x.device).float().contiguous()
        torch.empty_like(x), x.new_empty(3)
        x[:0].clone()

    assert moves(call) == [("clone", 3 * 8 * 4, 9 * 8 * 4, 1), ("add_", 128, 128, 1)]


def test_products():
    def call():
        a, b, total = tensor(4, 6, dtype=torch.bfloat16), tensor(6, 8, dtype=torch.bfloat16), None
        total = torch.mm(a, b, out_dtype=torch.float32)
        assert total.dtype == torch.float32 and total.is_cuda
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        linear.mm32(a, b, total)
        linear.added32(total, a, b)

    factors, result = 2 * (24 + 48), 4 * 32
    added = ("addmm", factors + result, result, 1)
    assert moves(call) == [("mm", factors, result, 1), added, ("mm", factors, result, 1), added]
    assert counted(call).flops == 4 * 2 * 4 * 6 * 8


def test_devices():
    def call():
        x = tensor(4)
        assert x.device == torch.device("cuda", 0) and x.is_cuda
        host = torch.ones(4)
        assert host.device.type == "cpu"
        y = host.to(x.device)
        assert (x + y).is_cuda
        x.where(x > 0, 0.0)  # the scalar is a tensor on the device
        x.cpu()

    names = [name for name, *_ in moves(call)]
    assert names == ["_to_copy", "add", "gt", "scalar_tensor", "where"]
    assert counted(call).waits == ["_to_copy", "cpu"]


def test_backward_is_counted_and_nothing_is_computed():
    def call():
        x = tensor(1 << 40, grad=True)  # 4 TiB
        torch.autograd.grad((x * 2).sum(), x)

    assert [name for name, *_ in moves(call)] == ["mul", "sum", "ones_like", "mul"]


def test_peak_is_of_what_is_alive():
    def call():
        x = tensor(1 << 20)
        for _ in range(3):
            x = x + 1

    assert counted(call).peak == 2 * 4 << 20


def test_live_rows():
    def call():
        hidden, live = tensor(1000, 8), tensor(1000, dtype=torch.bool)
        return hidden.index_select(0, live.nonzero()[:, 0])

    found = count.count(call, "triton", live=10)
    assert found.launched[-1].moved == Moved(10 * 8 * 4 + 10 * 8, 10 * 8 * 4)
    assert found.waits == ["nonzero"]


def test_outside_of_a_count():
    with pytest.raises(RuntimeError, match="within count"):
        tensor(3)
    with pytest.raises(ValueError, match="backend: got 'cpu'"):
        counted(lambda: None, "cpu")
    x = torch.zeros(3)
    assert x.device.type == "cpu" and not x.is_cuda  # nothing is left behind
    assert vgkern.token_logprobs(x[None], torch.zeros(1, dtype=torch.int64)).logp.device == x.device


def test_an_error_in_the_call_leaves_nothing_behind():
    with pytest.raises(ValueError, match="targets"):
        counted(lambda: vgkern.token_logprobs(tensor(3, 4), tensor(2, dtype=torch.int64)))
    with pytest.raises(RuntimeError, match="within count"):
        tensor(3)


# --- the time


def launch(kind, moved, waits=False):
    return count.Launch(kind, "x", "", moved, 1, waits)


def test_time():
    def took(*launched):
        return predict.time(count.Count(list(launched))).total

    large = launch("product", Moved(0, 0, int(790e9)))  # 1 ms
    assert took(large) == pytest.approx(1e-3 + 5e-6)
    assert took(large, large) == pytest.approx(2e-3 + 5e-6)
    copied = launch("aten", Moved(int(1.5e9), int(1.5e9)))
    assert took(copied) == pytest.approx(1e-3 + 5e-6)
    small = [launch("triton", Moved(4, 4))] * 10
    assert took(*small) == pytest.approx(10 * 20e-6 + 2e-6)
    assert took(large, launch("aten", Moved(4, 4), waits=True), *small) == pytest.approx(
        1e-3 + 5e-6 + 20e-6 + 2e-6 + 10 * 20e-6, rel=0.01
    )
    wide = launch("product", Moved(0, 0, int(50e9), size=4))
    assert took(wide) == pytest.approx(1e-3 + 5e-6)
