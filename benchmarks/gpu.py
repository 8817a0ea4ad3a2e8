"""Everything that only a GPU can say, in one run of nine minutes: `make gpu OUT=dir`.

    python3 benchmarks/gpu.py --out DIR [--budget 540] [--phases smoke,timing] [--resume]
    python3 benchmarks/gpu.py --out DIR --dry        every phase at toy size, without a GPU
    python3 benchmarks/gpu.py report DIR             keep its results under benchmarks/results/
    python3 benchmarks/gpu.py readme                 the sections of the pages, from those results

It needs python3 with torch, and nvcc for the CUDA kernels: no network, no installation. Each phase
is a process (`python3 -m vgkern.gpu PHASE`) in a process group of its own, killed at its time
limit; one that crashes or hangs costs itself only. DIR gets gpu.jsonl (a line a fact, written as it
is found), table.txt (written anew after every phase), log.txt, and by the phases kernels.json,
pytest.xml, profile.json and train.csv. Ends with 0 if and only if every check held.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_report  # noqa: E402  beside this file; the standard library only

NO_GPU = 3  # of a phase: torch sees no GPU
SPARE = 15  # seconds kept for what comes after a phase
LEAST = 3  # with less no phase begins
LOG_BYTES = 8 << 20
DRY_LIMIT = 300


class Phase(NamedTuple):
    name: str
    limit: float  # seconds
    beside: bool = False  # it runs beside the one before it
    command: tuple[str, ...] = ()  # instead of its module: for tests


# In order of value: a run that is cut short has learnt most.
PHASES = (
    Phase("facts", 40), Phase("build", 90, beside=True), Phase("smoke", 60), Phase("tokens", 50),
    Phase("timing", 130), Phase("graphs", 60), Phase("parity", 100), Phase("train", 50),
    Phase("profile", 40),
)  # fmt: skip
FIRST_HALF = ("facts", "build", "smoke", "tokens", "timing")
WHOLE = 400  # seconds; a smaller budget does the first half


class Run:
    def __init__(self, out: Path, budget: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.end = time.monotonic() + budget
        self.live: list[subprocess.Popen] = []
        self.no_gpu = False
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.facts = out / "gpu.jsonl"

    def left(self) -> float:
        return self.end - time.monotonic()

    def fact(self, phase: str, metric: str, value: object, ok: bool | None, why: str = "") -> None:
        line = gpu_report.fact(phase, metric, value, ok, why)
        with self.lock, self.facts.open("ab+") as file:
            end = file.tell()
            file.seek(max(end - 1, 0))
            half = end > 0 and file.read(1) != b"\n"  # by a phase that was killed
            file.write(b"\n" * half + json.dumps(line).encode() + b"\n")

    def start(self, resume: bool, phases: list[Phase]) -> list[Phase]:
        """What is left to do; facts of what will be done again are dropped."""
        known = gpu_report.read(self.facts) if resume else []
        done = {f["phase"] for f in known if f["metric"] == "phase" and f["ok"]}
        kept = [f for f in known if f["phase"] in done or f["phase"] not in names(phases)]
        self.facts.write_text("".join(json.dumps(f) + "\n" for f in kept))
        if not resume:
            (self.out / "log.txt").write_text("")
        return [p for p in phases if p.name not in done]

    def all(self, phases: list[Phase], cache: Path | None) -> None:
        env = environment(self.dry, cache)
        groups: list[list[Phase]] = []
        for phase in phases:
            if phase.beside and groups:
                groups[-1].append(phase)
            else:
                groups.append([phase])
        for group in groups:
            threads = [threading.Thread(target=self.one, args=(p, env)) for p in group]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.table()
            if self.no_gpu:
                return

    def one(self, phase: Phase, env: dict[str, str]) -> None:
        limit = min(phase.limit, self.left() - SPARE)
        if limit < LEAST:
            self.fact(phase.name, "phase", None, False, "not begun: no time left")
            return
        print(f"== {phase.name}, {limit:.0f} s at most", flush=True)
        command = [sys.executable, "-m", "vgkern.gpu", phase.name, "--out", str(self.out)]
        command += ["--limit", f"{limit:.1f}", *["--dry"] * self.dry]
        command = list(phase.command) or command
        began = time.monotonic()
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"== {phase.name}\n".encode())
            log.flush()
            at = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, cwd=ROOT,
                                       stderr=subprocess.STDOUT, env=env,
                                       start_new_session=True)  # fmt: skip
            self.live.append(process)
            why = self.wait(process, limit)
        self.no_gpu = self.no_gpu or process.returncode == NO_GPU
        if process.returncode and not why:
            why = f"{ended(process.returncode)}; {self.last_line(at)}"
        self.fact(phase.name, "phase", round(time.monotonic() - began, 1), not why, why)
        if not phase.command:
            self.missing(phase.name)

    def wait(self, process: subprocess.Popen, limit: float) -> str:
        """ "" or why it was killed; nothing of its group is left."""
        end, why = time.monotonic() + limit, ""
        log = self.out / "log.txt"
        while process.poll() is None:
            if time.monotonic() > end:
                why = f"killed at its limit of {limit:.0f} s"
                break
            if log.stat().st_size > 2 * LOG_BYTES:
                why = f"killed: it wrote more than {2 * LOG_BYTES >> 20} MiB to the log"
                break
            time.sleep(0.05)
        kill(process)
        if log.stat().st_size > LOG_BYTES:
            os.truncate(log, LOG_BYTES)
        return why

    def last_line(self, at: int) -> str:
        data = (self.out / "log.txt").read_bytes()[at:]
        lines = [x.strip() for x in data.decode(errors="replace").splitlines() if x.strip()]
        return lines[-1][:200] if lines else "it said nothing"

    def missing(self, phase: str) -> None:
        """A phase that ends well and measured less than it has to is a failure too."""
        there = {gpu_report.name_of(f) for f in gpu_report.read(self.facts)}
        gone = [n for n in gpu_report.expected(phase) if n not in there]
        if gone:
            self.fact(phase, "missing", len(gone), False, "never measured: " + "; ".join(gone))

    def table(self) -> None:
        text = gpu_report.table(gpu_report.read(self.facts), self.dry)
        (self.out / "table.txt").write_text(text)

    def stop(self) -> None:
        for process in self.live:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """The whole group: workers of a phase too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver does not let go
        process.wait(10)


def ended(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"ended with {status}"


def names(phases: list[Phase]) -> set[str]:
    return {p.name for p in phases}


def environment(dry: bool, cache: Path | None) -> dict[str, str]:
    gone = ("TRITON_INTERPRET", "VGKERN_BACKEND", "VGKERN_CUDA_LIBRARY")
    env = {k: v for k, v in os.environ.items() if k not in gone}
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(p for p in path if p), "PYTHONUNBUFFERED": "1"}
    env |= {"OMP_NUM_THREADS": "1" if dry else "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if dry:
        env["TRITON_INTERPRET"] = "1"
    if cache is not None:
        for name, folder in (("TRITON_CACHE_DIR", "triton"), ("VGKERN_CACHE", "vgkern"),
                             ("TORCHINDUCTOR_CACHE_DIR", "inductor")):  # fmt: skip
            env[name] = str(cache / folder)
            (cache / folder).mkdir(mode=0o700, exist_ok=True)
    return env


def cache_of(out: Path) -> Path:
    """A private folder for what is compiled, the same when a run is resumed."""
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"vgkern-gpu-{os.getuid()}-{name}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="vgkern-gpu-"))
    return folder


def unable() -> str:
    """Why nothing can be measured here, in one line."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch"
    if not Path("/proc/driver/nvidia").exists() and shutil.which("nvidia-smi") is None:
        return "this machine has no NVIDIA GPU (`make gpu-dry` tries the run itself without one)"
    return ""


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in gpu_report.COMMANDS:
        return gpu_report.COMMANDS[given[0]](*given[1:])
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=540, help="seconds; 200: the first half")
    parser.add_argument("--phases", default="", help=",".join(p.name for p in PHASES))
    parser.add_argument(
        "--resume", action="store_true", help="leave out the phases that ended well"
    )
    parser.add_argument("--dry", action="store_true", help="toy sizes, without a GPU")
    asked = parser.parse_args(given)
    wanted = [x for x in asked.phases.split(",") if x]
    if unknown := sorted(set(wanted) - names(list(PHASES))):
        parser.error(f"--phases: got {', '.join(unknown)}; allowed: {[p.name for p in PHASES]}")
    if not wanted:
        wanted = list(FIRST_HALF) if asked.budget < WHOLE else [p.name for p in PHASES]
    if not asked.dry and (why := unable()):
        print(f"make gpu: {why}", file=sys.stderr)
        return 2
    phases = [p for p in PHASES if p.name in wanted]
    if asked.dry:
        phases = [p._replace(limit=DRY_LIMIT, beside=False) for p in phases]
    return run(asked.out, phases, 3600 if asked.dry else asked.budget, asked.dry, asked.resume)


def run(out: Path, phases: list[Phase], budget: float, dry: bool, resume: bool = False) -> int:
    it = Run(out, budget, dry)
    cache = None if dry else cache_of(out)
    try:
        it.all(it.start(resume, phases), cache)
    except KeyboardInterrupt:
        it.fact("run", "phase", None, False, "interrupted")
    finally:
        it.stop()
        for folder in out.glob("*.tmp"):  # of a phase that was killed
            shutil.rmtree(folder, ignore_errors=True)
        it.table()
    if it.no_gpu:
        print("make gpu: torch sees no GPU on this machine", file=sys.stderr)
        return 2
    bad = [f for f in gpu_report.read(it.facts) if f["ok"] is False]
    if not bad and cache is not None:
        shutil.rmtree(cache, ignore_errors=True)
    print(gpu_report.summary(gpu_report.read(it.facts)))
    print(f"{out / 'table.txt'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
