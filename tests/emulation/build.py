"""Builds csrc/*.cu and their binding with a C++ compiler, to run on the host (cuda_on_host.h)."""

import os
from pathlib import Path

from vgkern.ops import _compile, _cuda_build

HEADER = Path(__file__).with_name("cuda_on_host.h")
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing",
         "-DVG_EMULATED", "-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess"]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
            "-fno-omit-frame-pointer"]  # fmt: skip


def headers() -> Path | None:
    """Where the CUDA headers are: beside nvcc, or in /usr/local/cuda; None where they are not."""
    nvcc = _cuda_build.find_nvcc()
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    roots.append(str(Path(nvcc).resolve().parent.parent) if nvcc else None)
    folders = [Path(r) / "include" for r in roots if r]
    return next((f for f in folders if (f / "cuda_bf16.h").is_file()), None)


def missing() -> str | None:
    """Why the emulation cannot be built here."""
    if _compile.find_compiler() is None:
        return "no C++ compiler"
    if headers() is None:
        return "no CUDA headers (CUDA_HOME, /usr/local/cuda)"
    return None


def compile_command(source: Path, to: Path, *more: str) -> list[str]:
    compiler, include = _compile.find_compiler(), headers()
    assert compiler is not None and include is not None
    flags = [*FLAGS, *more, "-isystem", str(include), "-include", str(HEADER)]
    return [*compiler.command, *flags, "-x", "c++", "-c", str(source), "-o", str(to)]


def build(sanitize: bool = False) -> Path:
    """The library, made once into the cache of vgkern."""
    compiler = _compile.find_compiler()
    assert compiler is not None
    more = SANITIZE if sanitize else []

    def make(source: Path, work: Path) -> Path:
        include, link = _compile._torch_flags(compiler)
        jobs = [
            compile_command(p, work / f"{p.name}.o", *more) for p in sorted(source.glob("*.cu"))
        ]
        jobs.append(_cuda_build.binding_command(
            compiler, source, work, include, "-DVG_EMULATED", *more
        ))  # fmt: skip
        _cuda_build.run_all(jobs, work)
        library = work / "library.so"
        objects = [job[-1] for job in jobs]
        command = [*compiler.command, "-shared", *more, *objects, *link, "-o", str(library)]
        _cuda_build.run_all([command], work)
        return library

    what = [compiler.version, HEADER.read_text(), str(headers()), *FLAGS, *more]
    return _cuda_build.kept("emulated", what, make)
