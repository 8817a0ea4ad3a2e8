"""verl 0.9: its Triton log-prob kernel on a GPU, its chunked PyTorch on a CPU."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip
from .eager import row_loss

CHUNKED = "utils/experimental/torch_functional.py"  # needs torch only, where verl needs Ray


class Verl(Rival):
    name, package = "verl", "verl"
    call: Any
    on_cpu = True

    def load(self, device: torch.device) -> None:
        self.on_cpu = device.type != "cuda"
        try:
            if self.on_cpu:
                self.call = self._chunked()
            else:
                from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

                self.call = lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "none")
        except ImportError as error:
            raise self.absent(error) from error

    def _chunked(self) -> Any:
        package = importlib.util.find_spec("verl")
        if package is None or package.origin is None:
            raise ImportError("no verl", name="verl")
        path = Path(package.origin).parent / CHUNKED
        if not path.exists():
            raise Skip(f"this verl has no {CHUNKED}")
        spec = importlib.util.spec_from_file_location("_verl_chunked", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.FusedLinearForPPO()

    def forward(self, op: str) -> Forward:
        if op == "linear_token_logprobs":
            return self._logprobs
        if op == "linear_policy_loss":
            return self._loss
        raise Skip("it has no such op")

    def note(self, op: str) -> str:
        path = "its chunked torch" if self.on_cpu else "its Triton kernel"
        return path + (", then a plain loss" if op == "linear_policy_loss" else "")

    def _logprobs(self, x: Inputs) -> Outputs:
        logp, entropy = self.call(x["hidden"], x["weight"], x["targets"])
        return logp, entropy

    def _loss(self, x: Inputs) -> Outputs:
        logp, _ = self.call(x["hidden"].flatten(0, -2), x["weight"], x["targets"].flatten())
        return (row_loss(logp.view_as(x["targets"]), x),)
