"""Costates: the gradient of the value at an input, carried backward through what was sampled."""

from vgkern.costate import impact
from vgkern.costate.analytic import Teacher, analytic_loss, future_advantages
from vgkern.costate.figure import draw_costates
from vgkern.costate.hops import Hops, hops
from vgkern.costate.mix import Mix, Weights
from vgkern.costate.probe import Probe, ProbeResult, probe
from vgkern.costate.replay import replay_agreement
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
from vgkern.costate.teacher import TeacherForced, teacher_forced

__all__ = [
    "LEAST",
    "CostateGram",
    "Estimate",
    "Hops",
    "Mix",
    "Probe",
    "ProbeResult",
    "Signal",
    "Teacher",
    "TeacherForced",
    "Weights",
    "analytic_loss",
    "draw_costates",
    "future_advantages",
    "headroom",
    "hops",
    "impact",
    "over_groups",
    "probe",
    "replay_agreement",
    "sampling_gap",
    "teacher_forced",
    "value_gradient_signal",
]
