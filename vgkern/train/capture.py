"""A step of a GPU recorded once, with every address in it, and replayed as one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """`step`, recorded as a CUDA graph without being run. It has run before: what is compiled or
    allocated the first time is there. Its tensors are those of now: it reads and writes the same
    addresses whenever it is replayed, so whoever calls it fills buffers and never replaces them.

    Raises what a recording raises: a wait of the host, a library that cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
