"""Costates: the gradient of the value at an input, carried backward through what was sampled."""

from vgkern.costate.analytic import Teacher, analytic_loss, future_advantages
from vgkern.costate.replay import replay_agreement

__all__ = ["Teacher", "analytic_loss", "future_advantages", "replay_agreement"]
