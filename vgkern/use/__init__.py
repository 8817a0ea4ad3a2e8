"""A checkpoint in use: `load`, and the commands `sample`, `eval` and `export`.

from vgkern.use import load
model = load("runs/mine")
print(model.generate(["3152="]))
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from vgkern.errors import ConfigError
from vgkern.tasks import Question
from vgkern.train.checkpoint import find, load_policy
from vgkern.train.generate import decode, generate, portions
from vgkern.train.policy import Policy, Tokenizer, encode

TOKENS = 16384  # of one part of a batch: its rows times the longest text they may come to


def command(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of a command that takes a checkpoint; `text` is its module's."""
    p = argparse.ArgumentParser(
        prog=f"python -m vgkern {name}", description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("model", metavar="CKPT", help="a run, a checkpoint, a Hugging Face name")
    return p


@dataclass(frozen=True)
class Sampled:
    text: str
    finished: bool  # ended by itself, not cut off at max_new


@dataclass(frozen=True)
class Model:
    """A policy and its tokenizer; `run` has the settings of the run it came from, or nothing."""

    policy: Policy
    tokenizer: Tokenizer
    weights: str
    run: dict[str, Any]

    def generate(self, prompts: list[Question], **options: Any) -> list[str]:
        """The texts of `sample`, all samples of a prompt together."""
        return [sampled.text for group in self.sample(prompts, **options) for sampled in group]

    def sample(
        self,
        prompts: list[Question],
        *,
        count: int = 1,  # samples of each prompt
        max_new: int = 64,
        temperature: float = 1.0,  # 0: the most likely token
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        first: int = 0,  # number of the first prompt: a sample's noise is that of its number
    ) -> list[list[Sampled]]:
        """`count` samples of each prompt. A sample depends on the seed and its own number alone,
        not on what else is asked for. Raises ConfigError that names the option."""
        for name, value, low in (("count", count, 1), ("max_new", max_new, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}: got {value!r}; allowed: an int >= {low}")
        if not prompts:
            return []
        try:
            ids = [encode(self.tokenizer, prompt) for prompt in prompts]
            if not all(ids):
                raise ValueError("prompt: got an empty one; allowed: at least one token")
            check = getattr(self.policy, "check", None)
            if check is not None:
                check([max(ids, key=len)], max_new)
            cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
            found: list[list[Sampled]] = []
            for some in portions(ids, count, max_new, TOKENS):
                numbers = torch.arange((first + some.start) * count, (first + some.stop) * count)
                rollout = generate(
                    self.policy, ids[some], self.tokenizer.stops, group=count, max_new=max_new,
                    seed=seed, sequence=numbers, temperature=temperature, **cuts,
                )  # fmt: skip
                texts = decode(rollout, self.tokenizer)
                each = [Sampled(*x) for x in zip(texts, rollout.finished.tolist(), strict=True)]
                found += [each[i : i + count] for i in range(0, len(each), count)]
        except ValueError as error:  # the ops' and tokenizers' own words
            raise ConfigError(str(error)) from error
        return found


def load(path: str) -> Model:
    """A run's folder, a checkpoint's, or a Hugging Face name. Raises RunError in one line."""
    weights, run = find(path)
    try:
        policy, tokenizer = load_policy(weights)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Model(policy, tokenizer, weights, run)
