"""gpu.jsonl to a table, to benchmarks/results/<gpu>/ and to the sections of two pages.

The standard library only: benchmarks/gpu.py writes the table also after a phase was killed.
"""

import functools
import json
import math
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"  # a few lines
PAGE = ROOT / "docs" / "gpu-status.md"  # all of it
BEGIN, END = "<!-- gpu: written by benchmarks/gpu.py readme -->", "<!-- /gpu -->"
Fact = dict[str, Any]
BASES = ("3 gemms", "2 gemms", "gemm", "copy", "logsumexp")  # what a time is divided by
OPTIONAL = ("kernel ", "train ", "ncu ")  # ops whose facts a run may lack


def fact(phase: str, metric: str, value: object, ok: bool | None, why: str = "") -> Fact:
    empty = dict.fromkeys(("op", "backend", "dtype", "shape"), "")
    said = " ".join(why.split())[:2000]
    return {"phase": phase, **empty, "metric": metric, "value": value, "floor": None, "ok": ok,
            "why": said}  # fmt: skip


def read(path: Path) -> list[Fact]:
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last line of a phase that was killed
    return found


def name_of(f: Fact) -> str:
    """What a fact is called, whatever its shape: a dry run has it too."""
    return " | ".join(str(f[k]) for k in ("phase", "op", "backend", "dtype", "metric"))


@functools.cache
def expected(phase: str) -> list[str]:
    """The names that a phase must have written."""
    text: str = runpy.run_path(str(ROOT / "vgkern/gpu/expected.py"))["EXPECTED"]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [line for line in lines if line.startswith(f"{phase} | ")]


@functools.cache
def predictions() -> list[dict[str, Any]]:
    return list(runpy.run_path(str(ROOT / "vgkern/gpu/predictions.py"))["PREDICTIONS"])


def predicted(f: Fact) -> float | None:
    keys = {"name": "op", "backend": "backend", "shape": "shape", "dtype": "dtype",
            "metric": "metric"}  # fmt: skip
    for p in predictions():
        if all(p[a] == f[b] for a, b in keys.items()):
            return float(p["predicted"])
    return None


# The table --------------------------------------------------------------------------------------


def summary(facts: list[Fact]) -> str:
    checks = [f for f in facts if f["ok"] is not None and f["metric"] != "phase"]
    bad = sum(not f["ok"] for f in checks)
    ended = [f for f in facts if f["metric"] == "phase"]
    text = f"{len(checks) - bad} of {len(checks)} checks hold"
    broken = [f"{f['phase']}: {f['why']}" for f in ended if not f["ok"]]
    return text + "".join(f"\nphase {line}" for line in broken)


def table(facts: list[Fact], dry: bool = False) -> str:
    of = {(f["op"], f["metric"]): f["value"] for f in facts if f["phase"] == "facts"}
    gpu = of.get(("machine", "gpu"), "unknown GPU")
    packages = ("torch", "triton", "nvcc", "driver")
    versions = [f"{k} {of.get(('version', k)) or of.get(('machine', k))}" for k in packages]
    lines = ["DRY RUN: toy sizes on a CPU, no value below means anything"] * dry
    lines += [f"{gpu}; {', '.join(versions)}", summary(facts), ""]
    for title, make in SECTIONS.items():
        if body := make(facts):
            lines += [title, *body, ""]
    return "\n".join(lines) + "\n"


def columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def number(value: object) -> str:
    if value is None or isinstance(value, str):
        return str(value or "-")
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def failures(facts: list[Fact]) -> list[str]:
    bad = [f for f in facts if f["ok"] is False]
    head = ["phase", "op", "backend", "dtype", "shape", "metric", "value", "why"]
    rows = [[number(f[k]) if k == "value" else str(f[k]) for k in head] for f in bad]
    return columns([head, *rows]) if rows else []


def phases(facts: list[Fact]) -> list[str]:
    rows = [["phase", "s", "", "why"]]
    for f in facts:
        if f["metric"] == "phase":
            rows.append([f["phase"], number(f["value"]), "ok" if f["ok"] else "FAILED", f["why"]])
    return columns(rows) if len(rows) > 1 else []


def held(facts: list[Fact]) -> list[str]:
    """Predictions beside their measurements."""
    rows = [["op", "backend", "shape", "metric", "predicted", "measured", "x", "", "source"]]
    for p in predictions():
        keys = {"op": p["name"], "backend": p["backend"], "shape": p["shape"],
                "dtype": p["dtype"], "metric": p["metric"]}  # fmt: skip
        found = [f for f in facts if all(f[k] == v for k, v in keys.items())]
        got = found[0]["value"] if found else None
        by, word = "-", "not measured"
        if got is not None:
            by, word = f"{got / p['predicted']:.2f}", "met" if got <= p["predicted"] else "MISSED"
        rows.append([p["name"], p["backend"], p["shape"], p["metric"], number(p["predicted"]),
                     number(got), by, word, p["source"]])  # fmt: skip
    return columns(rows)


def times(facts: list[Fact]) -> list[str]:
    """Each time beside its floor, the bare products, eager and what was predicted."""
    rows = [["op", "shape", "dtype", "variant", "ms", "device ms", "device x floor", "x base",
             "x eager", "predicted", "note"]]  # fmt: skip
    device = {key_of(f): f["value"] for f in facts
              if f["phase"] == "timing" and f["metric"] == "device_ms"}  # fmt: skip
    timed = [f for f in facts if f["phase"] == "timing" and f["metric"] == "ms"]
    for f in timed:
        block = {g["backend"]: g["value"] for g in timed
                 if all(g[k] == f[k] for k in ("op", "shape", "dtype"))}  # fmt: skip
        base = next((block[b] for b in BASES if block.get(b)), None)

        def over(other: float | None, ms: float | None = f["value"]) -> str:
            return f"{ms / other:.2f}" if ms and other else "-"

        there = device.get(key_of(f))
        rows.append([f["op"], f["shape"], f["dtype"], f["backend"], number(f["value"]),
                     number(there), over(f["floor"], there), over(base), over(block.get("eager")),
                     number(predicted(f)), f["why"]])  # fmt: skip
    return columns(rows) if len(rows) > 1 else []


def key_of(f: Fact) -> tuple:
    return f["op"], f["shape"], f["dtype"], f["backend"]


def others(facts: list[Fact]) -> list[str]:
    """What else the phase timing measured: GB/s, MiB, launches."""
    rows = [["op", "shape", "dtype", "variant", "metric", "value", "floor", "predicted", "note"]]
    for f in facts:
        if f["phase"] == "timing" and f["metric"] in ("GB/s", "peak_MiB", "launches"):
            rows.append([f["op"], f["shape"], f["dtype"], f["backend"], f["metric"],
                         number(f["value"]), number(f["floor"]), number(predicted(f)),
                         f["why"]])  # fmt: skip
    return columns(rows) if len(rows) > 1 else []


def checks(facts: list[Fact]) -> list[str]:
    """Errors against fp64 over eager's, worst first; then every other check."""
    seen = [f for f in facts if f["ok"] is not None or f["phase"] in ("smoke", "tokens", "graphs")]
    seen = [f for f in seen if f["phase"] not in ("timing",) and f["metric"] != "phase"]
    order = {"smoke": 0, "tokens": 1, "graphs": 2}

    def key(f: Fact) -> tuple:
        value = f["value"] if isinstance(f["value"], int | float) else 0
        return (order.get(f["phase"], 3), not f["metric"].startswith("error"), f["metric"], -value)

    head = ["phase", "op", "backend", "dtype", "shape", "metric", "value", "floor", "ok", "why"]
    rows = [[number(f[k]) if k in ("value", "floor") else str(f[k]) for k in head]
            for f in sorted(seen, key=key)]  # fmt: skip
    return columns([head, *rows]) if rows else []


def rest(facts: list[Fact]) -> list[str]:
    """Facts of the machine, of what was built, of the trainer, the profile."""
    head = ["phase", "op", "backend", "dtype", "shape", "metric", "value", "why"]
    mine = [f for f in facts if f["phase"] in ("facts", "build", "parity", "train", "profile")
            and f["metric"] != "phase"]  # fmt: skip
    rows = [[number(f[k]) if k == "value" else str(f[k]) for k in head] for f in mine]
    return columns([head, *rows]) if rows else []


SECTIONS: dict[str, Callable[[list[Fact]], list[str]]] = {
    "FAILED": failures, "PHASES": phases, "PREDICTED AND MEASURED": held,
    "TIMES (ms: the host's included; device ms: the host ahead; x base: over the products)": times,
    "BYTES, LAUNCHES, MEMORY": others, "CHECKS": checks, "MACHINE, BUILDS, PROFILE": rest,
}  # fmt: skip


# Results that are kept, and the pages -------------------------------------------------------------


def gpu_name(facts: list[Fact]) -> str:
    name = next((f["value"] for f in facts if (f["op"], f["metric"]) == ("machine", "gpu")), None)
    if not name or "dry run" in str(name):
        raise SystemExit("report: these facts name no GPU: a dry run's results are not kept")
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def report(out: str = "", *_: str) -> int:
    """benchmarks/results/<gpu>/{gpu.jsonl,table.txt} and the pages' sections, from a run."""
    source = Path(out)
    facts = read(source / "gpu.jsonl")
    if not facts:
        raise SystemExit(f"report: {source / 'gpu.jsonl'} has no facts; allowed: a folder of a run")
    folder = RESULTS / gpu_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "gpu.jsonl", folder / "gpu.jsonl")
    print(folder)
    return readme()


def readme(*_: str) -> int:
    """The tables of all kept results, and the sections of both pages from them."""
    for path in RESULTS.glob("*/gpu.jsonl"):
        path.with_name("table.txt").write_text(table(read(path)))
    README.write_text(with_section(README.read_text(), brief()))
    PAGE.write_text(with_section(PAGE.read_text(), section()))
    return 0


def with_section(page: str, text: str) -> str:
    before, _, after = page.partition(BEGIN)
    _, closed, after = after.partition(END)
    if not closed:
        raise SystemExit(f"a page: {BEGIN!r} and {END!r} are not both there")
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{after}"


WITHOUT = """\
**What is verified without a GPU**, on every change: the Triton kernels run interpreted, with bounds
and races checked, and the CUDA kernels run emulated on the host, under several schedules and under
the address and undefined-behaviour sanitizers, both held to the same error bound as every backend;
every kernel is compiled as its launcher would launch it for sm_80, sm_90, sm_100 and sm_120 (Triton
3.9 and 3.6, nvcc 13) under limits on registers, spills, shared memory, occupancy and tensor-core
instructions. `python -m vgkern doctor --kernels` prints that table on any machine; the table below
says what each check cannot see."""
NOTHING = """\
**No GPU has run this code yet, and no GPU timing is claimed.** On a machine with one,
`make gpu OUT=dir` measures everything in about 9 minutes (`BUDGET=200`: the first half): every op
against fp64 on the device, tokens equal across backends, CUDA graphs, streams, memory, and times
against the bare matrix products and the libraries that are installed. It needs `python3` with
torch, and nvcc, and no network; the result to read is `dir/table.txt`."""


def section(results: Path | None = None) -> str:
    """What was measured on each GPU, or that none was."""
    found = sorted((results or RESULTS).glob("*/gpu.jsonl"))
    if not found:
        return f"{NOTHING}\n\n{WITHOUT}"
    return "\n\n".join([*(measured(path) for path in found), WITHOUT])


BRIEF = """\
**Verified on every change, without a GPU**: the Triton kernels interpreted, the CUDA kernels
emulated, both held to the error bound of every backend, and every kernel compiled for sm_80, sm_90,
sm_100 and sm_120. **Not verified**: other GPUs than those named here, a trainer on one, several
GPUs, AMD and Intel. [docs/gpu-status.md](docs/gpu-status.md) has all of it, with its commands."""


def brief(results: Path | None = None) -> str:
    """The README's few lines: one sentence a GPU, and what was not verified."""
    found = sorted((results or RESULTS).glob("*/gpu.jsonl"))
    said = [sentence(read(path)) for path in found]
    return "\n\n".join([*(said or [NOTHING.partition(" On a machine")[0].strip()]), BRIEF])


def sentence(facts: list[Fact]) -> str:
    """How many checks hold on this GPU, and the loss at the largest shape beside plain PyTorch."""
    of = {(f["op"], f["metric"]): f["value"] for f in facts if f["phase"] == "facts"}
    gpu = of.get(("machine", "gpu"))
    text = f"**Measured on one {gpu}** (`make gpu OUT=dir`): {summary(facts).splitlines()[0]}."
    loss = [f for f in facts if f["phase"] == "timing" and f["op"] == "linear_policy_loss"]
    shapes = list(dict.fromkeys(f["shape"] for f in loss))
    if not shapes:
        return text
    shape = max(shapes, key=lambda s: math.prod(map(int, s.split("x"))))
    at = {(f["metric"], f["backend"]): f["value"] for f in loss if f["shape"] == shape}
    own, eager = at.get(("ms", "triton")), at.get(("ms", "eager"))
    if own and eager:
        text += (
            f"\nOne call of the loss at (N, H, V) = ({', '.join(shape.split('x'))}), bf16, takes"
            f" {number(own)} ms,\n{own / eager:.2f} of plain PyTorch's time"
        )
        memory, whole = at.get(("peak_MiB", "triton")), at.get(("peak_MiB", "eager"))
        text += f", in {memory / whole:.2f} of its memory." if memory and whole else "."
    return text


HEAD = (
    "`linear_policy_loss`, forward and backward, bf16, (N, H, V)", "ms", "on the device",
    "predicted", "x bare GEMMs", "eager / vgkern", "compile / vgkern", "Liger / vgkern",
    "peak extra MiB (eager)",
)  # fmt: skip


def measured(path: Path) -> str:
    facts = read(path)
    of = {(f["op"], f["metric"]): f["value"] for f in facts if f["phase"] == "facts"}
    where = f"benchmarks/results/{path.parent.name}/table.txt"
    versions = f"torch {of.get(('version', 'torch'))}, Triton {of.get(('version', 'triton'))}"
    lines = [
        f"**Measured on one {of.get(('machine', 'gpu'))}**, {versions}, by `make gpu OUT=dir`: "
        f"{summary(facts).splitlines()[0]}. All of it, with every failed check: `{where}`.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
    ]
    timed = [f for f in facts if f["phase"] == "timing"]
    loss = [f for f in timed if f["op"] == "linear_policy_loss"]
    others = [f for f in timed if f["op"] == "linear_policy_loss others"]
    profiled = [f for f in facts if f["phase"] == "profile"]
    for shape in dict.fromkeys(f["shape"] for f in loss):
        of_shape = [[f for f in x if f["shape"] == shape] for x in (loss, others, profiled)]
        lines.append(row_of(*of_shape, shape))
    failed = [f for f in facts if f["ok"] is False]
    if failed:
        told = "; ".join(dict.fromkeys(f"{f['op'] or f['phase']} {f['metric']}" for f in failed))
        lines += ["", f"Failed there: {told[:600]}."]
    return "\n".join(lines)


def row_of(facts: list[Fact], others: list[Fact], profiled: list[Fact], shape: str) -> str:
    ms = {f["backend"]: f["value"] for f in facts if f["metric"] == "ms"}
    beside = {f["backend"]: f["value"] for f in others if f["metric"] == "ms"}
    beside = beside or ms  # in turn with ours once more
    peak = {f["backend"]: f["value"] for f in facts if f["metric"] == "peak_MiB"}
    own = ms.get("triton")
    device = [f["value"] for f in (*facts, *profiled)
              if f["metric"] == "device_ms" and f["backend"] == "triton"]  # fmt: skip
    on_device = device[0] if device else None
    prediction = [predicted(f) for f in facts if f["metric"] == "ms" and f["backend"] == "triton"]

    def over(a: float | None, b: float | None) -> str:
        return f"{a / b:.2f}" if a and b else "-"

    cells = [
        f"({', '.join(shape.split('x'))})",
        number(own), number(on_device), number(prediction[0] if prediction else None),
        over(own, ms.get("3 gemms")), over(ms.get("eager"), own),
        *(over(beside.get(other), beside.get("triton")) for other in ("compile", "Liger")),
        f"{number(peak.get('triton'))} ({number(peak.get('eager'))})",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def names(out: str = "", *_: str) -> int:
    """vgkern/gpu/expected.py, from the facts of a dry run that is complete."""
    facts = [f for f in read(Path(out) / "gpu.jsonl") if f["metric"] not in ("phase", "missing")]
    kept = [f for f in facts if not f"{f['op']} ".startswith(OPTIONAL) or f["metric"] == "steps"]
    lines = "\n".join(dict.fromkeys(name_of(f) for f in kept))
    title = "What every run must have measured: phase | op | backend | dtype | metric."
    made = "Written by `benchmarks/gpu.py names DIR` from a dry run."
    text = f'"""{title}\n\n{made}\n"""\n\nEXPECTED = """\n{lines}\n"""\n'
    (ROOT / "vgkern/gpu/expected.py").write_text(text)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {"report": report, "readme": readme, "names": names}

if __name__ == "__main__":
    sys.exit(COMMANDS[sys.argv[1]](*sys.argv[2:]))
