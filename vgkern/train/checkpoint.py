"""Weights, config and tokenizer in one folder, written whole or not at all. No pickle.

A folder appears under its name only when everything in it is on disk: it is written under a
temporary name beside it, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from vgkern.errors import CheckpointError

from .policy import Policy, Tokenizer

if TYPE_CHECKING:
    from .config import Config

RUN = {"task", "task_options", "few_shot", "temperature"}  # in the config.json of every run


def save_checkpoint(policy: Policy, tokenizer: Tokenizer, folder: str | Path) -> None:
    """`folder` must not exist yet. Raises CheckpointError, also when the disk is full."""
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; nothing was overwritten")
    try:
        with whole(folder) as partial:
            policy.save(str(partial))
            tokenizer.save(str(partial))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: not saved: {reason}") from error


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when everything in it is on the disk."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        os.replace(partial, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(model: str) -> tuple[str, dict[str, Any]]:
    """The weights to load, and the settings of the run they came from ({} without one)."""
    folder = Path(model)
    run = _settings(folder)
    if not run:
        return model, _settings(folder.parent) if folder.is_dir() else {}
    for weights in (folder / "final", *sorted(folder.glob("step-*"), reverse=True)):
        if weights.is_dir():
            return str(weights), run
    raise CheckpointError(
        f"{folder}: a run that has saved no final weights; name a checkpoint in it, or go on with "
        f"it: --resume {folder}"
    )


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and set(found) >= RUN else {}


def load_policy(
    path: str, line: bool | None = None, chat: bool | None = None
) -> tuple[Policy, Tokenizer]:
    """A folder of this trainer, or any Hugging Face causal LM (folder or name). line, chat: of the
    latter, see `hf_load.load`."""
    from .model import KIND, Decoder
    from .tokenizer import CharTokenizer

    config = Path(path, "config.json")
    if Path(path).is_dir() and not config.is_file():
        raise CheckpointError(f"{path}: no config.json in it; not a checkpoint folder")
    try:
        kind = json.loads(config.read_text()).get("kind") if config.is_file() else None
        if kind == KIND:
            return Decoder.load(path), CharTokenizer.load(path)
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from None
    from .hf_load import load

    return load(path, line=line, chat=chat)


def new_policy(config: Config) -> tuple[Policy, Tokenizer]:
    """A small decoder with random weights, and its tokenizer."""
    from .model import Decoder, Shape
    from .tokenizer import CharTokenizer

    tokenizer = CharTokenizer()
    shape = Shape(
        tokenizer.vocab, config.width, config.layers, config.heads, config.mlp, config.context
    )
    return Decoder(shape, tokenizer.blocked, config.seed), tokenizer
