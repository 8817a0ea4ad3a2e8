"""The `vgkern::` operators: schemas and fake kernels live here and in the op files. The C++ (and
later CUDA) implementations register under their dispatch keys when the native library loads."""

from collections.abc import Callable
from typing import Any

import torch

_LIB = torch.library.Library("vgkern", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Declare `vgkern::<schema>` and its shape function."""
    name = schema.split("(")[0]
    _LIB.define(schema)
    torch.library.register_fake(f"vgkern::{name}", fake, lib=_LIB)
