"""The CUDA binding against the oldest torch that pyproject.toml allows, without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vgkern.ops import _compile, _cuda_build, _linear

ROOT = Path(__file__).parent.parent
BINDING = ROOT / "csrc" / _cuda_build.BINDING
# What of torch's stable headers the binding names, each of it in the headers of torch 2.11.0:
# grep -rhoE '\b(STABLE|STD|TORCH|AOTI)[A-Z]*_[A-Z_]+\b' csrc/stable headeronly, in include/torch
MACROS = {
    "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
}  # fmt: skip


def code() -> str:
    return re.sub(r"//[^\n]*", "", BINDING.read_text())


def test_the_binding_names_only_what_the_oldest_torch_has():
    found = set(re.findall(r"\b(?:STABLE|STD|TORCH|AOTI)[A-Z]*_[A-Z_]+\b", code()))
    assert found == MACROS, found ^ MACROS


def test_what_lives_in_libtorch_cuda_is_looked_up_when_it_runs():
    """Python loads libtorch_cuda with local scope: a weak symbol of it stays null."""
    assert "weak" not in code()
    assert re.search(r"dlopen\(\"libtorch_cuda\.so\", RTLD_LAZY \| RTLD_NOLOAD\)", code())


def test_the_binding_of_a_gpu_compiles(tmp_path):
    """The emulated one, which every other test builds, leaves the streams out."""
    compiler = _compile.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    include, _ = _compile._torch_flags(compiler)
    command = _cuda_build.binding_command(compiler, ROOT / "csrc", tmp_path, include)
    command = [x for x in command if x not in ("-c", "-o", str(tmp_path / "binding.o"))]
    done = subprocess.run([*command, "-fsyntax-only"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_autocast_is_known_by_a_table():
    """Dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available."""
    for device in _linear.AUTOCASTS:
        assert torch.amp.is_autocast_available(device), device
    with FakeTensorMode(), _linear.no_autocast(torch.device("meta")):
        pass


def test_make_oldest_installs_the_oldest_that_pyproject_allows():
    """And the ABI that the binding asks for is of that torch."""
    asked = (ROOT / "pyproject.toml").read_text()
    torch_version, triton_version = (
        re.search(rf'"{name}>=([\d.]+)', asked).group(1) for name in ("torch", "triton")
    )
    major, minor = map(int, torch_version.split("."))
    assert f"=0x{major:02x}{minor:02x}0000" in _cuda_build.STABLE_ABI
    if shutil.which("make") is None:
        pytest.skip("no make")
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"torch {torch_version}.0, Triton {triton_version}.0" in said
    recipe = subprocess.run(
        ["make", "-Bn", "oldest", "OLD_VENV=build/none"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert f"torch=={torch_version}.0 triton=={triton_version}.0" in recipe


@pytest.mark.parametrize(("there", "asked"), [(False, ""), (False, "1"), (True, "")])
def test_make_test_says_whether_it_runs_the_oldest(there, asked, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    if there:
        (tmp_path / ".vgkern-oldest-1").touch()
    command = ["make", "-n", "test", f"OLD_VENV={tmp_path}", f"CI_OLDEST={asked}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    runs = f"{tmp_path}/bin/python -m pytest" in said
    assert runs == (there or bool(asked)) and ("not run; make oldest" in said) != runs
