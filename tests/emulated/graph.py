"""A stand-in for CUDA graphs on the emulated device: it records operators with the host's tensors
that they read and write, leaves no trace of the recording, and replays them in place.

So it has a graph's traps. A number that Python computed is the recording's for ever; a tensor that
was replaced is read where it was; one that was freed is refused (a GPU would read what lies there).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .device import Device, Emulated, Refused, _writes, execute


def _key(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


class Graph:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.inside: set[int] = set()  # storages that were made while recording
        self.held: dict[int, list[torch.Tensor]] = {}  # of the others: our own views of them
        self.saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.replays = 0

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mutates = _writes(func)
        given = [t.x for t in tree_leaves((args, kwargs)) if isinstance(t, Emulated)]
        for t in given if mutates else ():
            if _key(t) not in self.inside and _key(t) not in self.saved:
                flat = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                self.saved[_key(t)] = (flat, flat.clone())
        out = execute(func, args, kwargs)
        views = {_key(t) for t in given}
        made = [t.x for t in tree_leaves(out) if isinstance(t, Emulated)]
        self.inside |= {_key(t) for t in made if _key(t) not in views}

        def own(t: Any) -> Any:
            if not isinstance(t, Emulated):
                return t
            mine = t.x.detach()
            if _key(mine) not in self.inside:
                self.held.setdefault(_key(mine), []).append(mine)
            return mine

        named = {k: v for k, v in kwargs.items() if k != "device"}
        fresh = [t.detach() for t in made if _key(t) not in views] if not mutates else []
        self.calls.append((func, tree_map(own, args), tree_map(own, named), fresh))
        return out

    def note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """What makes a tensor from nothing (zeros, arange): made again at each replay."""
        made = [t.x.detach() for t in tree_leaves(out) if isinstance(t, Emulated)]
        self.inside |= {_key(t) for t in made}
        self.calls.append((func, args, kwargs, made))

    def end(self) -> None:
        for flat, before in self.saved.values():
            flat.copy_(before)
        self.saved.clear()

    def replay(self) -> None:
        self.replays += 1
        for views in self.held.values():
            ours = len(views) + 1  # and the storage that is asked
            if torch._C._storage_Use_Count(views[0].untyped_storage()._cdata) <= ours:
                shape = list(views[0].shape)
                raise Refused(f"the graph reads a tensor {shape} that has been freed")
        with torch.no_grad():
            for func, args, kwargs, fresh in self.calls:
                out = func(*args, **kwargs)
                found = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
                for mine, now in zip(fresh, found, strict=bool(fresh)):
                    mine.copy_(now)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """In place of `vgkern.train.capture.capture`."""
    device, graph = Device.current, Graph()
    assert device is not None
    device.recording = graph
    try:
        step()
    finally:
        device.recording = None
        graph.end()
    made.append(graph)
    return graph.replay


made: list[Graph] = []  # since the last clear
