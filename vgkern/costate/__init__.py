"""Costates: the gradient of the value at an input, carried backward through what was sampled."""

from vgkern.costate.figure import draw_costates
from vgkern.costate.probe import Probe, ProbeResult, probe
from vgkern.costate.sampling_gap import sampling_gap
from vgkern.costate.signal import (
    LEAST,
    CostateGram,
    Estimate,
    Signal,
    headroom,
    over_groups,
    value_gradient_signal,
)

__all__ = [
    "LEAST",
    "CostateGram",
    "Estimate",
    "Probe",
    "ProbeResult",
    "Signal",
    "draw_costates",
    "headroom",
    "over_groups",
    "probe",
    "sampling_gap",
    "value_gradient_signal",
]
