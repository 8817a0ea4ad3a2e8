"""The time that follows from what is counted, on an H100: arithmetic, not a measurement.

The host hands a launch over every 5 us (a Triton launcher: every 20 us) and does not wait; the
device starts a launch when the one before has ended and the host has handed it over, and takes

    max(flops / 790e12, bytes / 3.0e12), and 2 us at least: to start and to drain

Rates are what large products and copies reach. fp32 factors are multiplied at 50e12 flops. What
the host waits for costs it 20 us more. Neither the start of Python and autograd is in it, nor that
a product with few rows or a tile with a heavy end reaches less than a large one does.
"""

from typing import NamedTuple

from vgkern.gate.traffic.count import Count, Launch

FLOPS = {2: 790e12, 4: 50e12, 8: 50e12}  # by bytes of a factor
BYTES = 3.0e12
HANDED = {"aten": 5e-6, "product": 5e-6, "cuda": 5e-6, "triton": 20e-6}  # seconds of the host
LEAST = 2e-6
WAIT = 20e-6


class Time(NamedTuple):
    total: float  # seconds
    device: float  # of them the device is at work

    @property
    def bound(self) -> str:
        return "host" if self.device < 0.5 * self.total else "device"


def device(launch: Launch) -> float:
    """Seconds on the device."""
    work = max(launch.moved.flops / FLOPS[launch.moved.size], launch.moved.bytes / BYTES)
    return max(work, launch.times * LEAST)


def time(count: Count) -> Time:
    host = end = busy = 0.0
    for launch in count.launched:
        host += launch.times * HANDED[launch.kind]
        if launch.waits:
            host = max(host, end) + WAIT
        took = device(launch)
        end = max(end, host) + took
        busy += took
    return Time(max(end, host), busy)
