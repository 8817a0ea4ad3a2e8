"""What an adapter is. It calls the library; it holds no copy of its code."""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..work import Inputs

Outputs = tuple[Tensor | None, ...]  # as the op's, without metrics; None: it has none of this
Forward = Callable[[Inputs], Outputs]


class Skip(Exception):
    """This is not measured; the message is the reason, for the table."""


class Rival:
    """One library. `forward(op)` gives a function of the op's inputs whose outputs are those of the
    op, in order, differentiable where the op is.

    Raises Skip in `load` when the library is absent or cannot run on the device, and in `forward`
    for an op that it does not have. Anything else that it raises is caught and shown as a reason.
    """

    name = ""
    package = ""  # on PyPI

    def load(self, device: torch.device) -> None:
        """Import what is needed."""

    def forward(self, op: str) -> Forward:
        raise Skip("it has no such op")

    def note(self, op: str) -> str:
        """What a reader of its row must know."""
        return ""

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    def absent(self, error: ImportError) -> Skip:
        missing = getattr(error, "name", None) or str(error)
        if missing.split(".")[0] == self.package.replace("-", "_") or self.version() == "absent":
            return Skip(f"not installed: pip install {self.package}")
        return Skip(f"{self.package} {self.version()} does not import: {error}")


class GpuOp(Rival):
    """A library that has one of the ops, on a GPU, without its entropy."""

    op, module, function = "", "", ""
    call: Any

    def outputs(self, x: Inputs) -> Outputs:
        raise NotImplementedError

    def load(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise Skip("GPU only")
        try:
            self.call = getattr(importlib.import_module(self.module), self.function)
        except ImportError as error:
            raise self.absent(error) from error

    def forward(self, op: str) -> Forward:
        if op != self.op:
            raise Skip("it has no such op")
        return self.outputs

    def note(self, op: str) -> str:
        return "no entropy"
