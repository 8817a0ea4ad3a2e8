"""The checks of a run on a GPU see what they are for: each of these faults turns one red."""

import json

import oracle
import pytest
import torch

import vgkern
from vgkern import cases
from vgkern.gpu import calls, graphs, large, modes, parity, smoke, tokens
from vgkern.gpu.compare import apart, verdict
from vgkern.gpu.device import Phase
from vgkern.ops import _check

F32 = torch.float32


@pytest.fixture
def phase(tmp_path, monkeypatch):
    monkeypatch.setattr(_check, "can_look", lambda device: False)  # as on a GPU
    return Phase("smoke", tmp_path, 60, dry=True)


def told(phase):
    return [json.loads(line) for line in (phase.out / "gpu.jsonl").read_text().splitlines()]


def broken(monkeypatch, op, change):
    """vgkern.<op>, its result changed."""
    right = getattr(vgkern, op)
    monkeypatch.setattr(vgkern, op, lambda *a, **k: change(right(*a, **k)))


NAMES = ("linear_token_logprobs-h7-v31-3d", "linear_policy_loss-grpo-h7-v31",
         "linear_sample-h7-v31", "costate_scan-n1", "group_advantages-grpo")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_error_of_three_percent(name, phase, monkeypatch):
    case = cases.by_name(name)
    ratio, ok, _ = calls.error_ratio(phase, oracle, case, "torch", F32)
    assert ok and 0 <= ratio < 10

    def off(out):
        if isinstance(out, torch.Tensor):
            return 1.03 * out
        first = next(k for k in out._fields if k != "token")
        return out._replace(**{first: 1.03 * getattr(out, first)})

    broken(monkeypatch, case.op, off)
    assert not calls.error_ratio(phase, oracle, case, "torch", F32)[1]


def test_a_gradient_that_is_off_alone(phase, monkeypatch):
    case = cases.by_name("linear_token_logprobs-h7-v31-3d")
    broken(
        monkeypatch,
        case.op,
        lambda out: out._replace(logp=out.logp.detach() + 1.03 * (out.logp - out.logp.detach())),
    )
    _, ok, why = calls.error_ratio(phase, oracle, case, "torch", F32)
    assert not ok and why.startswith("d")


def test_an_output_that_is_not_written(phase, monkeypatch):
    broken(monkeypatch, "token_logprobs", lambda out: out._replace(entropy=out.entropy * torch.nan))
    case = cases.by_name("token_logprobs-v31-3d")
    phase.check(
        "token_logprobs",
        "error_ratio",
        lambda: calls.error_ratio(phase, oracle, case, "torch", F32),
    )
    assert told(phase)[-1]["ok"] is False and "not finite" in told(phase)[-1]["why"]


@pytest.mark.parametrize("op", ["token_logprobs", "linear_token_logprobs", "linear_sample"])
def test_a_bad_row_that_reaches_others_or_says_nothing(op, phase, monkeypatch):
    smoke.spoiled(phase, op, "torch")
    assert all(f["ok"] for f in told(phase)), told(phase)
    with monkeypatch.context() as m:
        broken(m, op, lambda out: out._replace(logp=out.logp + 0 * out.logp.sum()))
        smoke.spoiled(phase, op, "torch")
    assert told(phase)[-1]["ok"] is False
    with monkeypatch.context() as m:
        broken(
            m,
            op,
            lambda out: out._replace(
                logp=out.logp.detach().nan_to_num().requires_grad_(),
                entropy=out.entropy.detach().nan_to_num(),
            ),
        )
        m.setattr(torch.autograd, "grad", lambda out, x: (torch.zeros_like(x),))
        smoke.spoiled(phase, op, "torch")
    assert told(phase)[-1]["ok"] is False and "nothing says so" in told(phase)[-1]["why"]


def test_another_token(phase, monkeypatch):
    x = tokens.inputs(phase, 48, F32)
    true = tokens.truth(x, {})
    assert torch.equal(tokens.drawn(x, {}, "torch"), true)
    at = {"dtype": "fp32", "shape": ""}
    sample = vgkern.linear_sample
    monkeypatch.setattr(tokens, "truth", lambda *a: true)

    def other(*a, backend, **k):
        out = sample(*a, backend="torch", **k)
        return out._replace(token=(out.token + 1) % 48)

    monkeypatch.setattr(vgkern, "linear_sample", other)
    tokens.one_noise(phase, x, "plain", {}, at)
    assert [f["ok"] for f in told(phase)] == [False] * 4
    assert "by at most" in told(phase)[0]["why"]


def test_a_gap_is_that_of_the_race(phase):
    x = tokens.inputs(phase, 48, F32)
    true = int(tokens.truth(x, {})[0])
    noise = tokens.part_of(x["noise"], slice(0, 1)).gumbel(48, torch.float64)[0]
    score = x["weight"].double() @ x["hidden"][0].double() + noise
    second = int(score.topk(2).indices[1])
    want = float(score[true] - score[second])
    assert tokens.gap(x, {}, 0, true, second) == pytest.approx(want) and want > 0


def test_two_runs_that_differ(phase, monkeypatch):
    count = iter(range(1000))
    broken(monkeypatch, "linear_sample", lambda o: o._replace(logp=o.logp + 1e-6 * next(count)))
    broken(monkeypatch, "linear_token_logprobs", lambda o: o._replace(logp=o.logp + next(count)))
    tokens.same_bits(phase, "torch")
    bad = {(f["op"], f["metric"]) for f in told(phase) if f["ok"] is False}
    ops = ("linear_sample", "linear_token_logprobs")
    assert {(op, m) for op in ops for m in ("repeat_bits", "permuted_bits")} <= bad


def test_a_graph_that_replays_old_data(phase, monkeypatch):
    case = cases.by_name("linear_token_logprobs-h7-v31-3d")
    assert graphs.graph(phase, case, "torch")[1] and graphs.stream(phase, case, "torch")[1]
    monkeypatch.setattr(Phase, "captured", lambda self, call: (lambda: None, call()))
    assert not graphs.graph(phase, case, "torch")[1]


def test_every_tensor_of_a_call_is_replayed_anew():
    case = cases.by_name("linear_policy_loss-costate-full")
    x = case.make(F32, 0)
    found = {id(t) for t in graphs.tensors(x)}
    wanted = [x["hidden"], x["old_logp"], x["costate"].value, x["costate"].noise.sequence]
    assert {id(t) for t in wanted} <= found


def test_the_loss_at_size_is_held_to_fp64(phase, monkeypatch):
    shape = (8, 16, 48)
    right = large.errors(phase, "torch", shape)
    assert set(right) == {"loss", "dhidden", "dweight"} and max(right.values()) < large.ALLOWED
    broken(monkeypatch, "linear_policy_loss", lambda out: out._replace(loss=1.02 * out.loss))
    wrong = large.errors(phase, "torch", shape)
    assert min(wrong.values()) > large.ALLOWED


def test_logits_of_forward_and_backward_that_differ(phase, monkeypatch):
    assert modes.tf32_sum(phase, "torch")[1] and modes.tf32_gap(phase, "torch")[1]
    right = vgkern.linear_token_logprobs

    def mixed(hidden, *a, **k):  # as where backward computes the logits again in another precision
        one, two = right(hidden, *a, **k), right(hidden.bfloat16().float(), *a, **k)
        return one._replace(
            logp=two.logp
            - two.logp.detach() * 1.01
            + one.logp.detach() * 1.01
            + 0.01 * k["bias"].sum()
            if "bias" in k
            else two.logp
        )

    monkeypatch.setattr(vgkern, "linear_token_logprobs", mixed)
    assert not modes.tf32_sum(phase, "torch")[1] and not modes.tf32_gap(phase, "torch")[1]


def test_several_chunks_are_made(phase, monkeypatch):
    """Where the kernels let themselves be asked; three rows of ten at a time."""
    from vgkern.kernels import linear

    seen = []
    with calls.several_chunks(10, 50) as why:
        assert why == ""
        seen = linear.chunks(10, 50)
    assert len(seen) >= 3 and len(linear.chunks(10, 50)) == 1


def test_the_tests_for_a_gpu_are_found(phase):
    phase.dry = False
    given = parity.arguments(phase)
    assert {"tests/test_parity.py", "tests/test_reliability.py"} <= set(given)
    assert given[given.index("-m") + 1] == "gpu"


def test_a_nan_is_far_from_everything():
    one, two = {"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.ones(3), "b": torch.ones(2)}
    assert verdict(*apart(one, two))[1]
    two["a"][1] = torch.nan
    assert not verdict(*apart(one, two))[1] and not verdict(*apart(two, one))[1]
    assert max((0.0, ""), apart(one, two)) == apart(one, two)
    assert not verdict(*apart({"t": torch.tensor([1])}, {"t": torch.tensor([2])}))[1]


def test_numbers_that_json_lacks(phase):
    phase.fact("x", "y", float("nan"), floor=float("inf"))
    assert told(phase)[0]["value"] is None and told(phase)[0]["floor"] is None
