"""Replacing a name of another library: checked before, put back exactly after."""

import importlib.metadata
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any

Target = tuple[Any, str, Any]  # owner (module, class or instance), name, what to put there
ABSENT = object()  # an instance that takes the name from its class


class IntegrationError(RuntimeError):
    """Another library is not what a drop-in was written against; says what was found instead."""


def refuse(library: str, what: str, found: object, expected: object, remedy: str) -> None:
    """Raises IntegrationError unless `found` equals `expected`."""
    if found == expected:
        return
    raise IntegrationError(
        f"{library} {version(library)}: {what} is not what this drop-in was written against.\n"
        f"  expected: {expected}\n  found:    {found}\n  {remedy}"
    )


def version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(no version)"


def parameters(function: Any) -> str:
    """Names of the parameters, as one readable string: what positional callers rely on."""
    try:
        return ", ".join(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return f"no signature ({type(function).__name__})"


class Patch:
    """Some names of another library, rebound until `undo()` or the end of a `with` block.

    Patches of one name may nest and end in any order: while one is on, the newest that is on is in
    force; when the last ends, the very object that was found first is back. `calls` counts the
    calls that reached this patch's replacements.
    """

    _lock = threading.RLock()
    _on: list["Patch"] = []  # noqa: RUF012 - one list for all

    def __init__(self, build: Callable[["Patch"], list[Target]]) -> None:
        self.calls = 0
        self._before: list[tuple[Any, str, Any, Any]] = []  # owner, name, ours, what was there
        targets = build(self)
        with Patch._lock:
            Patch._on.append(self)
            try:
                for owner, name, ours in targets:
                    before = vars(owner).get(name, ABSENT)
                    setattr(owner, name, ours)
                    self._before.append((owner, name, ours, before))
            except BaseException:  # all of them or none
                self.undo()
                raise

    @property
    def on(self) -> bool:
        return self in Patch._on

    def undo(self) -> None:
        """Puts back what was there. A second call does nothing."""
        with Patch._lock:
            if self not in Patch._on:
                return
            Patch._on.remove(self)
            for owner, name, ours, before in reversed(self._before):
                if vars(owner).get(name) is ours:
                    if before is ABSENT:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, before)
                elif not any(later._skip(ours, before) for later in Patch._on):
                    of = getattr(owner, "__name__", type(owner).__name__)
                    warnings.warn(
                        f"{of}.{name} was rebound by someone else after vgkern did; "
                        "it is left as it is",
                        RuntimeWarning,
                        stacklevel=2,
                    )

    def _skip(self, gone: Any, before: Any) -> bool:
        """If this patch would put back `gone`, it shall put back `before` instead."""
        for i, (owner, name, ours, old) in enumerate(self._before):
            if old is gone:
                self._before[i] = (owner, name, ours, before)
                return True
        return False

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
