"""`metrics.jsonl`, and one line of progress with the time left."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO


class Log:
    """Every record is one whole line of JSON, on disk as soon as it is written."""

    def __init__(self, folder: Path, stream: TextIO | None = None) -> None:
        self.file = (folder / "metrics.jsonl").open("x")
        self.stream = sys.stderr if stream is None else stream
        self.start = time.perf_counter()
        self.passing = False  # the line on screen may be overwritten
        self.records: list[dict[str, Any]] = []

    def record(self, kind: str, **values: Any) -> None:
        entry = {"kind": kind, "time": round(time.perf_counter() - self.start, 3), **values}
        self.records.append(entry)
        self.file.write(json.dumps({k: _plain(v) for k, v in entry.items()}) + "\n")
        self.file.flush()

    def line(self, text: str) -> None:
        """A line that stays."""
        self.stream.write(("\r\x1b[2K" if self.passing else "") + text + "\n")
        self.stream.flush()
        self.passing = False

    def progress(self, text: str) -> None:
        """A line that the next one replaces; nothing where there is no terminal."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[2K" + text)
            self.stream.flush()
            self.passing = True

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def close(self) -> None:
        self.file.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; null stands for them."""
    if isinstance(value, float):
        return round(value, 8) if math.isfinite(value) else None
    return value


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
