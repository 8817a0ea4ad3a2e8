"""`python -m vgkern doctor` answers first: what runs, what does not and why, what to install."""

import importlib.util

import pytest
import torch

from vgkern import doctor
from vgkern.__main__ import main
from vgkern.ops import _backend, _gpu, _native

CPU = torch.device("cpu")
BUILT = {"built": False, "error": None, "isa": "v4", "compiler": "c++ (12)", "ninja": "ninja"}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(_gpu, "sees_gpu", lambda: False)
    monkeypatch.delenv("VGKERN_CUDA_LIBRARY", raising=False)


def test_the_answer_comes_before_the_details(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    order = ["Runs here", "  torch ", "Unasked, tensors on a CPU take ", "Details", "\ncompiler "]
    at = [out.index(words) for words in order]
    assert at == sorted(at) and at[0] == 0
    for name in _backend.BACKENDS:
        assert out.count(f"\n  {name:<8} ") == 1


def test_what_it_says_of_a_cpu_is_what_happens():
    runs = doctor.cpu().runs
    assert runs == (_backend._missing("cpu", CPU) is None)
    assert doctor.automatic(doctor.answers()).startswith(
        f"Unasked, tensors on a CPU take {_backend.choose(None, CPU, torch.float32)}"
    )


def test_without_a_gpu_it_says_what_would_be_needed(no_gpu, monkeypatch):
    monkeypatch.setattr(doctor._library, "interpreted", lambda: False)
    for answer in (doctor.cuda(), doctor.triton()):
        assert not answer.runs and answer.why and answer.remedy and "\n" not in answer.why
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "CPU build" in doctor.cuda().why and "CUDA build of torch" in doctor.cuda().remedy
    assert "backend=" not in doctor.cuda().why


@pytest.mark.parametrize(
    ("change", "why", "remedy"),
    [
        ({"compiler": None}, "no C++ compiler", "g++"),
        ({"ninja": None}, "no ninja", "pip install ninja"),
        ({"error": "the cache is open to others"}, "the cache is open", ""),
    ],
)
def test_what_a_cpu_lacks(monkeypatch, change, why, remedy):
    monkeypatch.delenv("VGKERN_NO_NATIVE", raising=False)
    monkeypatch.setattr(_native, "status", lambda: {**BUILT, **change})
    answer = doctor.cpu()
    assert not answer.runs and why in answer.why and remedy in answer.remedy
    assert "tensors on a CPU take torch" in doctor.automatic(doctor.answers())


def test_what_is_switched_off_says_so(monkeypatch):
    monkeypatch.setenv("VGKERN_NO_NATIVE", "1")
    assert not doctor.cpu().runs and "unset VGKERN_NO_NATIVE" in doctor.text()


def test_a_library_that_is_not_built_yet_is_no_reason_against(monkeypatch):
    monkeypatch.delenv("VGKERN_NO_NATIVE", raising=False)
    monkeypatch.setattr(_native, "status", lambda: BUILT)
    assert doctor.cpu().runs and "python -m vgkern build" in doctor.text()


def test_missing_packages_are_named_with_what_needs_them(monkeypatch):
    there = importlib.util.find_spec
    gone = {"triton", "safetensors", "reasoning_gym"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in gone else there(n))
    text = doctor.text()
    assert "pip install triton" in text and "pip install reasoning_gym" in text
    (line,) = [x for x in text.splitlines() if x.startswith("  train ")]
    assert line.endswith("pip install safetensors")
