"""Rows, and the JSON file that holds a run."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Row:
    """One variant of one piece of work. None: not measured, or there is no such thing."""

    op: str
    shape: str
    dtype: str
    pass_: str
    rows: int  # that ran
    rows_of: int  # that the model trains on at once
    cut: str  # why they are fewer: "", "memory", "time", "given"
    hidden: int
    vocab: int
    share: float  # of rows that are active
    sweep: str
    variant: str
    seconds: float | None = None  # median of one call
    ratio: float | None = None  # to the base (vgkern's own choice here), median over rounds
    noise: float | None = None  # median distance of those ratios from it, as a share
    rounds: int = 0
    calls: int = 0  # in one sample
    clock: str = ""  # wall, events or graph
    flops: int = 0  # of an ideal kernel
    bytes: int = 0
    of_roof: float | None = None  # floor by this machine's copy and GEMM rate / seconds
    of_gemm: float | None = None  # bare products that cannot be avoided / seconds
    peak_mib: float | None = None  # peak extra memory, gradients included
    error: float | None = None  # largest relative difference to the base, of values and gradients
    note: str = ""

    @property
    def key(self) -> tuple:
        """What two runs must share for the row to be compared."""
        return (self.op, self.shape, self.dtype, self.pass_, self.rows, self.hidden, self.vocab,
                self.share, self.sweep, self.variant)  # fmt: skip


@dataclass
class Report:
    machine: dict[str, Any]
    versions: dict[str, str]
    roof: dict[str, float]  # bytes/s copied, flop/s by dtype
    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # what, why
    not_timed: dict[str, Any] = field(default_factory=dict)  # of GPUs, where there is none
    schema: int = SCHEMA

    def skip(self, what: str, why: str) -> None:
        if {"what": what, "why": why} not in self.skipped:
            self.skipped.append({"what": what, "why": why})

    def write(self, path: Path) -> None:
        write(path, dataclasses.asdict(self))


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON, at once: whoever reads sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def read(path: Path) -> Report:
    """Raises ValueError that names the file when it is not one of ours."""
    try:
        given = json.loads(path.read_text())
        if given.get("schema") != SCHEMA:
            raise ValueError(f"schema {given.get('schema')!r}; allowed: {SCHEMA}")
        rows = [Row(**row) for row in given.pop("rows")]
        return Report(rows=rows, **given)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of `python -m vgkern bench`: {error}") from error
