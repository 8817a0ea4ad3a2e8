"""vgkern itself, one rival per backend."""

import torch
from torch import Tensor

import vgkern
from vgkern.ops import _backend

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip

DEFAULT = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}  # the first is the base


class Ours(Rival):
    package = "vgkern"

    def __init__(self, backend: str) -> None:
        self.backend, self.name = backend, f"vgkern {backend}"

    def load(self, device: torch.device) -> None:
        try:
            _backend.choose(self.backend, device, torch.float32)
        except _backend.BackendError as error:
            raise Skip(str(error)) from error

    def forward(self, op: str) -> Forward:
        def call(x: Inputs) -> Outputs:
            out = getattr(vgkern, op)(**x, backend=self.backend)
            if isinstance(out, Tensor):
                return (out,)
            return tuple(t for t in out if isinstance(t, Tensor))  # a loss comes with metrics

        return call

    def version(self) -> str:
        return vgkern.__version__
