"""What a wheel contains, and what an import costs."""

import email
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

import vgkern

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves build/ and *.egg-info where it builds."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    left = {"runs", "build", "dist"}
    kept = [p for p in ROOT.glob("[!.]*") if p.name not in left and p.suffix != ".egg-info"]
    subprocess.run(["cp", "-RP", *map(str, kept), str(copy)], check=True)
    python(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)
    )
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_has_every_source(wheel):
    found = {n for n in wheel.namelist() if n.startswith("vgkern/")}
    rooms = [
        ("", "*.py"),
        ("ops", "*.py"),
        ("cases", "*.py"),
        ("train", "*.py"),
        ("kernels", "*.py"),
    ]
    rooms += [("csrc", suffix) for suffix in ("*.cpp", "*.cu", "*.h", "*.cuh")]
    wanted = {f"vgkern/{room}/{p.name}".replace("//", "/")
              for room, glob in rooms for p in (ROOT / "vgkern" / room).glob(glob)}  # fmt: skip
    assert wanted | {"vgkern/py.typed"} <= found, sorted(wanted - found)
    assert any(n.startswith("vgkern/csrc/") for n in wanted)
    for name in wanted:
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_installs_nothing_beside_the_package(wheel):
    tops = {n.split("/")[0] for n in wheel.namelist()}
    assert tops == {"vgkern", f"vgkern-{vgkern.__version__}.dist-info"}


def test_version_licence_and_extras(wheel):
    meta = email.message_from_bytes(wheel.read(f"vgkern-{vgkern.__version__}.dist-info/METADATA"))
    assert (meta["Version"], meta["License-Expression"]) == (vgkern.__version__, "Apache-2.0")
    assert {"train", "hf", "tasks", "bench", "compare", "dev"} <= set(
        meta.get_all("Provides-Extra")
    )


def test_constraints_pin_what_is_tested_and_leave_triton_to_torch():
    """Each CUDA wheel of torch pins its own triton."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    assert "triton" not in pins and pins["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[\s<>=!~;\[]", r)[0] for r in asked}
    assert names - set(pins) == {"triton"}


def test_import_is_light_and_compiles_nothing():
    code = (
        "import torch, subprocess, sys;"  # torch may start processes, vgkern may not
        "subprocess.Popen = subprocess.run = None; import vgkern;"
        "heavy = {'triton', 'transformers', 'matplotlib', 'safetensors', 'ninja', 'vgkern.train'};"
        "print(sorted(heavy & set(sys.modules)));"
        "from vgkern.ops import _native; print(_native._outcome)"
    )
    assert python("-c", code).split() == ["[]", "None"]


def test_help_starts_fast():
    """Help costs little more than the import of torch, which `import vgkern` needs."""
    began = time.perf_counter()
    python("-c", "import torch")
    torch_only = time.perf_counter() - began
    began = time.perf_counter()
    assert "train" in python("-m", "vgkern", "--help")
    assert time.perf_counter() - began < 2 * torch_only + 1
