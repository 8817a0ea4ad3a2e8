"""What hangs is ended by a clock."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TookTooLong(Exception):
    """What `limited` raises inside."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in what takes longer. 0, another thread than the main one, or a system
    without SIGALRM: no limit. Code that never comes back to Python cannot be ended."""
    main = threading.current_thread() is threading.main_thread()
    if not seconds or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, end)
    own = signal.setitimer(signal.ITIMER_REAL, seconds)  # somebody else's alarm goes on after this
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *own)
