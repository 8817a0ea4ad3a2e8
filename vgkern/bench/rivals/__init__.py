"""Every library that is measured, by the name that the table gives it."""

from ._rival import Forward, Outputs, Rival, Skip
from .cce import Cce
from .eager import Compiled, Eager, Multinomial
from .flashinfer import FlashInfer
from .liger import Liger
from .ours import DEFAULT, Ours
from .quack import Quack
from .trl import Trl
from .verl import Verl

RIVALS: tuple[type[Rival], ...] = (
    Eager, Compiled, Multinomial, Trl, Liger, Cce, Verl, Quack, FlashInfer,
)  # fmt: skip
NAMES = tuple(r.name for r in RIVALS)

__all__ = ["DEFAULT", "NAMES", "RIVALS", "Forward", "Ours", "Outputs", "Rival", "Skip"]
