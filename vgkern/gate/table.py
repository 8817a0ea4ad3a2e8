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
    """The rows as an aligned table, each broken limit in a line below its row."""
    head = ("kernel", "launch", "arch", "regs", "spill", "smem", "warps", "occ", "limited by",
            "tensor cores", "loads (bits x count)")  # fmt: skip
    lines: list[tuple[str, ...] | str] = [head]
    for r in sorted(rows, key=lambda r: (r.compiler, r.kernel, r.launch, r.arch)):
        lines.append((
            r.kernel, r.launch, str(r.arch), str(r.registers),
            str(r.spills) + (f"+{r.local}" if r.local else ""), str(r.shared), str(r.warps),
            f"{r.occupancy:.2f}", r.limited_by, _counts(r.tensor) or "-", _counts(r.loads),
        ))  # fmt: skip
        lines += [f"    BROKEN: {problem}" for problem in r.problems]
    cells = [line for line in lines if not isinstance(line, str)]
    widths = [max(len(c[i]) for c in cells) for i in range(len(head))]
    right = {2, 3, 4, 5, 6, 7}
    return "\n".join(
        line
        if isinstance(line, str)
        else "  ".join(
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _counts(found: dict[str, int]) -> str:
    order = sorted(found, key=lambda k: (not k.isdigit(), -int(k) if k.isdigit() else 0, k))
    return " ".join(f"{k}x{found[k]}" for k in order)
