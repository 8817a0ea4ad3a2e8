"""Phase 7: some steps of the trainer on the device; their metrics as train.csv."""

import csv
import dataclasses
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vgkern.gpu.device import Phase
from vgkern.gpu.record import said

KEPT = ("step", "reward", "sampler_gap", "replay", "ms_rollout", "ms_score", "ms_update", "tokens")
SMALL: dict[str, Any] = {
    "width": 16, "layers": 1, "heads": 2, "mlp": 16, "warm_target": 0.0, "steps": 2, "prompts": 2,
    "group": 2, "eval_prompts": 2, "eval_every": 2,
}  # fmt: skip
REAL: dict[str, Any] = {
    "width": 576, "layers": 30, "heads": 9, "mlp": 1536, "warm_target": 0.0, "steps": 20,
    "prompts": 32, "group": 8, "eval_prompts": 64, "eval_every": 20, "dtype": "bf16",
}  # fmt: skip


def run(phase: Phase) -> None:
    from vgkern.train.config import Config

    table = phase.out / "train.csv"
    has = "device" in {f.name for f in dataclasses.fields(Config)}
    if not has and not phase.dry:
        why = "the trainer has no device yet: it runs on a CPU"
        phase.fact("train", "steps", why=why)
        table.write_text(f"skipped\n{why}\n")
        return
    folder = phase.out / "train.tmp"
    if find_spec("safetensors") is None:  # of the extra `train`
        phase.fact("train", "steps", why="safetensors, which the trainer needs, is not installed")
        table.write_text("skipped\nno safetensors\n")
        return
    options = {**(SMALL if phase.dry else REAL), "out": str(folder)}
    if has:
        options["device"] = phase.device.type
    try:
        phase.check("train", "steps", lambda: steps(options, folder, table))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told(phase, table)


def steps(options: dict[str, Any], folder: Path, table: Path) -> tuple:
    from vgkern.train.config import Config
    from vgkern.train.run import train

    why = ""
    try:
        train(Config(**options))
    except Exception as error:  # what it had done by then is kept
        why = said(error)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    made = [r for r in map(json.loads, lines) if r["kind"] == "step"]
    columns = [k for k in KEPT if any(k in r for r in made)]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(made)
    return len(made), not why and len(made) == options["steps"], why


def told(phase: Phase, table: Path) -> None:
    """The last step's metrics as facts."""
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    for name in KEPT[1:]:
        if rows and rows[-1].get(name):
            phase.fact("train", name, float(rows[-1][name]))
