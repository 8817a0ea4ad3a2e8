"""The benchmark: rivals, files, comparisons, and one tiny run end to end."""

import argparse
import dataclasses
import json
import sys
import types

import pytest
import torch
from bench_fakes import CPU, RATES, TINY, report, row

from vgkern.bench import base as base_
from vgkern.bench import cli, clock, compare, group, memory, plots, record, roof, table
from vgkern.bench import run as run_
from vgkern.bench.measure import measure
from vgkern.bench.plan import Options
from vgkern.bench.rivals import NAMES, RIVALS, Rival, Skip
from vgkern.bench.shapes import MODELS
from vgkern.bench.work import BOTH, FWD, OPS, Work
from vgkern.cases import by_name

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


def test_adapters_of_gpu_only_libraries(monkeypatch):
    """Stand-ins for the libraries: what is called, with what, and what comes out."""
    quack = types.SimpleNamespace(cross_entropy=torch.nn.functional.cross_entropy)
    sampling = types.SimpleNamespace(sampling_from_logits=lambda z: z.argmax(-1).int())
    monkeypatch.setitem(sys.modules, "quack", types.SimpleNamespace(cross_entropy=quack))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", quack)
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(sampling=sampling))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", sampling)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logp, token = logits.log_softmax(-1).max(-1)
    x = {"logits": logits, "targets": token, "hidden": logits, "weight": torch.eye(9)}
    has = {
        "quack": ("token_logprobs", (logp, None)),
        "FlashInfer": ("linear_sample", (token, logp, None)),
    }
    for kind in [r for r in RIVALS if r.name in has]:
        op, expected = has[kind.name]
        with pytest.raises(Skip, match="GPU only"):
            kind().load(CPU)
        (rival := kind()).load(torch.device("cuda"))
        torch.testing.assert_close(rival.forward(op)(x), expected)
        assert rival.note(op) == "no entropy"
        with pytest.raises(Skip, match="no such op"):
            rival.forward("group_advantages")
    with pytest.raises(Skip, match="one loss for all tokens"):
        next(r for r in RIVALS if r.name == "quack")().forward("linear_policy_loss")


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


def test_peak_memory_of_one_that_fails_is_its_own_loss():
    work = TINY.replace(rows=32, hidden=8, vocab=64)
    variants = ["nobody", "vgkern cpu"]
    found = memory.main(json.dumps({"work": vars(work), "variants": variants, "threads": 1}))
    assert found["nobody"].startswith("KeyError") and isinstance(found["vgkern cpu"], float)


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
