"""The thin trainer: critic-free RL of language models, built on the ops of `vgkern` only.

from vgkern.train import Config, train
train(Config(task="data.jsonl", model="HuggingFaceTB/SmolLM2-135M"))
"""

from typing import Any

WHERE = {"train": "vgkern.train.run", "Config": "vgkern.train.config", "Entry": "vgkern.tasks"}
__all__ = ["Config", "Entry", "train"]


def __getattr__(name: str) -> Any:
    if name in WHERE:
        import importlib

        return getattr(importlib.import_module(WHERE[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
