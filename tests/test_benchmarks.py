"""Every script of benchmarks/ runs to its end, at sizes that mean nothing."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = (48, 8, 64)
SCRIPTS = {
    "costate_analytic": "--truth 32 --groups 4 --seeds 1 --steps 2 --rollouts 2 --out OUT",
    "costate_hops": "--length 6 --prompt 3 --repeat 1",
    "costate_mix": "--methods grpo,hops --seeds 1 --steps 2 --n 2 --lr 1e-3 --out OUT",
    "impact_cost": "--prompts 4 --group 4 --repeat 1 --json OUT/impact.json",
    "linear_quadratic": "--rollouts 400 --horizons 2 --sigmas 0.1",
    "prefix_step": "--prompts 2 --threads 1 --repeat 1",
    "probe_cost": "--repeat 1 --json OUT/probe.json",
    "run": "--threads 1 --repeat 3 --json OUT/run.json",
    "shapes": "--threads 1 --repeat 3 --json OUT/shapes.json",
}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    spec = importlib.util.spec_from_file_location(f"of_benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs(name, tmp_path, monkeypatch, capsys):
    module = script(name, monkeypatch)
    if name == "costate_analytic":
        fit = module.fit
        monkeypatch.setattr(module, "fit", lambda _, source: fit(2, source))
    if name == "run":
        monkeypatch.setattr(module, "LOSS_SHAPES", [TINY, TINY])
        monkeypatch.setattr(module, "memory_rows", lambda *_: [])  # a new process, at its full size
        monkeypatch.setattr(module, "SAMPLE_SHAPE", TINY)
    if name == "shapes":
        monkeypatch.setattr(module, "SHAPES", [TINY])
        monkeypatch.setattr(module, "ROWS", [TINY])
        monkeypatch.setattr(module, "compiled", module.common.eager)  # a compilation takes seconds
    arguments = SCRIPTS[name].replace("OUT", str(tmp_path)).split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    module.main()
    assert capsys.readouterr().out.strip()
    for path in tmp_path.rglob("*.json"):
        assert json.loads(path.read_text())
    assert "OUT" not in SCRIPTS[name] or any(tmp_path.rglob("*.json"))


def test_none_is_left_out():
    # a pretrained model, another library; a GPU: test_gpu_dry.py, test_gpu_run.py
    others = {"sparse", "trl_step", "gpu", "gpu_report"}
    assert {p.stem for p in FOLDER.glob("*.py")} == set(SCRIPTS) | others
