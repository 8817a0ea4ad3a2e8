"""csrc/*.cu and their binding to one library, by nvcc and a C++ compiler, in the private cache.

The kernels know nothing of torch and the binding uses torch's stable ABI, so a build takes seconds.
It is made at first use for the GPUs that are present, or ahead of time for all of `FAT`
(`python -m vgkern build --cuda`, which needs no GPU).
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vgkern.ops import _compile, _gpu, _native
from vgkern.ops._compile import NativeError

BINDING = "bindings_cuda.cpp"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # what the binding needs: torch 2.11
FAT = ("80", "90", "100", "120")
PTX = "90"  # and, for what comes after these, code that the driver compiles
_NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
_CXX_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]


def source_files(folder: Path) -> list[Path]:
    """Everything that the library is made from; objective.h is shared with the CPU library."""
    named = [folder / BINDING, folder / "objective.h", *folder.glob("*.cu"), *folder.glob("*.cuh")]
    return sorted(p for p in named if p.is_file())


def find_nvcc() -> str | None:
    """Of $CUDA_HOME or $CUDA_PATH, on the PATH, or in /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if (own := os.environ.get(name)) and (path := Path(own) / "bin" / "nvcc").is_file():
            return str(path)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def nvcc_status() -> str | None:
    """What `python -m vgkern doctor` says of nvcc: where, which, and what it is too old for."""
    if (nvcc := find_nvcc()) is None:
        return None
    _, release = _gpu.nvcc_version(nvcc)
    targets = present() if _gpu.sees_gpu() else ()
    which = f"{nvcc} ({release[0]}.{release[1]})" if release else nvcc
    problem = _gpu.nvcc_problem(nvcc, release, targets)
    return f"{which}: {problem}" if problem else which


def present() -> tuple[str, ...]:
    """Compute capabilities of the GPUs of this machine, such as ("90",)."""
    every = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return tuple(sorted({f"{major}{minor}" for major, minor in every}))


def find(targets: tuple[str, ...]) -> Path | None:
    """The library for these compute capabilities, if it is in the cache."""
    try:
        key = _key(_compile.SOURCES, _tools(targets)[2])
    except NativeError:
        return None
    cache = _native._cache_path()
    _native._check_cache(cache, create=False)
    library = cache / f"cuda-{key}.so"
    return library if _native._intact(library, key) else None


def _tools(targets: tuple[str, ...]) -> tuple[str, _compile.Compiler, list[str]]:
    """nvcc, the C++ compiler, and all that their output depends on beside the sources."""
    if (nvcc := find_nvcc()) is None:
        raise NativeError(
            "nvcc is not found (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda); install "
            "the CUDA toolkit or set CUDA_HOME, or use backend='triton'"
        )
    if (compiler := _compile.find_compiler()) is None:
        raise NativeError("no C++ compiler (looked for c++, g++, clang++); install g++ or set CXX")
    version, release = _gpu.nvcc_version(nvcc)
    if problem := _gpu.nvcc_problem(nvcc, release, targets):
        raise NativeError(problem)
    flags = [*_gencode(targets), *_NVCC_FLAGS, *_CXX_FLAGS]
    return nvcc, compiler, [version, compiler.version, *flags]


def _gencode(targets: tuple[str, ...]) -> list[str]:
    flags = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    return [*flags, f"-gencode=arch=compute_{PTX},code=compute_{PTX}"] if targets == FAT else flags


def build(targets: tuple[str, ...], verbose: bool = False, force: bool = False) -> Path:
    """The path of the library for these compute capabilities (`FAT`: PTX too), made if need be.

    Raises NativeError with the remedy: no nvcc or one older than 12.0 (12.8 for compute capability
    10.0 and 12.0, so for `FAT`), no C++ compiler, code that does not compile.
    """
    nvcc, compiler, what = _tools(targets)

    def make(source: Path, work: Path) -> Path:
        host = ["-ccbin", compiler.command[0]] if os.environ.get("CXX") else []
        include, _ = _compile._torch_flags(compiler)
        cuda = [nvcc, *_NVCC_FLAGS, *host, *_gencode(targets)]
        jobs = [[*cuda, "-c", str(p), "-o", str(work / f"{p.name}.o")] for p in source.glob("*.cu")]
        jobs.append(binding_command(compiler, source, work, include))
        run_all(jobs, work, verbose)
        torch_lib = Path(torch.__file__).resolve().parent / "lib"
        library = work / "library.so"
        objects = [job[-1] for job in jobs]
        link = [nvcc, "-shared", "-cudart=static", *host, *objects, f"-L{torch_lib}"]
        run_all([[*link, "-ltorch_cpu", "-lc10", "-o", str(library)]], work, verbose)
        return library

    return kept("cuda", what, make, force)


def binding_command(
    compiler: _compile.Compiler, source: Path, work: Path, include: list[str], *more: str
) -> list[str]:
    flags = [*_CXX_FLAGS, STABLE_ABI, *include, *more]
    return [*compiler.command, *flags, "-c", str(source / BINDING), "-o", str(work / "binding.o")]


def kept(
    name: str, what: list[str], make: Callable[[Path, Path], Path], force: bool = False
) -> Path:
    """The library `<name>-<hash>.so` of the cache; `make(source, work)` builds it if need be.

    The hash is of the sources, of torch and of `what`. `source` is a copy of csrc.
    """
    key = _key(_compile.SOURCES, what)
    cache = _native._cache_path()
    _native._check_cache(cache, create=False)
    if not force and _native._intact(cache / f"{name}-{key}.so", key):
        return cache / f"{name}-{key}.so"
    _native._check_cache(cache, create=True)
    with _native._locked(cache):
        if not force and _native._intact(cache / f"{name}-{key}.so", key):
            return cache / f"{name}-{key}.so"  # another process built it meanwhile
        work = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache))
        try:
            source = work / "csrc"
            source.mkdir()
            for path in source_files(_compile.SOURCES):
                shutil.copyfile(path, source / path.name)
            key = _key(source, what)
            library = cache / f"{name}-{key}.so"
            _native._keep(make(source, work), library, key)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        old = sorted(cache.glob(f"{name}-*.so"), key=lambda p: p.stat().st_mtime)[:-8]
        for path in [q for p in old for q in (p, p.with_suffix(".json"))]:
            path.unlink(missing_ok=True)
    return library


def _key(folder: Path, what: list[str]) -> str:
    digest = hashlib.sha256("\0".join([torch.__version__, *what]).encode())
    for path in source_files(folder):
        digest.update(f"\0{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]


def run_all(commands: list[list[str]], work: Path, verbose: bool = False) -> None:
    """Run these compilations side by side; NativeError with the last lines of one that fails."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for command, (status, lines) in zip(
            commands, pool.map(lambda c: _compile.run(c, work, verbose), commands), strict=True
        ):
            if status != 0:
                told = "\n  ".join(line[:200] for line in lines[-15:])
                raise NativeError(
                    f"the CUDA kernels do not compile; the last lines of {Path(command[0]).name}:\n"
                    f"  {told}\nUse backend='triton', or run `python -m vgkern build --cuda`"
                )
