"""`metrics.jsonl`, and one line of progress with the time left."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from .track import Tracker


class Log:
    """Every record is one whole line of JSON, on disk as soon as it is written, or as soon as a
    disk that was full takes it."""

    def __init__(self, folder: Path, stream: TextIO | None = None, place: Any = None) -> None:
        """place: what `place` said when a state was saved; the log goes on from there."""
        self.folder = folder
        self.stream = sys.stderr if stream is None else stream
        self.start = time.perf_counter()
        self.passing = False  # the line on screen may be overwritten
        self.records: list[dict[str, Any]] = []
        self.waiting = ""  # what the disk did not take
        self.tracker: Tracker | None = None
        if place is None:
            self.file = (folder / "metrics.jsonl").open("xb", buffering=0)
            return
        size, seconds = place
        self.file = (folder / "metrics.jsonl").open("r+b", buffering=0)
        self.records = [_unplain(json.loads(line)) for line in self.file.read(size).splitlines()]
        self.file.truncate(self.file.seek(size))
        self.start -= seconds

    def place(self) -> tuple[int, float]:
        """Bytes written, seconds passed."""
        return self.file.tell(), round(time.perf_counter() - self.start, 3)

    def record(self, kind: str, **values: Any) -> None:
        entry = {"kind": kind, "time": round(time.perf_counter() - self.start, 3), **values}
        self.records.append(entry)
        if self.tracker is not None:
            self.tracker.send(kind, values)
        warned, self.waiting = bool(self.waiting), self.waiting + json.dumps(
            {k: _plain(v) for k, v in entry.items()}
        ) + "\n"  # fmt: skip
        size = self.file.tell()
        try:
            left = memoryview(self.waiting.encode())
            while left:
                left = left[self.file.write(left) :]
            self.waiting = ""
        except OSError as error:
            self.file.truncate(self.file.seek(size))  # no half a line
            if not warned:
                self.line(f"warning: metrics.jsonl: {error.strerror}; going on")

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
        if self.tracker is not None:
            self.tracker.close()


def _unplain(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in entry.items()}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; null stands for them."""
    if isinstance(value, float):
        return round(value, 8) if math.isfinite(value) else None
    return value


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
