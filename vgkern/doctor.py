"""`python -m vgkern doctor`: which backends run here, which do not and why, what to install.

Nothing is compiled for the answer: a library that is in the cache is loaded, else it is asked
whether it could be made.
"""

import importlib.util
import os
import sys
from typing import NamedTuple

import torch

from vgkern.ops import _cuda_build, _gpu, _library, _native

# what each part of the package imports, beside what vgkern depends on
PARTS = {
    "train": ("safetensors",),
    "pictures": ("matplotlib",),
    "--model, export": ("transformers", "safetensors", "tokenizers", "accelerate"),
    "reasoning_gym:NAME": ("reasoning_gym",),
}


class Answer(NamedTuple):
    """Of a backend: whether it runs here; what it is, or why it does not; what to do about it."""

    runs: bool
    why: str
    remedy: str = ""


def answers() -> dict[str, Answer]:
    return {
        "torch": Answer(True, "plain PyTorch, on any device"),
        "cpu": cpu(),
        "triton": triton(),
        "cuda": cuda(),
    }


def cpu() -> Answer:
    found = _native.status()
    if os.environ.get("VGKERN_NO_NATIVE", "0") not in ("", "0"):
        return Answer(False, "switched off by VGKERN_NO_NATIVE", "unset VGKERN_NO_NATIVE")
    if found["built"]:
        try:
            _native.load()
        except _native.NativeError as error:
            return Answer(False, str(error), "python -m vgkern build")
        return Answer(True, f"C++ kernels, instruction set {found['isa']}")
    if found["error"]:
        return Answer(False, found["error"])
    if found["compiler"] is None:
        return Answer(
            False, "no C++ compiler", "apt install g++, or your system's like; or set CXX to one"
        )
    if found["ninja"] is None:
        return Answer(False, "no ninja", "pip install ninja")
    return Answer(
        True, "C++ kernels, compiled at their first use (a minute)", "python -m vgkern build"
    )


def _no_nvidia() -> Answer | None:
    if _gpu.sees_gpu():
        return None
    why = _gpu.no_gpu().partition("; use backend")[0]
    if "too old" in why:
        return Answer(False, why)
    if torch.version.cuda is None and not torch.version.hip:
        remedy = "an NVIDIA GPU, and a CUDA build of torch (https://pytorch.org/get-started)"
        return Answer(False, why, remedy)
    return Answer(False, why, "an NVIDIA GPU and its driver; nvidia-smi should list it")


def triton() -> Answer:
    if importlib.util.find_spec("triton") is None:
        return Answer(False, "triton is not installed", "pip install triton")
    if _gpu.sees_gpu():
        return Answer(True, "Triton kernels")
    if _library.interpreted():
        return Answer(True, "Triton kernels, interpreted on the CPU: to debug, slow")
    missing = _no_nvidia()
    assert missing is not None
    return missing._replace(remedy=f"{missing.remedy}; to debug: TRITON_INTERPRET=1")


def cuda() -> Answer:
    if given := os.environ.get("VGKERN_CUDA_LIBRARY"):
        return Answer(True, f"the library that VGKERN_CUDA_LIBRARY names ({given})")
    if missing := _no_nvidia():
        return missing
    if torch.version.hip:
        return Answer(False, "the kernels are for NVIDIA GPUs", "backend='triton'")
    targets = _cuda_build.present()
    try:
        if _cuda_build.find(targets):
            return Answer(True, "CUDA kernels")
    except _native.NativeError as error:  # the cache
        return Answer(False, str(error))
    if (nvcc := _cuda_build.find_nvcc()) is None:
        return Answer(False, "no nvcc", "the CUDA toolkit; set CUDA_HOME to it")
    release = _gpu.nvcc_version(nvcc)[1]
    if problem := _gpu.nvcc_problem(nvcc, release, targets):
        return Answer(False, problem)
    how = "python -m vgkern build --cuda"
    return Answer(True, "CUDA kernels, compiled by nvcc at their first use", how)


def automatic(found: dict[str, Answer]) -> str:
    """What runs where nobody asks for a backend."""
    on_cpu = "cpu" if found["cpu"].runs else "torch"
    text = f"Unasked, tensors on a CPU take {on_cpu}"
    if _gpu.sees_gpu():
        text += f", on a GPU {'triton' if found['triton'].runs else 'torch'}"
    return f"{text}; backend=, vgkern.use_backend or VGKERN_BACKEND choose."


def absent() -> dict[str, list[str]]:
    """The packages that are missing, by the part of vgkern that needs them."""
    lack = {part: [p for p in packages if importlib.util.find_spec(p) is None]
            for part, packages in PARTS.items()}  # fmt: skip
    return {part: packages for part, packages in lack.items() if packages}


def text() -> str:
    """The answer; the details come after it."""
    found = answers()
    lines = []
    for title, runs in (("Runs here", True), ("Does not run here", False)):
        of = {name: a for name, a in found.items() if a.runs == runs}
        lines += [title] if of else []
        for name, a in of.items():
            lines.append(f"  {name:<8} {a.why}")
            if a.remedy:
                lines.append(f"  {'':<8} {'now' if runs else 'to have it'}: {a.remedy}")
    lines += [automatic(found), ""]
    if lack := absent():
        lines.append("Not installed, and needed only for")
        lines += [f"  {part:<18} pip install {' '.join(p)}" for part, p in lack.items()]
        lines.append("")
    return "\n".join(lines)


def details() -> str:
    found = {**_native.status(), **_gpu.status(), "nvcc": _cuda_build.nvcc_status()}
    found["torch"] = torch.__version__
    return "\n".join(f"{name:<12} {value}" for name, value in found.items())


def main() -> int:
    print(text())
    print("Details")
    try:
        print(details())
    except _native.NativeError as error:
        print(f"vgkern doctor: {error}", file=sys.stderr)
        return 1
    return 0
