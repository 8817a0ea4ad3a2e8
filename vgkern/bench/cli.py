"""`python -m vgkern bench`: the arguments, and what is written where."""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import compare, plots, table
from .machine import machine
from .plan import BUDGET, Options
from .record import read
from .rivals import NAMES
from .shapes import MODELS
from .work import CASES, DTYPES, OPS

DESCRIPTION = "time every op against bare GEMMs, PyTorch and the other libraries, on this machine"
SHAPES = (*MODELS, *(name for _, name in CASES))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m vgkern bench", description=DESCRIPTION,
        epilog="How to read it: docs/benchmark.md. Models: " + ", ".join(MODELS),
    )  # fmt: skip
    level = p.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="small shapes, fp32: under 2 minutes")
    level.add_argument("--full", action="store_true", help="every op, model, dtype: hours on a CPU")
    p.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    p.add_argument("--shape", nargs="+", choices=SHAPES, default=(), metavar="SHAPE",
                   help=", ".join(SHAPES))  # fmt: skip
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=(), help="default: fp32 and bf16")
    p.add_argument("--backend", nargs="+", choices=("torch", "cpu", "triton", "cuda"), default=(),
                   help="of vgkern; default: all of the device")  # fmt: skip
    p.add_argument("--rival", nargs="*", type=_rival, default=NAMES, metavar="NAME",
                   help=f"{', '.join(NAMES)}; none after --rival: vgkern alone")  # fmt: skip
    p.add_argument("--rows", type=int, default=0, help="of the ops with a head; default: what fits")
    p.add_argument("--budget", type=float, default=0.0, metavar="S",
                   help=f"seconds of measuring; {BUDGET['default']:.0f}")  # fmt: skip
    p.add_argument("--threads", type=int, default=0, help="of the CPU; default: torch's")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--out", type=Path, help="folder; default: runs/bench-<machine>-<time>")
    p.add_argument("--no-plots", action="store_true")
    p.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"),
                   help="two JSON files: B / A, row by row; runs nothing")  # fmt: skip
    p.add_argument("--base", metavar="REF", help="this code against a git ref, A B A B")
    p.add_argument("--threshold", type=float, default=compare.THRESHOLD, metavar="X",
                   help="--compare, --base: exit 1 beyond it; %(default)s")  # fmt: skip
    return p


def _rival(name: str) -> str:
    """Names compare without case and spaces: trl, torch-eager, "torch eager"."""
    for known in NAMES:
        if re.sub(r"\W", "", known.lower()) == re.sub(r"\W", "", name.lower()):
            return known
    raise argparse.ArgumentTypeError(f"got {name!r}; allowed: {', '.join(NAMES)}")


def options(given: argparse.Namespace) -> Options:
    name = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    level = "quick" if given.quick else "full" if given.full else "default"
    return Options(
        level, tuple(given.op), tuple(given.shape), tuple(given.dtype), tuple(given.backend),
        tuple(given.rival), given.rows, given.budget, torch.device(name)
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 for a regression beyond the threshold; 2 for what cannot run."""
    p = parser()
    given = p.parse_args(arguments)
    for name in ("rows", "budget", "threads"):
        if getattr(given, name) < 0:
            p.error(f"argument --{name}: got {getattr(given, name)}; allowed: from 0")
    if given.threshold < 1:
        p.error(f"argument --threshold: got {given.threshold}; allowed: from 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        p.error("argument --device: got cuda; torch finds no CUDA device")
    asked = options(given)
    out = given.out or folder(asked.device)
    path = out / ("base.json" if given.base else "bench.json")
    before = _stamp(path)
    try:
        if given.compare:
            a, b = (read(path) for path in given.compare)
            return compare.files(a, b, given.threshold)
        if given.threads:
            torch.set_num_threads(given.threads)
        if given.base:
            from . import base

            return base.run(given.base, asked, given.threshold, out)
        return _run(asked, out, not given.no_plots)
    except (ValueError, OSError) as error:
        print(f"vgkern bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nvgkern bench: interrupted; {_kept(path, before)}", file=sys.stderr)
        return 130


def _stamp(path: Path) -> tuple[int, int] | None:
    """What differs once the file is written anew."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _kept(path: Path, before: tuple[int, int] | None) -> str:
    if _stamp(path) == before:  # none, or one of an earlier run
        return "nothing was written"
    return f"{len(json.loads(path.read_text())['rows'])} rows are in {path}"


def folder(device: torch.device) -> Path:
    found = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", str(found.get("gpu", found["cpu"])).lower()).strip("-")
    return Path("runs") / f"bench-{name[:32].strip('-')}-{time.strftime('%Y%m%d-%H%M%S')}"


def _run(asked: Options, out: Path, draw: bool) -> int:
    from .run import run

    report = run(asked, out / "bench.json")
    shown = table.text(report)
    (out / "table.txt").write_text(shown + "\n")
    print(shown)
    drawn = plots.draw(report, out) if draw else "not asked for"
    print(f"\nwritten: {out}/bench.json, table.txt; plots: {drawn}")
    return 0 if report.rows else 2
