"""The benchmark: arithmetic on a fake clock, models by hand, the plan and its filters."""

import pytest
import torch
from bench_fakes import CPU, RATES, TINY, FakeClock

import vgkern
from vgkern.bench import cli, clock, group, offline, roof
from vgkern.bench.clock import paired, spread, summary
from vgkern.bench.plan import Options, estimate, plan, variants, wants_peak
from vgkern.bench.shapes import MODELS, TIME_ROWS, cut, memory_rows
from vgkern.bench.work import FWD, OPS, Work, bare_products, cost

# --- the clock


def test_rounds_alternate_and_ratios_are_paired():
    """The machine slows down twofold in round 2: the ratio and its noise do not see it."""
    fake = FakeClock({"a": [1, 1, 2, 1], "b": [3, 3, 6, 3]})
    times = paired({k: [lambda k=k: k] for k in "ab"}, "a", fake, 3)
    assert [name for name, _ in fake.order] == list("ab" + "ab" + "ba" + "ab")
    assert times["b"].ratio == 3 and times["b"].noise == 0
    assert times["a"][:4] == (1, 1.0, 0.0, 3) and times["b"].clock == "fake"


def test_a_short_call_is_repeated_within_a_sample():
    fake = FakeClock({"a": [1e-5], "b": [1.0]})
    times = paired({k: [lambda k=k: k] for k in "ab"}, "a", fake, 3)
    assert times["a"].calls == 200 and times["b"].calls == 1  # 2 ms a sample
    assert times["b"].ratio == pytest.approx(1e5)


def test_no_round_starts_after_the_limit_but_three_do():
    assert (
        paired({"a": [lambda: "a"]}, "a", FakeClock({"a": [1.0]}), 50, limit=6.5)["a"].rounds == 6
    )
    assert (
        paired({"a": [lambda: "a"]}, "a", FakeClock({"a": [9.0]}), 50, limit=1.0)["a"].rounds == 3
    )


def test_median_and_noise():
    assert spread([1.0, 2.0, 4.0, 8.0, 100.0]) == 3.0 / 4.0
    median, ratio, noise = summary([2.0, 2.2, 9.0], [1.0, 1.0, 3.0])
    assert (median, ratio) == (2.2, 2.2) and noise == pytest.approx(0.2 / 2.2)
    assert summary([2.0, 3.0, 4.0], None) == (3.0, 1.0, pytest.approx(1 / 3))


def test_small_calls_are_captured_and_a_failed_capture_is_said():
    fake = FakeClock({"a": [1e-5], "b": [1e-5], "graph": [2e-5]})

    def capture(runs):
        if runs[0]() == "b":
            raise RuntimeError("it synchronises\nand more")
        return lambda: "graph"

    times = paired({k: [lambda k=k: k] for k in "ab"}, "a", fake, 3, capture=capture)
    assert times["a"].clock == "graph"
    assert times["a"].seconds == pytest.approx(2e-5 / clock.GRAPH_CALLS)
    assert times["b"].clock == "fake, no graph: it synchronises"


def test_calls_rotate_over_copies_of_the_inputs():
    seen = []
    clock.WallClock().sample([lambda: seen.append(0), lambda: seen.append(1)], 5)
    assert seen == [0, 1, 0, 1, 0]
    xs = group.Group(TINY, CPU, copies=2).xs
    assert xs[0]["hidden"].data_ptr() != xs[1]["hidden"].data_ptr()
    assert torch.equal(xs[0]["hidden"], xs[1]["hidden"]) and xs[1]["hidden"].requires_grad


# --- models and shapes


def test_bytes_and_flops_by_hand():
    """4 rows, width 2, vocabulary 8, fp32: a product is 2 * 4 * 2 * 8 = 128 flops."""
    x = {"hidden": torch.randn(1, 4, 2), "weight": torch.randn(8, 2)}
    x |= {"targets": torch.zeros(1, 4, dtype=torch.int64), "advantages": torch.ones(1)}
    x |= {"objective": vgkern.objectives.DAPO}
    work = TINY.replace(rows=4, hidden=2, vocab=8)
    states = 4 * (4 * 2 + 8 * 2)  # bytes of hidden and weight
    assert cost(work, x) == (3 * 128, 2 * states)  # read once, gradients written once
    assert cost(work.replace(pass_=FWD), x) == (128, states + 4 * 8 + 4)
    half = {**x, "mask": torch.tensor([[1, 1, 0, 0]])}
    assert cost(work, half)[0] == 3 * 128 // 2
    assert cost(work.replace(pass_=FWD), half)[0] == 128 // 2
    # the slower of products and copies; half precision may be widened to fp32, which is faster here
    assert roof.floor(RATES, "bf16", 1e11, 1e9) == 1.0
    assert roof.floor(RATES, "fp32", 1e11, 3e10) == 3.0


def test_offline_floor_by_hand():
    assert offline.head_bytes("linear_policy_loss", 4, 2, 8) == 2 * 2 * (4 + 8) * 2
    llama = next(f for f in offline.floors() if f["shape"] == "llama-3-8b")
    assert llama["flops"] == 6 * 8192 * 4096 * 128256
    assert llama["floor_s"]["90"] == pytest.approx(llama["flops"] / 989.5e12)


def test_peaks_are_those_that_pytorch_has_of_the_data_sheets():
    known = pytest.importorskip("torch._inductor.analysis.device_info")._device_mapping
    assert offline.PEAKS
    for gpu, memory, flops in offline.PEAKS.values():
        sheet = known["NVIDIA " + gpu.split()[0]]
        assert memory == sheet.dram_bw_gbs * 1e9
        assert flops == sheet.tops[torch.bfloat16] / sheet.tops_sparsity_factor * 1e12


def test_bare_products_are_the_products():
    g = group.Group(TINY.replace(rows=600, vocab=40, hidden=8), CPU)
    x = {k: g.xs[0][k] for k in ("hidden", "weight")}
    run = bare_products(g.work, x)
    cells = dict(
        zip(run.__code__.co_freevars, (c.cell_contents for c in run.__closure__), strict=True)
    )
    run()
    h, w = x["hidden"].detach().reshape(-1, 8), x["weight"].detach()
    torch.testing.assert_close(cells["dw"], (h @ w.T).T @ h, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(cells["dh"], h @ w.T @ w, rtol=1e-4, atol=1e-3)
    assert bare_products(Work("token_logprobs", "tiny", "fp32"), {}) is None


def test_rows_are_cut_to_memory_and_time():
    assert cut(4096, 5000, 9000) == cut(4096, 5000) == (4096, "")
    assert cut(4096, 700, 900) == (512, "memory")
    assert cut(4096, 5000, 900) == (512, "time")
    assert cut(4096, 5000, 3) == (TIME_ROWS, "time")
    assert cut(64, 5000, 3) == (64, "")
    assert cut(4096, 100, 3) == (64, "memory")
    assert cut(4096, 3, 900) == (0, "memory")
    free, model = 8 * 2**30, MODELS["llama-3-8b"]
    rows = memory_rows(free, model.hidden, model.vocab, 2)
    used = model.hidden * model.vocab * 12 + rows * model.vocab * 16
    assert used == pytest.approx(free)
    asked = Options(ops=("linear_policy_loss",), shapes=("llama-3-8b",), rivals=())
    plenty = plan(asked, {k: v * 1e6 for k, v in RATES.items()}, 1e15)
    little = plan(asked, {k: v * 1e6 for k, v in RATES.items()}, free / 0.4)
    assert {(w.rows, w.cut) for w in plenty if not w.sweep} == {(8192, "")}
    assert {(w.rows, w.cut) for w in little if not w.sweep} == {
        (1024, "memory")
    }  # 2.3 GB beside the head


def test_the_plan_fits_its_budget_and_covers_every_op():
    for level, budget in (("quick", 70), ("default", 720)):
        options = Options(level=level)
        works = plan(options, RATES, 2e10)
        assert {w.op for w in works} == set(OPS)
        assert max(w.rows for w in works if w.shape == "small" and not w.sweep) <= 2048
        assert options.seconds == budget
        assert sum(estimate(w, options, RATES) for w in works if w.cut != "time") <= budget
    losses = [w for w in plan(Options(), RATES, 2e10) if w.op == "linear_policy_loss"]
    assert {w.shape for w in losses} >= set(MODELS)  # also those that are left out
    assert min(w.rows for w in losses if w.rows and not w.sweep) >= TIME_ROWS
    rows = {w.shape: w.rows for w in losses if not w.sweep}
    assert rows["smollm2-135m"] and not rows["qwen3-32b"]  # RATES: of two cores
    fast, slow = (plan(Options(), {k: v * s for k, v in RATES.items()}, 2e10) for s in (100, 1))
    assert sum(w.rows for w in fast) > sum(w.rows for w in slow)


def test_filters():
    o = Options(ops=("linear_sample",), shapes=("tiny",), dtypes=("bf16",), backends=("torch",),
                rivals=("torch eager",), rows=48)  # fmt: skip
    works = plan(o, RATES, 2e10)
    assert [(w.op, w.shape, w.dtype, w.pass_, w.rows, w.cut) for w in works] == [
        ("linear_sample", "tiny", "bf16", FWD, 48, "given")
    ]
    assert variants(works[0], o) == ["vgkern torch", "torch eager"]
    assert not wants_peak(works[0], o)
    scan = Work("costate_scan", "256x64x16", "fp32")
    assert variants(scan, Options(rivals=())) == ["vgkern cpu"]
    assert variants(scan, Options(rivals=(), backends=("torch",))) == ["vgkern torch"]
    with pytest.raises(ValueError, match="nothing to measure"):
        plan(Options(ops=("linear_sample",), shapes=("4096",)), RATES, 2e10)
    given = cli.parser().parse_args(
        ["--quick", "--op", "policy_loss", "--rival", "trl", "torch-eager", "--device", "cpu"]
    )
    assert cli.options(given) == Options("quick", ("policy_loss",), rivals=("TRL", "torch eager"))


@pytest.mark.parametrize(
    "arguments",
    [["--op", "nothing"], ["--rival", "nobody"], ["--dtype", "int8"], ["--rows", "-1"],
     ["--threshold", "0.5"], ["--device", "cuda"], ["--quick", "--full"]],
)  # fmt: skip
def test_bad_arguments_say_what_is_allowed(arguments, capsys):
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and arguments[0] in said
    assert any(word in said for word in ("got", "invalid", "not allowed"))
