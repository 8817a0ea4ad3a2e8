"""Costates: the gradient of the value at an input, carried backward through what was sampled."""
