"""Facts: one line of JSON each, on disk as soon as it is known.

    phase, op, backend, dtype, shape, metric, value, floor, ok, why

`ok` is true or false of a check and null of a measurement: a time never fails. `floor` is what the
value is held to: the bound of a check, or the time or rate below which the machine cannot be.
"""

import json
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = {v: k for k, v in DTYPES.items()}
WHY = 300  # characters


class Facts:
    def __init__(self, path: Path, phase: str) -> None:
        self.file, self.phase = path.open("a"), phase

    def fact(
        self, op: str, metric: str, value: Any = None, *, backend: str = "", dtype: str = "",
        shape: str = "", floor: float | None = None, ok: bool | None = None, why: str = "",
    ) -> None:  # fmt: skip
        line = {
            "phase": self.phase, "op": op, "backend": backend, "dtype": dtype, "shape": shape,
            "metric": metric, "value": plain(value), "floor": plain(floor), "ok": ok,
            "why": " ".join(why.split())[:WHY],
        }  # fmt: skip
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def check(self, op: str, metric: str, measure: Callable[[], tuple], **at: Any) -> bool:
        """measure() -> (value, ok) or (value, ok, why). What it raises is a failed check."""
        try:
            value, ok, why = (*measure(), "")[:3]
        except Exception as error:
            traceback.print_exc()
            value, ok, why = None, False, said(error)
        self.fact(op, metric, value, ok=None if ok is None else bool(ok), why=why, **at)
        return bool(ok)


def plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null stands for them."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])}"


def read(path: Path) -> list[dict[str, Any]]:
    """The facts of a file; a line that a killed process left half written is passed over."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
