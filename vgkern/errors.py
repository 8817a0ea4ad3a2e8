"""What stops a run on purpose. The command line shows these as one line, and nothing else so."""

from __future__ import annotations


class RunError(Exception):
    """Base of the errors whose message is all that a user needs."""


class ConfigError(RunError, ValueError):
    """A setting that does not exist or may not have that value; the message says which."""


class CheckpointError(RunError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file."""


class TaskError(RunError, RuntimeError):
    """A task broke its protocol; the message names the sample."""


class TrainingError(RunError, RuntimeError):
    """The run cannot go on; the message says why."""
