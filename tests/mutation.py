"""How a test breaks an op on purpose."""


def reference(change):
    """`change(ref, *args)` in place of the reference of an op."""
    return lambda ref: lambda *a: change(ref, *a)


def scaled_gradient(x, by=1.01):
    """The value of x with a gradient that is off by a factor."""
    return x.detach() + by * (x - x.detach())
