"""Calls that are over a bar, and why: each may be so far over it and no further.

A line here is a debt: the gate fails where a call exceeds it, and where it is paid.
"""

from typing import NamedTuple

from vgkern.gate.traffic.calls import Call


class Known(NamedTuple):
    why: str
    ratio: float | None = None  # of the bytes to the minimum; None: within the bar
    launches: int | None = None
    peak: int | None = None


KNOWN: dict[tuple[str, str], Known] = {}


def known(call: Call, backend: str) -> Known | None:
    return KNOWN.get((call.name, backend))
