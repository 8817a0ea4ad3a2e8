"""The frozen model of on-policy distillation: loaded once, and held against the student.

It sees the student's token ids, so an id must mean the same to both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgkern.costate._biases import BLOCKED
from vgkern.errors import ConfigError

from .checkpoint import find, load_policy
from .config import Config
from .device import put, where
from .policy import Head, Policy, Tokenizer

SHOWN = 3  # ids of an error message


def load_teacher(
    config: Config, policy: Policy, tokenizer: Tokenizer, prompts: list[list[int]], new: int
) -> Policy | None:
    """The policy at `config.teacher`, or None; ConfigError names what is wrong.

    It will see texts like these prompts with up to `new` tokens after them.
    """
    if not config.teacher:
        return None
    try:
        teacher, other = load_policy(find(config.teacher)[0])
    except ValueError as error:
        raise ConfigError(f"teacher: {error}") from None
    except RuntimeError as error:  # a checkpoint without weights, or with half of them
        raise ConfigError(f"teacher: {error}; allowed: a folder that a run has written") from None
    check_teacher(config, teacher, other, policy, tokenizer)
    check = getattr(teacher, "check", None)
    try:
        if check is not None:
            check(prompts, new)
    except ValueError as error:
        allowed = "a teacher with a context as long as the student's texts"
        raise ConfigError(f"teacher: {config.teacher}: {error}; allowed: {allowed}") from None
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    put(teacher, where(policy))
    return teacher


def check_teacher(
    config: Config, teacher: Policy, other: Tokenizer, policy: Policy, tokenizer: Tokenizer
) -> None:
    name, head, own = f"teacher: {config.teacher}", teacher.head(), policy.head()
    if len(head.weight) != len(own.weight):
        raise ConfigError(
            f"{name} has a vocabulary of {len(head.weight)}, the student of {len(own.weight)}; "
            f"allowed: a teacher with the student's tokenizer and as many rows in its head"
        )
    ids = range(len(own.weight))
    differ = [i for i in ids if other.decode([i]) != tokenizer.decode([i])]
    if differ or other.stops != tokenizer.stops:
        what = f"stops at ids {other.stops}, the student at {tokenizer.stops}"
        if differ:
            pairs = (f"{i}: {other.decode([i])!r}, {tokenizer.decode([i])!r}" for i in differ)
            shown = "; ".join(text for text, _ in zip(pairs, range(SHOWN), strict=False))
            what = f"has another tokenizer: {len(differ)} ids mean other texts ({shown})"
        raise ConfigError(f"{name} {what}; allowed: a teacher with the student's tokenizer")
    _check_blocked(name, config, head, own)
    capped = head.softcap is not None or own.softcap is not None
    if capped and config.kl_estimator == "analytic":
        raise ConfigError(
            f"{name}: a head with a soft-cap has no analytic divergence; "
            f"allowed: kl_estimator = 'sampled'"
        )


def _check_blocked(name: str, config: Config, teacher: Head, student: Head) -> None:
    """A divergence is infinite, 1e8 nats in practice, where one side alone can produce an id."""
    other, own = _producible(teacher), _producible(student)
    missing, text = own & ~other, "it blocks {} ids that the student can produce"
    if config.distill_kind == "forward_kl":
        missing, text = other & ~own, "the student blocks {} ids that it can produce"
    if config.distill_kind == "jsd" or not bool(missing.any()):
        return
    ids = missing.nonzero()[:, 0].tolist()
    raise ConfigError(
        f"{name}: {text.format(len(ids))} (id {ids[0]}): {config.distill_kind} is infinite; "
        f"allowed: tokenizers with the same pad_token and as many tokens, or distill_kind = 'jsd'"
    )


def _producible(head: Head) -> Tensor:  # [V] bool
    if head.bias is None:
        return torch.ones(len(head.weight), dtype=torch.bool, device=head.weight.device)
    return head.bias > BLOCKED
