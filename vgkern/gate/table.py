"""The table of all kernels on several architectures: made by two processes at a time, and cached.

The answer for one architecture and one version of Triton is kept under a hash of everything that it
was made from. Triton's own cache is beside it, so that an edit recompiles one kernel.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vgkern.gate import cuda
from vgkern.gate.row import Row
from vgkern.ops import _native

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "3.6.0"  # the oldest Triton that pyproject.toml allows
JOBS = 2
WIDTH = 120  # of the table


def cache() -> Path:
    folder = Path(str(_native.status()["cache"])) / "gate"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def triton_folder() -> Path | None:
    """The folder that `import triton` is found in; None without one."""
    spec = importlib.util.find_spec("triton")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def oldest_triton() -> Path:
    """A folder with the oldest supported Triton, installed by pip into the cache the first time.

    Raises FileNotFoundError with pip's reason where it cannot.
    """
    folder = cache() / f"triton-{OLDEST}"
    if not (folder / "triton" / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--retries", "1", "--no-deps", "--target", str(folder), f"triton=={OLDEST}"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise FileNotFoundError(f"triton {OLDEST} is not in {folder}, and pip says: {why}")
    return folder


def triton_version(folder: Path) -> str:
    text = (folder / "triton" / "__init__.py").read_text()
    found = re.search(r"__version__ = '([\d.]+)", text)
    return found.group(1) if found else "?"


def triton_rows(folder: Path, archs: Iterable[int]) -> list[Row]:
    """Every launch, compiled by the Triton in `folder` for each architecture."""
    with ThreadPoolExecutor(JOBS) as pool:
        return [row for rows in pool.map(lambda a: _triton_rows(folder, a), archs) for row in rows]


def cached(folder: Path, arch: int) -> bool:
    """Whether `triton_rows` answers for this architecture without compiling."""
    version = triton_version(folder)
    return (cache() / f"triton-{version}-sm_{arch}-{_made_of(version)}.json").exists()


def cuda_rows(nvcc: str, archs: Iterable[int]) -> list[Row]:
    """Every kernel of csrc/*.cu for each architecture."""
    work = [(source, arch) for arch in archs for source in cuda.sources()]
    with ThreadPoolExecutor(JOBS) as pool:
        made = pool.map(lambda w: cuda.compile_source(w[0], w[1], nvcc, cache() / "cuda"), work)
        return [row for rows in made for row in rows]


def _triton_rows(folder: Path, arch: int) -> list[Row]:
    version = triton_version(folder)
    kept = cache() / f"triton-{version}-sm_{arch}-{_made_of(version)}.json"
    if not kept.exists():
        new = kept.with_name(f"{os.getpid()}-{arch}-{version}.json")
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        env["TRITON_CACHE_DIR"] = str(cache() / f"kernels-{version}")
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT.parent), env.get("PYTHONPATH", "")])
        if folder != triton_folder():
            env["PYTHONPATH"] = os.pathsep.join([str(folder), env["PYTHONPATH"]])
        command = [sys.executable, "-m", "vgkern.gate", str(arch), str(new)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(
                f"triton {version} for sm_{arch} ended with {done.returncode}: {said}"
            )
        rows = new.read_text()
        new.unlink()
        if kept.name.endswith(f"{_made_of(version)}.json"):  # not edited meanwhile
            kept.with_suffix(".part").write_text(rows)
            kept.with_suffix(".part").replace(kept)
        return [Row.from_json(fields) for fields in json.loads(rows)]
    return [Row.from_json(fields) for fields in json.loads(kept.read_text())]


def _made_of(version: str) -> str:
    files = [ROOT / "objectives.py"]
    for folder in ("gate", "kernels", "ops"):
        files += sorted((ROOT / folder).glob("*.py"))
    digest = hashlib.sha256(f"{version} {torch.__version__}".encode())
    for path in files:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def text(rows: Iterable[Row]) -> str:
    """The rows as an aligned table under the name of each kernel, at most WIDTH columns wide; a
    broken limit is a line below its row. `load` is the widest load of global memory, in bits or by
    name; the counts of all are in the JSON."""
    head = ("launch", "arch", "regs", "spill", "smem", "warps", "occ", "tensor", "load")
    rows = sorted(rows, key=lambda r: (r.compiler, r.kernel, r.launch, r.arch))
    cells = [_cells(r) for r in rows]
    widths = [max(len(c[i]) for c in [head, *cells]) for i in range(len(head))]
    widths[0] = min(widths[0], WIDTH - 2 - sum(w + 2 for w in widths[1:]))
    lines, kernel = [_line(head, widths)], ""
    for row, line in zip(rows, cells, strict=True):
        if row.kernel != kernel:
            lines.append(kernel := row.kernel)
        lines.append(_line(line, widths))
        lines += [f"    BROKEN: {problem}" for problem in row.problems]
    return "\n".join(lines)


def _cells(r: Row) -> tuple[str, ...]:
    spill = str(r.spills) + (f"+{r.local}" if r.local else "")
    figures = (r.arch, r.registers, spill, r.shared, r.warps, f"{r.occupancy:.2f}")
    tensor = max(r.tensor, key=lambda t: r.tensor[t], default="-")
    named = [name for name in r.loads if not name.isdigit()]
    widest = max((name for name in r.loads if name.isdigit()), key=int, default="-")
    return r.launch, *map(str, figures), tensor, named[0] if named else widest


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    launch, *rest = (c[:w] for c, w in zip(cells, widths, strict=True))
    figures = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
    return "  ".join(["  " + launch.ljust(widths[0]), *figures])
