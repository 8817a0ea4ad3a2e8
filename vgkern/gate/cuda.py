"""Every kernel of csrc/*.cu, compiled by nvcc and read like the Triton ones.

The block is as large as `__launch_bounds__` allows, which every kernel has to say. Shared memory
whose size the launcher chooses counts as 48 KiB, the most that a launch gets without asking.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from vgkern.gate.cubin import inspect, spills
from vgkern.gate.row import Row
from vgkern.ops import _compile, _cuda_build

DYNAMIC = 48 * 1024
FLAGS = _cuda_build._NVCC_FLAGS
find_nvcc = _cuda_build.find_nvcc


def sources(folder: Path = _compile.SOURCES) -> list[Path]:
    return sorted(folder.glob("*.cu"))


def version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return f"nvcc {found.group(1) if found else '?'}"


def kernels(source: Path) -> dict[str, bool]:
    """{name: whether the launcher chooses the size of its shared memory} of a source file."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", source.read_text(), flags=re.S)
    text = re.sub(r"__launch_bounds__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)", "", text)
    starts = list(re.finditer(r"__global__\s+(?:static\s+)?void\s+(\w+)\s*\(", text))
    ends = [m.start() for m in starts[1:]] + [len(text)]
    dynamic = re.compile(r"VG_DYNAMIC_SHARED|extern\s+__shared__")
    return {
        m.group(1): bool(dynamic.search(text, m.start(), end))
        for m, end in zip(starts, ends, strict=True)
    }


def compile_source(source: Path, arch: int, nvcc: str, cache: Path) -> list[Row]:
    """One row for each kernel and each of its template instances; one row if nvcc refuses."""
    names, said = kernels(source), version(nvcc)
    made_of = [said, str(arch), *FLAGS, source.name]
    made_of += [p.read_text() for p in sorted(source.parent.glob("*.[ch]*"))]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:32]
    cubin = cache / f"{source.stem}-sm_{arch}-{key}.cubin"
    if not cubin.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            new = Path(work) / "out.cubin"
            command = [nvcc, "-cubin", f"-arch=sm_{arch}", *FLAGS, "-Xptxas=-v", "-o", str(new)]
            command.append(str(source))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                errors = [s for s in done.stderr.splitlines() if "error" in s] or [done.stderr]
                return [Row.broken(source.name, source.name, arch, f"nvcc: {errors[0]}", said)]
            cubin.with_suffix(".txt").write_text(done.stderr)
            new.replace(cubin)
    spilled = spills(cubin.with_suffix(".txt").read_text())
    rows = []
    for mangled, resources in inspect([cubin.read_bytes()], arch, cache)[0].items():
        name = next((n for n in names if f"{len(n)}{n}" in mangled), mangled)
        faults = [] if resources.threads else ["no __launch_bounds__"]
        rows.append(
            Row.of(
                kernel=name,
                launch=f"{source.name} {_template(mangled)}".strip(),
                arch=arch,
                compiler=said,
                resources=resources,
                spills=spilled[mangled],
                warps=-(-(resources.threads or 1024) // 32),
                shared=DYNAMIC if names.get(name) else 0,
                faults=faults,
            )
        )
    return rows


def _template(mangled: str) -> str:
    """`<float, 4>` of a kernel's instance; its mangled name where there is no c++filt."""
    if (tool := shutil.which("c++filt")) is None:
        return mangled
    name = subprocess.run([tool, mangled], capture_output=True, text=True).stdout
    found = re.search(r"<[^()]*>(?=\()", name)
    return (
        found.group(0).replace("__nv_bfloat16", "bf16").replace("__half", "half") if found else ""
    )
