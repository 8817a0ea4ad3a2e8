"""States that a run goes on from exactly: all that decides what comes next, and nothing pickled.

    RUN/state/step-000040/     policy and tokenizer, as in any checkpoint
        optimizer.safetensors  Adam's moments, torch's random state
        state.json             step, data cursors, random states, counters, length of the log
        manifest.json          SHA-256 of every file above; manifest.sha256 that of itself
    RUN/state/latest           the name of the newest, moved last

A state is written beside its place, synced and renamed, so one that was cut short has no name; a
file that is damaged later is found by its checksum. The two newest are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgkern import __version__
from vgkern.errors import CheckpointError

from .checkpoint import load_policy, whole

if TYPE_CHECKING:
    from .trainer import Trainer

KEPT = 2
SHARE = 0.01  # of the run's time that automatic saving may take
PHASES = ("warm", "step")  # in the order of a run; a state's name is PHASE-NUMBER


class Keeper:
    """Saves a run's states: every `every` steps, or (0) as often as costs `SHARE` of the time; -1:
    only when it is asked to."""

    def __init__(self, out: Path, every: int) -> None:
        self.folder, self.every = out / "state", every
        self.saved_at, self.cost = time.perf_counter(), 0.1  # seconds; a guess for the first
        self.newest: str | None = None

    def due(self, number: int) -> bool:
        if self.every:
            return self.every > 0 and number % self.every == 0
        return time.perf_counter() - self.saved_at >= self.cost / SHARE

    def save(self, trainer: Trainer, phase: str, number: int, **more: Any) -> bool:
        """False, with a line in the log, where the disk does not take it; the older one stays."""
        start, name = time.perf_counter(), f"{phase}-{number:06d}"
        if name == self.newest:
            return True
        try:
            self.folder.mkdir(exist_ok=True)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # of an earlier life of the run
            with whole(self.folder / name) as partial:
                trainer.policy.save(str(partial))
                trainer.tokenizer.save(str(partial))
                save_file(_tensors(trainer, more.pop("optimizer", trainer.optimizer)),
                          partial / "optimizer.safetensors")  # fmt: skip
                state = {"vgkern": __version__, "phase": phase, "number": number, **more}
                state |= {"trainer": trainer.edge(), "log": trainer.log.place()}
                (partial / "state.json").write_text(json.dumps(state))
                _seal(partial)
            latest = self.folder / ".latest"
            latest.write_text(name + "\n")
            os.replace(latest, self.folder / "latest")
            for old in _newest_first(self.folder)[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            trainer.log.line(f"warning: {self.folder / name} was not saved ({error}); going on")
            return False
        finally:
            self.saved_at = time.perf_counter()
            self.cost = self.saved_at - start
        self.newest = name
        return True


def _tensors(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state by the place of its parameter, and torch's own random state."""
    found = {"random": torch.get_rng_state()}
    for place, values in optimizer.state_dict()["state"].items():
        found |= {f"{place}.{name}": value.cpu().contiguous() for name, value in values.items()}
    return found


def restore(
    trainer: Trainer, folder: Path, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Weights, optimizer, random states and counters, as they were; `find` has checked the files.
    Returns what `read` does.

    optimizer: that of a warm start, in place of the trainer's.
    """
    policy, _ = load_policy(str(folder))
    with torch.no_grad():
        for mine, saved in zip(trainer.policy.parameters(), policy.parameters(), strict=True):
            mine.copy_(saved)
    tensors = load_file(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("random"))
    optimizer = trainer.optimizer if optimizer is None else optimizer
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        states.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    found = read(folder)
    trainer.back_to(found["trainer"])
    return found


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def find(run: Path) -> tuple[Path, list[str]]:
    """The newest state of a run whose files are all as they were written, and why newer ones are
    not. Raises CheckpointError when there is none."""
    skipped: list[str] = []
    for folder in _newest_first(run / "state"):
        if (why := damage(folder)) is None:
            return folder, skipped
        skipped.append(f"{folder}: {why}")
    reason = "; ".join(skipped) or "no state was saved in it"
    raise CheckpointError(f"--resume {run}: {reason}; start anew, or --model a checkpoint of it")


def damage(folder: Path) -> str | None:
    """What is wrong with a state's files; None: nothing."""
    try:
        text = (folder / "manifest.json").read_bytes()
        if (folder / "manifest.sha256").read_text() != hashlib.sha256(text).hexdigest():
            return "manifest.json is damaged"
        sums: dict[str, str] = json.loads(text)
        for name, digest in sums.items():
            if _digest(folder / name) != digest:
                return f"{name} is damaged"
        if sums.keys() != set(_files(folder)) - {"manifest.json", "manifest.sha256"}:
            return "it has other files than it was saved with"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _seal(folder: Path) -> None:
    sums = {name: _digest(folder / name) for name in _files(folder)}
    text = json.dumps(sums, indent=1).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(hashlib.sha256(text).hexdigest())


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    """Whole states by phase and number."""
    found = []
    for path in folder.glob("*-*") if folder.is_dir() else ():
        phase, _, number = path.name.partition("-")
        if phase in PHASES and number.isdecimal() and path.is_dir():
            found.append((PHASES.index(phase), int(number), path))
    return [path for *_, path in sorted(found, reverse=True)]


def dump_random(rng: random.Random) -> list[Any]:
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def load_random(rng: random.Random, state: list[Any]) -> None:
    version, words, gauss = state
    rng.setstate((version, tuple(words), gauss))
