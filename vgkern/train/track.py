"""A run's numbers to tensorboard, wandb or trackio as well. A tracker that fails once is left
alone: the run and its own log go on."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgkern.errors import ConfigError

if TYPE_CHECKING:
    from .config import Config

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker:
    """`send(kind, values)` for every record of the log."""

    def __init__(self, name: str, out: Path, config: Config, say: Callable[[str], None]) -> None:
        """Raises ConfigError when the package is not installed."""
        self.name, self.say = name, say
        module = importable(name)
        self.put: Callable[[dict[str, float], int], None] | None = None
        self.end: Callable[[], None] = lambda: None
        settings = dataclasses.asdict(config)
        try:
            if name == "tensorboard":
                writer = module.SummaryWriter(str(out / "tensorboard"))

                def put(values: dict[str, float], step: int) -> None:
                    for key, value in values.items():
                        writer.add_scalar(key, value, step)
                    writer.flush()

                self.put, self.end = put, writer.close
            else:
                where = {"dir": str(out)} if name == "wandb" else {}
                run = module.init(project="vgkern", name=out.name, config=settings, **where)
                self.put, self.end = lambda v, s: module.log(v, step=s), run.finish
        except Exception as error:
            self.fail(error)

    def send(self, kind: str, values: dict[str, Any]) -> None:
        """Numbers alone, as kind/name, at the record's step."""
        if self.put is None:
            return
        found = {
            f"{kind}/{name}": float(x)
            for name, x in values.items()
            if isinstance(x, int | float) and math.isfinite(x) and name not in ("step", "time")
        }
        try:
            self.put(found, int(values.get("step", 0)))
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        said = str(error).strip().split("\n")[0]
        self.put = None
        self.say(f"warning: track: {self.name} failed ({type(error).__name__}: {said}); going on "
                 f"without it")  # fmt: skip

    def close(self) -> None:
        try:
            self.end()
        except Exception as error:
            self.fail(error)


def importable(name: str) -> Any:
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError:
        raise ConfigError(
            f"track: got {name!r}, which needs the package: pip install {name}"
        ) from None
