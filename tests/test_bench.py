"""The benchmark: arithmetic on a fake clock, models by hand, one tiny run end to end."""

import argparse
import dataclasses
import json
import sys

import pytest
import torch

import vgkern
from vgkern.bench import base as base_
from vgkern.bench import cli, clock, compare, group, memory, offline, plots, record, roof, table
from vgkern.bench import run as run_
from vgkern.bench.clock import paired, spread, summary
from vgkern.bench.measure import measure
from vgkern.bench.plan import Options, plan, variants, wants_peak
from vgkern.bench.rivals import NAMES, RIVALS, Rival, Skip
from vgkern.bench.shapes import LEAST_ROWS, MODELS, cut, memory_rows
from vgkern.bench.work import BOTH, FWD, OPS, Work, bare_products, cost
from vgkern.cases import by_name

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "fp32": 1e11, "bf16": 5e10, "fp16": 1e10}
TINY = Work("linear_policy_loss", "tiny", "fp32", BOTH, 32, 8192, "given", 256, 512)


class FakeClock:
    """Every call takes what its entry of `costs` says; the same entry may change by round."""

    name = "fake"

    def __init__(self, costs):
        self.costs, self.time, self.order = costs, 0.0, []

    def now(self):
        return self.time

    def sample(self, runs, calls):
        name = runs[0]()
        self.order.append((name, calls))
        costs = self.costs[name]
        one = costs.pop(0) if len(costs) > 1 else costs[0]
        self.time += one * calls
        return one


def row(**changes) -> record.Row:
    fields = {**dataclasses.asdict(TINY), "variant": "vgkern cpu", "seconds": 0.01, "ratio": 1.0}
    fields |= {"noise": 0.01, "rounds": 5, "calls": 1, "clock": "wall", "flops": 8, "bytes": 4}
    return record.Row(**{**fields, **changes})


def report(rows, **changes) -> record.Report:
    machine = {"device": "cpu", "cpu": "a cpu", "threads": 2, "cores": 2, "load": 0.0}
    versions = {"vgkern": "1", "torch": "2"}
    return record.Report(machine, versions, dict(RATES), {"level": "quick"}, rows, **changes)


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
    assert llama["floor_s"]["90"] == pytest.approx(llama["flops"] / 989e12)


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
    assert cut(4096, ("memory", 5000), ("time", 9000)) == (4096, "")
    assert cut(4096, ("memory", 700), ("time", 900)) == (512, "memory")
    assert cut(4096, ("memory", 5000), ("time", 900)) == (512, "time")
    assert cut(4096, ("memory", 5000), ("time", 3)) == (LEAST_ROWS, "time")
    assert cut(4096, ("memory", 3), ("time", 900)) == (0, "memory")
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
    shapes = {w.shape for w in plan(Options(), RATES, 2e10) if w.op == "linear_policy_loss"}
    assert shapes >= set(MODELS)
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


# --- rivals


@pytest.mark.parametrize("kind", RIVALS, ids=lambda r: r.name)
def test_an_absent_rival_is_a_reason(kind, monkeypatch):
    if kind.package == "torch":
        pytest.skip("never absent")
    module = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
    name = module.get(kind.package, kind.package.split("-")[0])
    for known in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, name, None)  # an import of it raises ImportError
    monkeypatch.setattr(group, "_loaded", {})
    monkeypatch.setattr(Rival, "version", lambda self: "absent")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Skip, match=r"not installed: pip install|GPU only"):
        group.library(kind.name, CPU)
    if kind.name in ("quack", "FlashInfer"):
        with pytest.raises(Skip, match=f"not installed: pip install {kind.package}"):
            kind().load(torch.device("cuda"))


class Wrong(Rival):
    """Reads as torch eager, but its loss is another one; or it fails."""

    name, package = "wrong", "torch"

    def forward(self, op):
        if op == "token_logprobs":
            raise OSError("a library of theirs\nis not there")
        eager = group.library("torch eager", CPU).forward(op)
        return lambda x: (eager(x)[0] * 1.01,)


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setitem(group._loaded, ("wrong", "cpu"), Wrong())
    rows, skipped = measure(TINY, CPU, ["vgkern cpu", "wrong"], clock.WallClock(), RATES, 3, 9.0)
    assert {r.variant for r in rows} == {"vgkern cpu", group.GEMM}
    ((name, why),) = skipped
    assert name == "wrong" and why.startswith("computes something else")
    logits = TINY.replace(op="token_logprobs", pass_=FWD)
    _, skipped = measure(logits, CPU, ["wrong"], clock.WallClock(), RATES, 3, 9.0)
    assert ("wrong", "OSError: a library of theirs") in skipped


def test_a_sampler_of_another_distribution_is_not_timed(monkeypatch):
    class Greedy(Rival):
        def forward(self, op):
            def call(x):
                lp = (x["hidden"] @ x["weight"].T).log_softmax(-1)
                return (*reversed(lp.max(-1)), None)

            return call

    monkeypatch.setitem(group._loaded, ("greedy", "cpu"), Greedy())
    work = Work("linear_sample", "tiny", "fp32", FWD, 64, 64, "", 256, 512)
    rows, skipped = measure(
        work, CPU, ["torch.multinomial", "greedy"], clock.WallClock(), RATES, 3, 9.0
    )
    assert {r.variant for r in rows} == {"torch.multinomial", group.GEMM}
    assert len(skipped) == 1 and skipped[0][1].startswith("draws from another distribution")


@pytest.mark.parametrize("op", OPS)
def test_backends_and_plain_pytorch_agree(op):
    """On the inputs of the benchmark, every op; the case's own inputs have the same names."""
    heads = {"linear_policy_loss": "dapo-temperature", "token_logprobs": "v1000-softcap"}
    shape = "tiny"
    if op in ("group_advantages", "policy_loss"):
        shape = {"group_advantages": "4096", "policy_loss": "256x128"}[op]
    elif op in ("gaussian_action", "costate_scan", "linear_rollout"):
        pytest.skip("their inputs are the case's, and their plain PyTorch is the torch backend")
    work = Work(op, shape, "fp32", BOTH, 24, 24, "", 32, 100)
    work = work.replace(pass_=work.passes[-1])
    names = ["vgkern torch", "torch eager"] if op != "noisy_embedding" else ["vgkern torch"]
    for name in names:
        assert group.Group(work, CPU).check(name) < 1e-4
    if op in heads:
        theirs = by_name(f"{op}-{heads[op]}").make(torch.float32, 0)
        assert set(group.Group(work, CPU).xs[0]) <= set(theirs) | {"mask"}


def test_without_native_kernels_the_torch_backend_is_the_base(monkeypatch):
    loaded = {("vgkern cpu", "cpu"): Skip("no C++ compiler")}
    monkeypatch.setattr(group, "_loaded", loaded)
    asked = ["vgkern cpu", "vgkern torch", "torch eager"]
    rows, skipped = measure(TINY, CPU, asked, clock.WallClock(), RATES, 3, 9.0)
    assert (rows[0].variant, rows[0].ratio) == ("vgkern torch", 1.0)
    assert skipped == [("vgkern cpu", "no C++ compiler")]


# --- files, tables, comparisons


def test_json_round_trip_and_schema(tmp_path):
    made = report([row(), row(variant="torch eager", ratio=1.5, note="x")], not_timed={"why": "y"})
    made.skip("TRL", "not installed")
    made.skip("TRL", "not installed")
    made.write(tmp_path / "a.json")
    assert record.read(tmp_path / "a.json") == made and len(made.skipped) == 1
    given = json.loads((tmp_path / "a.json").read_text())
    assert set(given) == {f.name for f in dataclasses.fields(record.Report)}
    assert set(given["rows"][0]) == {f.name for f in dataclasses.fields(record.Row)}
    for text in ("[]", "{}", '{"schema": 99}', "no json"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=r"b\.json: not a file of"):
            record.read(tmp_path / "b.json")


def test_table_shows_figures_and_what_is_missing():
    rows = [row(of_roof=0.5, of_gemm=0.8, peak_mib=12.4, noise=0.031), row(variant=group.GEMM)]
    made = report(rows)
    made.skip("TRL", "not installed: pip install trl")
    made.skip("Liger: linear_sample tiny 8x256x512 fp32 fwd", "computes something else")
    text = table.text(made)
    ours = next(line for line in text.splitlines() if "vgkern cpu" in line and "ms" in line)
    assert ours.split() == ["vgkern", "cpu", "10", "ms", "1.00", "3%", "50", "80", "12"]
    assert "(32 of 8192 rows: as asked)" in text
    assert "  Liger (linear_sample tiny 8x256x512 fp32 fwd): computes something else" in text
    assert max(map(len, text.splitlines())) <= 130
    assert [table.duration(s) for s in (None, 2.5, 0.0123, 4.56e-6)] == [
        "",
        "2.5 s",
        "12.3 ms",
        "4.56 us",
    ]


def test_compare_counts_ours_beyond_threshold_and_noise(tmp_path, capsys):
    before = report([row(), row(variant="TRL", ratio=2.0)])
    slower = report([row(seconds=0.02), row(variant="TRL", seconds=0.02)])
    noisy = report([row(seconds=0.02, noise=0.5), row(variant="TRL")])
    for name, made in (("a", before), ("b", slower), ("c", noisy)):
        made.write(tmp_path / f"{name}.json")
    files = {k: str(tmp_path / f"{k}.json") for k in "abc"}
    assert cli.main(["--compare", files["a"], files["b"]]) == 1
    said = capsys.readouterr().out
    assert said.count("SLOWER") == 1 and "2.00" in said  # a rival that is slower is no regression
    assert cli.main(["--compare", files["a"], files["b"], "--threshold", "2.5"]) == 0
    assert cli.main(["--compare", files["a"], files["c"]]) == 0  # within its noise
    assert cli.main(["--compare", files["a"], files["a"]]) == 0
    assert cli.main(["--compare", files["a"], str(tmp_path / "none.json")]) == 2
    report([row(op="policy_loss")]).write(tmp_path / "d.json")
    assert cli.main(["--compare", files["a"], str(tmp_path / "d.json")]) == 2


def test_compare_on_a_slower_machine_goes_by_the_bare_products():
    gemm = {"variant": group.GEMM}
    a = report([row(), row(**gemm, seconds=0.01)])
    b = report([row(seconds=0.03), row(**gemm, seconds=0.03)])
    (change,) = compare.changes(a, b)
    assert change.by_gemm and change.ratio == pytest.approx(1.0) and not change.worse(1.1)


def test_base_refuses_what_is_no_commit():
    with pytest.raises(ValueError, match="no-such-ref"), base_.checkout("no-such-ref"):
        pass


# --- end to end


def test_a_tiny_run_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roof, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(roof, "SIDE", {"cpu": 64})
    monkeypatch.setattr(run_, "plan", lambda *_: works)
    sweep = TINY.replace(sweep="active", rows=16)
    works = [TINY, sweep, sweep.replace(share=0.5)]
    works += [TINY.replace(rows=8, vocab=v, sweep="vocab") for v in (64, 512)]
    works += [TINY.replace(rows=n, vocab=4096, sweep="rows") for n in (64, 512)]
    peaks = {64: {"vgkern cpu": 3.0, "torch eager": 5.0}, 512: {"vgkern cpu": 9.0}}
    monkeypatch.setattr(memory, "peaks", lambda work, *_: peaks.get(work.rows, {}))
    arguments = ["--quick", "--rival", "torch-eager", "trl", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr()
    made = record.read(tmp_path / "bench.json")
    timed = [r for r in made.rows if r.seconds]
    assert {r.variant for r in timed} == {"vgkern cpu", "vgkern torch", "torch eager", group.GEMM}
    assert all(r.seconds > 0 and r.ratio > 0 and r.noise >= 0 and r.rounds >= 3 for r in timed)
    assert all(r.of_gemm for r in timed) and {"torch", "trl"} <= set(made.versions)
    assert made.roof["copy"] > 0 and made.machine["threads"] == torch.get_num_threads()
    assert "GPU: not timed" in out.out and "[7/7]" in out.err and "left" in out.err
    for name in plots.PICTURES:
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG", name
    assert (tmp_path / "table.txt").read_text().strip() in out.out


def test_peak_memory_is_that_of_a_new_process():
    """Eager holds logits, their log-softmax and its gradient: 8 MiB each; ours one block."""
    work = TINY.replace(rows=512, hidden=32, vocab=4096)
    found = memory.peaks(work, ["vgkern cpu", "torch eager"], 1)
    assert 16 <= found["torch eager"] <= 40
    assert found["vgkern cpu"] < found["torch eager"]


def test_without_matplotlib_the_remedy_is_said(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install" in plots.draw(report([row()]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_beyond_the_budget_is_listed(monkeypatch):
    monkeypatch.setattr(run_.roof, "measure", lambda *_: dict(RATES))
    monkeypatch.setattr(run_.offline, "figures", lambda **_: {})
    options = Options("quick", ("linear_sample",), ("tiny",), rivals=(), budget=1e-9)
    made = run_.run(options, tell=lambda _: None)
    assert not made.rows and any("time budget" in s["why"] for s in made.skipped)


def test_the_names_are_those_of_the_help():
    text = cli.parser().format_help().replace("\n", " ")
    assert isinstance(cli.parser(), argparse.ArgumentParser)
    assert all(name.split()[0] in text for name in (*NAMES, *OPS, *MODELS))
