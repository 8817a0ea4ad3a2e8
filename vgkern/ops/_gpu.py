"""What a GPU, its driver and nvcc must be for our kernels: each lack is one line with its remedy.

Nothing here starts CUDA on a machine where torch sees a GPU, but for `driver_problem`, which asks
only where it sees none.
"""

import functools
import re
import subprocess
import warnings

import torch

BF16_SINCE = (8, 0)  # compute capability: Ampere
NVCC_SINCE = (12, 0)  # -std=c++20
# nvcc knows these compute capabilities from that version on (release notes of CUDA).
NVCC_FOR = {"100": (12, 8), "101": (12, 8), "120": (12, 8), "103": (12, 9), "121": (12, 9)}


def sees_gpu() -> bool:
    """torch.cuda.is_available(), without its warning: `driver_problem` has it in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def driver_problem() -> str | None:
    """Why a driver that is there cannot run this torch, with the remedy; None without a driver."""
    if torch.version.cuda is None or sees_gpu():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        said = str(e)
        if "driver" in said and ("too old" in said or "insufficient" in said):
            found = re.search(r"found version (\d+)", said)
            has = f" for CUDA {_dotted(int(found.group(1)))}" if found else ""
            return (
                f"the NVIDIA driver{has} is too old for torch {torch.__version__}, which needs "
                f"CUDA {torch.version.cuda}; update the driver, or install a torch for the "
                "driver's CUDA (https://pytorch.org/get-started/locally)"
            )
    return None


def no_gpu() -> str:
    """Why torch sees no GPU."""
    if problem := driver_problem():
        return problem
    if torch.version.cuda is None and not torch.version.hip:
        return f"torch {torch.__version__} is a CPU build; use backend='cpu' or 'torch'"
    return "torch sees no GPU; use backend='cpu' or 'torch'"


@functools.cache  # asked at every call of an op
def no_bf16(device: torch.device) -> str | None:
    """Why bf16 tensors of `device` cannot go to a kernel; None where they can, or it is no GPU."""
    if device.type != "cuda" or torch.version.hip or not sees_gpu():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= BF16_SINCE:
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    return (
        f"bfloat16 needs compute capability 8.0 or newer, and {name} ({device}) has "
        f"{major}.{minor}; use float16 or float32, or backend='torch'"
    )


def nvcc_version(nvcc: str) -> tuple[str, tuple[int, int] | None]:
    """(all that `nvcc --version` says, its release; None where it does not say one)."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\brelease (\d+)\.(\d+)", said)
    return said, (int(found.group(1)), int(found.group(2))) if found else None


def nvcc_problem(
    nvcc: str, release: tuple[int, int] | None, targets: tuple[str, ...]
) -> str | None:
    """Why this nvcc cannot compile for these compute capabilities, or what it compiles cannot run
    on the driver that is there."""
    if release is None:
        return None  # the compilation will say what is wrong
    own = f"nvcc {release[0]}.{release[1]} ({nvcc})"
    since = max([NVCC_SINCE, *(NVCC_FOR.get(t, NVCC_SINCE) for t in targets)])
    if release < since:
        newer = [t for t in targets if NVCC_FOR.get(t, NVCC_SINCE) == since]
        what = f"compute capability {', '.join(f'{t[:-1]}.{t[-1]}' for t in newer)}"
        if since == NVCC_SINCE:
            what = "C++20"
        return (
            f"{own} is older than {what} needs, {since[0]}.{since[1]}; install that CUDA toolkit "
            "or set CUDA_HOME to one, or use backend='triton'"
        )
    driver = driver_version()
    if driver and driver[0] < release[0]:  # within one major version the runtime is compatible
        return (
            f"the NVIDIA driver is for CUDA {driver[0]}.{driver[1]}, too old for the runtime of "
            f"{own}; update the driver, set CUDA_HOME to a toolkit {driver[0]}.x, or use "
            "backend='triton'"
        )
    return None


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, where torch sees a GPU."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    version = ask() if ask is not None and sees_gpu() else 0
    return (version // 1000, version % 1000 // 10) if version else None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def status() -> dict[str, str]:
    """What `python -m vgkern doctor` says of GPUs."""
    if not sees_gpu():
        return {"gpu": f"none: {no_gpu()}"}
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} ({major}.{minor})")
    found = {"gpu": ", ".join(names)}
    if torch.version.hip is None:
        old = [r for i in range(len(names)) if (r := no_bf16(torch.device("cuda", i)))]
        if old:
            found["bf16"] = old[0]
    return found
