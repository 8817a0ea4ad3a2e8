"""SIGINT and SIGTERM end a run at the next edge of a step, where nothing is lost."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from vgkern.errors import RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(RunError):
    """A signal ended the run; the message says how it goes on. `status` is the exit status."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.status = 128 + number


class Interruption:
    """While it is on, the first signal is remembered, and a second one acts as it always did."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python lets no other
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()

    def end(self, where: str, saved: Path | None) -> None:
        if self.signal is None:
            return
        name = signal.Signals(self.signal).name
        text = f"go on with: python -m vgkern train --resume {saved}"
        if saved is None:
            text = "no state of it could be saved"
        raise Stopped(f"{name} after {where}; {text}", self.signal)
