"""torch's operators on a GPU: which of them launch, how often, and what they move.

An operator is one launch that reads its operands and writes its results, but for those named here.
The numbers are those of ATen's CUDA sources (torch 2.11 to 2.13); cuBLAS may add a launch where it
splits a long product, which is not counted. What the host waits for is in `WAITS`.
"""

from typing import Any

from torch import Tensor

from vgkern.gate.traffic.moved import Moved, elements, nbytes

ALLOCATE = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view",
    "lift", "lift_fresh", "lift_fresh_copy", "set_", "resize_", "record_stream",
}  # fmt: skip
WAITS = {"nonzero", "_local_scalar_dense", "item", "masked_select", "equal"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot"}
WRITE_ONLY = {"copy_", "fill_", "zero_", "index_copy_"}  # of what they are called on
GATHER = {"index_select", "index", "gather", "embedding"}
SCATTER = {"index_copy_", "index_put_", "index_add_", "scatter_"}
COPIES_FIRST = {"masked_fill", "index_copy", "index_put", "index_add", "index_fill", "scatter"}
SMALL_SORT = 4096  # elements that one block sorts
TIMES = {
    "nonzero": 3,  # count, select, turn into indices
    "cumsum": 2,  # the state of the scan, the scan
    "searchsorted": 1,
    "index_put_": 10,  # with accumulate: a sort, and a sum of runs
}


def name_of(func: Any) -> str:
    return str(func._schema.name.split("::")[1])


def launches(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """0 for views and allocations, and for results without elements."""
    name = name_of(func)
    returns = func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if view or name in ALLOCATE or func.namespace != "aten":
        return 0
    if name == "_local_scalar_dense":
        return 1  # the copy to the host
    if not any(x.numel() for x in (outputs or inputs)):
        return 0
    if name == "sort":
        # values and indices laid out, then one block's sort, or eight passes of a radix sort with
        # its histogram and offsets
        return 3 if inputs[0].numel() <= SMALL_SORT else 12
    return TIMES.get(name, 2 if name in COPIES_FIRST else 1)


def moved(func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Moved:
    """`inputs` are on the device; those that are only written are left out here."""
    name = name_of(func)
    if name in PRODUCTS:
        return _product(name, args, outputs)
    written_only = [kwargs.get(a.name) for a in func._schema.arguments if a.is_out]
    if name in WRITE_ONLY:
        written_only.append(args[0])
    if name.startswith("new_") or name.endswith("_like"):
        written_only += args[:1]  # a shape
    read = {id(x): x for x in inputs if all(x is not o for o in written_only)}
    taken, made = nbytes(*read.values()), nbytes(*outputs)
    if name in GATHER:
        index = [x for x in read.values() if not x.dtype.is_floating_point]
        return Moved(made + nbytes(*index), made)
    if name in SCATTER:
        source = nbytes(inputs[-1])
        return Moved(nbytes(*inputs[1:]) + (source if name == "index_add_" else 0), source)
    if name in COPIES_FIRST:
        return Moved(taken + made, 2 * made)
    if name == "sort" and inputs[0].numel() > SMALL_SORT:
        return Moved(8 * (taken + made), 8 * made)
    if name == "nonzero":
        return Moved(2 * taken + made, 2 * made)
    return Moved(taken, made)


def _product(name: str, args: Any, outputs: list[Tensor]) -> Moved:
    added = [args[0]] if name.startswith("add") or name == "baddbmm" else []
    a, b = args[len(added) : len(added) + 2]
    flops = 2 * elements(a) * (b.shape[-1] if b.ndim > 1 else 1)
    if name in ("bmm", "baddbmm"):
        flops = 2 * a.numel() * b.shape[-1]
    return Moved(nbytes(*added, a, b), nbytes(*outputs), flops, a.element_size())
