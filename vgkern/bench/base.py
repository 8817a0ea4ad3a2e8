"""`--base REF`: this working tree against another commit, A B A B, each in a process of its own.

The commit is checked out by `git worktree` into a temporary folder and builds its own native
kernels (the cache keeps them). Both processes live for the whole run and take turns at samples; one
that dies costs the row it was at, and the next row has a new one.
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

from . import machine, record, roof
from .clock import Call, Timing, paired
from .compare import NOISES
from .plan import Options, plan, roof_types
from .rivals import DEFAULT
from .run import clock_for
from .table import duration
from .work import Work

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
LIMIT = 20.0  # seconds of one group


class Failed(Exception):
    """A process could not do what it was asked; the message is which one and what it said."""

    def __init__(self, side: str, why: str) -> None:
        super().__init__(f"{side}: {why}")
        self.side = side


class Process:
    """One version of the code; calling it takes a sample."""

    def __init__(self, side: str, tree: Path, backend: str) -> None:
        self.side, self.tree, self.backend = side, tree, backend
        self.open()

    def open(self) -> None:
        path = [str(self.tree)]
        path += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), self.backend], cwd=self.tree, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            where = self.ask("hello", threads=torch.get_num_threads())["where"]
            if Path(where).resolve() != (self.tree / "vgkern").resolve():
                raise Failed(self.side, f"its process has vgkern from {where}")
        except Failed:
            self.close()
            raise

    def start(self, work: Work, device: torch.device) -> None:
        if self.process.poll() is not None:  # it died at an earlier row
            self.close()
            self.open()
        self.ask("start", work=vars(work), device=device.type)

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(self.side, f"its process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(self.side, answer["error"])
        return answer

    def __call__(self) -> None:
        raise TypeError("sampled by RemoteClock")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # an order that a dead one never read
            self.process.stdin.close()
        self.process.stdout.close()
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


def run(ref: str, options: Options, threshold: float, out: Path) -> int:
    """Prints this / base for every group and keeps it in `out`/base.json, row by row. 1 when a row
    is beyond the threshold and the noise, or fails in this tree only; 2 without any row."""
    device, clock = options.device, clock_for(options.device)
    backend = (options.backends or DEFAULT[device.type])[0]
    alone = Options(**{**vars(options), "rivals": (), "backends": (backend,)})
    rates = roof.measure(device, clock, roof_types(options), 0.5)
    works = [w for w in plan(alone, rates, machine.free_bytes(device) / 2) if w.sweep != "rows"]
    found: dict[str, Any] = {"machine": machine.machine(device), "versions": machine.versions()}
    rows = found["rows"] = []
    with checkout(ref) as (tree, commit), contextlib.ExitStack() as stack:
        print(f"this tree against {ref} ({commit[:9]}), vgkern {backend}, {device.type}")
        found["base"], sides = commit, {}
        for name, where in (("base", tree), ("this", ROOT)):
            try:
                sides[name] = Process(name, where, backend)
            except Failed as why:
                raise ValueError(f"--base: {why}") from why
            stack.callback(sides[name].close)
        print(f"  {'':<70}{'base':>9}{'this':>9}{'ratio':>7}{'noise':>7}", flush=True)
        for work in works:
            rows.append(_one(work, sides, alone, threshold))
            record.write(out / "base.json", found)
    timed = [r for r in rows if "failed" not in r]
    worse = sum(r["slower"] for r in timed)
    print(f"{len(timed)} groups, {worse} slower by more than {threshold:.2f}x and the noise")
    if len(timed) < len(rows):
        print(f"{len(rows) - len(timed)} failed")
    if rows:
        print(f"written: {out / 'base.json'}")
    return 2 if not timed else int(worse > 0 or any(r.get("side") == "this" for r in rows))


def _one(
    work: Work, sides: dict[str, Process], options: Options, threshold: float
) -> dict[str, Any]:
    """The row: its times, or which side failed and why."""
    runs: dict[str, Sequence[Call]] = {k: [side] for k, side in sides.items()}
    try:
        for side in sides.values():  # the base first: what it lacks is no failure of this tree
            side.start(work, options.device)
        times = paired(runs, "base", RemoteClock(options.device), 2 * options.rounds, LIMIT)
    except Failed as why:
        print(f"  {work!s:<70} failed, {why}", flush=True)
        return {**vars(work), "failed": str(why), "side": why.side}
    this: Timing = times["this"]
    slower = this.ratio > max(threshold, 1 + NOISES * this.noise)
    print(
        f"  {work!s:<70}{duration(times['base'].seconds):>9}{duration(this.seconds):>9}"
        f"{this.ratio:>7.2f}{100 * this.noise:>6.0f}%{'  SLOWER' if slower else ''}", flush=True
    )  # fmt: skip
    seconds = {"seconds": this.seconds, "base_seconds": times["base"].seconds}
    found = {"ratio": this.ratio, "noise": this.noise, "rounds": this.rounds, "slower": slower}
    return {**vars(work), **seconds, **found}
