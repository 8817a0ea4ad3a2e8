"""A GPU, a driver or an nvcc that is too old: one exception with the reason and the remedy."""

import subprocess
import sys

import pytest
import torch

from vgkern.__main__ import main
from vgkern.ops import _backend, _compile, _cuda, _cuda_build, _gpu

GPU = torch.device("cuda", 0)
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
# What torch raises from cudaGetDeviceCount, error 35 (c10/cuda/CUDAFunctions.cpp).
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/ "
    "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled "
    "with your version of the CUDA driver."
)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of this compute capability, as far as torch says."""

    def pretend(capability, name="Tesla T4", driver=13000):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(_cuda, "missing", lambda device: None)
        monkeypatch.setattr(_backend, "_said", set())
        _gpu.no_bf16.cache_clear()

    yield pretend
    _gpu.no_bf16.cache_clear()


@pytest.fixture
def old_driver(monkeypatch):
    def init():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_bf16_below_8_0_is_refused(name, gpu):
    gpu((7, 5))
    with pytest.raises(_backend.BackendError) as e:
        _backend.choose(name, GPU, F32, BF16)
    for word in (f"backend '{name}'", "bfloat16", "8.0", "Tesla T4", "7.5", "float16 or float32"):
        assert word in str(e.value)
    assert _backend.choose(name, GPU, F16, F32) == name
    gpu((8, 0))
    assert _backend.choose(name, GPU, BF16) == name


def test_bf16_below_8_0_runs_as_torch_unasked(gpu, caplog):
    gpu((7, 5))
    assert _backend.choose(None, GPU, BF16) == "torch"
    assert _backend.choose(None, GPU, BF16) == "torch"
    assert caplog.text.count("compute capability 8.0") == 1
    assert _backend.choose(None, GPU, F32) == "triton"


def fake_nvcc(folder, release, monkeypatch):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setattr(_compile, "find_compiler", lambda: _compile.Compiler(["c++"], "c++ 13"))


@pytest.mark.parametrize(
    ("release", "targets", "needed"),
    [
        ("11.8", ("80",), "12.0"),
        ("12.4", ("80", "90"), None),
        ("12.4", ("90", "120"), "12.8"),
        ("12.8", _cuda_build.FAT, None),
        ("12.8", ("121",), "12.9"),
        ("?", ("80",), None),  # the compilation will say
    ],
)
def test_an_nvcc_that_is_too_old_is_refused(release, targets, needed, tmp_path, monkeypatch):
    fake_nvcc(tmp_path, release, monkeypatch)
    if needed is None:
        assert _cuda_build._tools(targets)[0] == str(tmp_path / "bin" / "nvcc")
        return
    with pytest.raises(_compile.NativeError) as e:
        _cuda_build.build(targets)
    for word in (f"nvcc {release}", needed, "CUDA_HOME", "backend='triton'"):
        assert word in str(e.value)
    assert _cuda_build.find(targets) is None


def test_a_driver_older_than_the_runtime_of_nvcc_is_refused(tmp_path, monkeypatch, gpu):
    fake_nvcc(tmp_path, "13.0", monkeypatch)
    gpu((8, 0), "A100", driver=12080)
    with pytest.raises(_compile.NativeError) as e:
        _cuda_build.build(("80",))
    for word in ("driver is for CUDA 12.8", "nvcc 13.0", "update the driver", "12.x"):
        assert word in str(e.value)
    gpu((8, 0), "A100", driver=13010)
    assert _cuda_build._tools(("80",))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_driver_too_old_for_torch_is_one_line(name, old_driver, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("VGKERN_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr(_cuda, "_outcome", None)
    devices = [torch.device("cpu"), *([GPU] if name == "cuda" else [])]
    for device in devices:
        with pytest.raises(_backend.BackendError) as e:
            _backend.choose(name, device, F32)
        for word in ("driver for CUDA 11.4", "too old", torch.__version__, "13.0", "update the"):
            assert word in str(e.value)
        assert "\n" not in str(e.value)
    assert main(["doctor"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("gpu ")]
    assert "driver for CUDA 11.4 is too old" in line and "update the driver" in line


def test_doctor_says_why_there_is_no_gpu_without_a_warning():
    code = "import sys; from vgkern.__main__ import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "\ngpu " in done.stdout and "Traceback" not in done.stderr


def test_doctor_says_that_bf16_does_not_run(gpu, capsys):
    gpu((7, 0), "V100")
    assert _gpu.status()["gpu"] == "V100 (7.0)"
    assert main(["doctor"]) == 0
    assert "bfloat16 needs compute capability 8.0" in capsys.readouterr().out


def test_doctor_says_what_nvcc_is_too_old_for(tmp_path, monkeypatch, gpu):
    fake_nvcc(tmp_path, "12.4", monkeypatch)
    assert _cuda_build.nvcc_status() == f"{tmp_path}/bin/nvcc (12.4)"
    gpu((12, 0), "B", driver=12080)
    assert "older than compute capability 12.0 needs, 12.8" in _cuda_build.nvcc_status()
