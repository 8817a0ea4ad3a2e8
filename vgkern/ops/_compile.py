"""What the native library is made of, and how a compiler and ninja make it."""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# Ascending: objects are linked in this order, and of an inline function that several objects
# contain the linker keeps the first copy, which must be one that runs on every CPU.
_VARIANTS = {
    "x86_64": {
        "base": [],
        "v3": ["-march=x86-64-v3"],
        "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
}
_CPU_FEATURES = {
    "v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe",
}
# Variables through which a shell could change what is compiled or how ninja runs.
_DROPPED_ENV = {
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "GCC_EXEC_PREFIX",
    "COMPILER_PATH", "NINJA_STATUS", "MAKEFLAGS", "MFLAGS",
}  # fmt: skip


class NativeError(RuntimeError):
    """Why there are no native kernels, and the remedy."""


class Compiler(NamedTuple):
    command: list[str]
    version: str  # the first line of its --version


def _variants() -> dict[str, list[str]]:
    return _VARIANTS.get(platform.machine(), {"base": []})


def _torch_flags(compiler: Compiler) -> tuple[list[str], list[str]]:
    """Compiler and linker flags of this torch (no Python headers: the operators need none)."""
    root = Path(torch.__file__).resolve().parent
    flags = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    for folder in ("include", "include/torch/csrc/api/include"):
        flags += ["-isystem", str(root / folder)]
    # One pool of threads: g++'s OpenMP runtime is the one that torch ships, where it ships one.
    openmp = [str(p) for p in sorted((root / "lib").glob("libgomp*.so*"))[:1]]
    if not openmp or "clang" in compiler.version:
        openmp = ["-fopenmp"]
    return flags, ["-pthread", *openmp, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def source_files(folder: Path) -> list[Path]:
    """What the CPU library is made of: all but the files of the CUDA kernels (_cuda_build.py)."""
    files = sorted(p for p in folder.glob("*") if p.suffix in (".cpp", ".h"))
    if not (files := [p for p in files if p.name != "bindings_cuda.cpp"]):
        raise NativeError(f"no C++ sources in {folder}; install vgkern again")
    return files


def source_key(folder: Path) -> str:
    """A hash of all that the library is made from, save the compiler."""
    what = [torch.__version__, str(torch.version.git_version), platform.machine()]
    what += [*_FLAGS, json.dumps(_variants())]
    digest = hashlib.sha256("\0".join(what).encode())
    for path in source_files(folder):
        digest.update(f"\0{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]


def _units(folder: Path, variants: dict[str, list[str]]) -> list[tuple[Path, str, list[str]]]:
    """(source, object stem, flags) of every translation unit, in link order."""
    have = [f"-DVG_HAVE_{name.upper()}" for name in variants if name != "base"]
    sources = [p for p in source_files(folder) if p.suffix == ".cpp"]
    units = [(p, p.stem, have) for p in sources if not p.name.startswith("isa_")]
    for name, flags in variants.items():
        for p in sources:
            if p.name.startswith("isa_"):
                units.append((p, f"{p.stem}.{name}", [*have, f"-DVG_ISA={name}", *flags]))
    return units


def find_compiler() -> Compiler | None:
    """$CXX, or the first of the usual names; None when the machine has none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) is None:
            continue
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True)
        if shown.returncode == 0 and shown.stdout:
            return Compiler(command, shown.stdout.splitlines()[0])
    if asked:
        raise NativeError(
            f"CXX={shlex.join(asked)!r} does not run; unset CXX or name a C++ compiler"
        )
    return None


def _accepts(compiler: Compiler, flags: list[str]) -> bool:
    probe = [*compiler.command, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


def find_ninja() -> str | None:
    """Of the PyPI package, or on the PATH."""
    if (spec := importlib.util.find_spec("ninja")) is not None and spec.origin:
        import ninja

        if (own := Path(ninja.BIN_DIR) / "ninja").exists():
            return str(own)
    return shutil.which("ninja")


def cpu_isa() -> str:
    """The newest variant that this CPU runs."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.split())
                names = [n for n in ("v4", "v3") if set(_CPU_FEATURES[n].split()) <= flags]
                return names[0] if names else "base"
    return "base"


def say(text: str) -> None:
    print(f"vgkern: {text}", file=sys.stderr, flush=True)


def compile_library(
    source: Path,
    work: Path,
    objects: Path,
    log: Path,
    compiler: Compiler,
    ninja: str,
    verbose: bool,
) -> Path:
    """Compile `source` in `work`. Objects are kept in `objects`: an edit recompiles one file."""
    variants = {n: f for n, f in _variants().items() if not f or _accepts(compiler, f)}
    torch_compile, torch_link = _torch_flags(compiler)
    shared = [*_FLAGS, *torch_compile]
    hashes = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in source_files(source)}
    common = [compiler.version, torch.__version__, str(torch.version.git_version), *shared]
    common += [h for p, h in hashes.items() if p.suffix == ".h"]
    rules, linked, missing = [], [], []
    for unit, stem, flags in _units(source, variants):
        made_of = "\0".join([*common, *flags, hashes[unit]])
        kept = objects / f"{stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.o"
        if kept.is_file():
            os.utime(kept)
            linked.append(kept)
        else:
            missing.append(kept)
            linked.append(work / kept.name)
            rules.append(f"build {_path(work / kept.name)}: cxx {_path(unit)}")
            rules.append(f"  flags = {_words(flags)}")
    library = work / "vgkern.so"
    shared += [f"-I{source}", f"-ffile-prefix-map={source}=csrc"]
    head = [
        "rule cxx",
        f"  command = {_words([*compiler.command, *shared])} $flags -c $in -o $out",
        "rule link",
        f"  command = {_words(compiler.command)} -shared -Wl,--no-undefined $in -o $out "
        + _words(torch_link),
    ]
    link = f"build {_path(library)}: link {' '.join(map(_path, linked))}"
    (work / "build.ninja").write_text("\n".join([*head, *rules, link]) + "\n")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(len(os.sched_getaffinity(0)), memory >> 30, len(missing)))
    say(f"building native kernels (once, about {2 + 10 * -(-len(missing) // jobs)} s) ...")
    began = time.monotonic()
    command = [ninja, "-C", str(work), "-j", str(jobs), *(["-v"] if verbose else [])]
    returned, lines = run(command, work, verbose)
    lines = [line.replace(str(source), str(SOURCES)) for line in lines]
    log.write_text("\n".join(lines) + "\n")
    for kept in missing:  # also of a failed build: what compiled is not compiled again
        if (made := work / kept.name).exists():
            shutil.copyfile(made, work / "copy")
            os.replace(work / "copy", kept)
    if returned != 0:
        told = [line[:200] for line in lines if line and not line.startswith(("[", "ninja: "))]
        raise NativeError(
            "the native kernels do not compile; the compiler's last lines:\n  "
            + "\n  ".join(told[-15:])
            + f"\nAll of it is in {log}. A C++20 compiler is needed (g++ 11 or newer): set CXX to "
            "one and run `python -m vgkern build`"
        )
    say(f"built native kernels in {time.monotonic() - began:.0f} s")
    return library


def run(command: list[str], work: Path, verbose: bool) -> tuple[int, list[str]]:
    """The exit status and the lines printed; `verbose` shows them as they come."""
    env = {k: v for k, v in os.environ.items() if k not in _DROPPED_ENV}
    env |= {"LC_ALL": "C", "TMPDIR": str(work)}
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if verbose:
                print(lines[-1], file=sys.stderr, flush=True)
    return process.returncode, lines


def _path(path: Path) -> str:
    """A path in a `build` line of ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(words: list[str]) -> str:
    """Words of a command in a variable of ninja, which hands it to a shell."""
    return shlex.join(words).replace("$", "$$")
