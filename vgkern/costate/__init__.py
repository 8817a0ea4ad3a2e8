"""Costates: the gradient of the value at an input, carried backward through what was sampled."""

from vgkern.costate.hops import Hops, hops
from vgkern.costate.mix import Mix, Weights
from vgkern.costate.teacher import TeacherForced, teacher_forced

__all__ = ["Hops", "Mix", "TeacherForced", "Weights", "hops", "teacher_forced"]
