"""`--base REF`: this working tree against another commit, A B A B, each in a process of its own.

The commit is checked out by `git worktree` into a temporary folder and builds its own native
kernels (the cache keeps them). Both processes live for the whole run and take turns at samples.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, roof
from .clock import Call, Timing, paired
from .compare import NOISES
from .plan import Options, plan, roof_types
from .rivals import DEFAULT
from .run import clock_for, say
from .table import duration
from .work import Work

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 20.0  # seconds of one group


class Failed(Exception):
    """A process could not do what it was asked; the message is what it said."""


class Process:
    """One version of the code; calling it takes a sample."""

    def __init__(self, tree: Path, backend: str) -> None:
        path = [str(tree)] + [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        worker = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(worker), backend], cwd=tree, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"its process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def __call__(self) -> None:
        raise TypeError("sampled by RemoteClock")

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class RemoteClock:
    name = "wall"

    def __init__(self, device: torch.device) -> None:
        self.now = clock_for(device).now

    def sample(self, runs: Sequence[Call], calls: int) -> float:
        process: Any = runs[0]
        return float(process.ask("sample", calls=calls)["seconds"])


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[tuple[Path, str]]:
    """(folder, commit) of the ref, in a worktree that is gone afterwards."""
    commit = machine.git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if not commit:
        raise ValueError(f"--base: got {ref!r}; allowed: a commit of the git checkout in {ROOT}")
    with tempfile.TemporaryDirectory(prefix="vgkern-base-") as folder:
        tree = Path(folder) / "vgkern-base"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run(
            [*git, "add", "--quiet", "--detach", str(tree), commit], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"--base: git worktree: {done.stderr.strip()}")
        try:
            yield tree, commit
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True)


def run(ref: str, options: Options, threshold: float, out: Path | None = None) -> int:
    """Prints this / base for every group; 1 beyond the threshold and the noise, 2 without any."""
    device, clock = options.device, clock_for(options.device)
    backend = (options.backends or DEFAULT[device.type])[0]
    alone = Options(**{**vars(options), "rivals": (), "backends": (backend,)})
    rates = roof.measure(device, clock, roof_types(options), 0.5)
    works = [w for w in plan(alone, rates, machine.free_bytes(device) / 2) if w.sweep != "rows"]
    with checkout(ref) as (tree, commit), contextlib.ExitStack() as stack:
        print(f"this tree against {ref} ({commit[:9]}), vgkern {backend}, {device.type}")
        sides = {"base": Process(tree, backend), "this": Process(ROOT, backend)}
        for name, side in sides.items():
            stack.callback(side.close)
            where = Path(side.ask("hello", threads=torch.get_num_threads())["where"])
            if where.resolve() != ((tree if name == "base" else ROOT) / "vgkern").resolve():
                raise ValueError(f"--base: the process of {name} has vgkern from {where}")
        print(f"  {'':<70}{'base':>9}{'this':>9}{'ratio':>7}{'noise':>7}", flush=True)
        rows = []
        for work in works:
            if (row := _one(work, sides, alone, threshold)) is not None:
                rows.append(row)
    worse = sum(r["slower"] for r in rows)
    print(f"{len(rows)} groups, {worse} slower by more than {threshold:.2f}x and the noise")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        found = {"base": commit, "machine": machine.machine(device), "rows": rows}
        found["versions"] = machine.versions()
        (out / "base.json").write_text(json.dumps(found, indent=1) + "\n")
    return 2 if not rows else int(worse > 0)


def _one(
    work: Work, sides: dict[str, Process], options: Options, threshold: float
) -> dict[str, Any] | None:
    for name, side in sides.items():
        try:
            side.ask("start", work=vars(work), device=options.device.type)
        except Failed as why:
            say(f"  {work}: {name}: {why}")
            return None
    runs: dict[str, Sequence[Call]] = {k: [side] for k, side in sides.items()}
    times = paired(runs, "base", RemoteClock(options.device), 2 * options.rounds, LIMIT)
    this: Timing = times["this"]
    slower = this.ratio > max(threshold, 1 + NOISES * this.noise)
    print(
        f"  {work!s:<70}{duration(times['base'].seconds):>9}{duration(this.seconds):>9}"
        f"{this.ratio:>7.2f}{100 * this.noise:>6.0f}%{'  SLOWER' if slower else ''}", flush=True
    )  # fmt: skip
    seconds = {"seconds": this.seconds, "base_seconds": times["base"].seconds}
    found = {"ratio": this.ratio, "noise": this.noise, "rounds": this.rounds, "slower": slower}
    return {**vars(work), **seconds, **found}
