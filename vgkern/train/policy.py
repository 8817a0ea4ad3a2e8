"""What the trainer asks of a language model, and of its tokenizer.

The trainer never sees logits. A policy hands out hidden states and its head; the fused ops of
`vgkern` turn the two into tokens (`linear_sample`) and into a loss (`linear_policy_loss`). Because
sampler and trainer read the same `Head`, an id that is blocked in one is blocked in the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vgkern.tasks import Question

BLOCKED = -1e9  # bias of an id that must never be sampled; finite, so p * log p stays 0


class Head(NamedTuple):
    """Logits are `softcap(hidden @ weight.T + bias)`."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V] fp32
    softcap: float | None = None


class Tokenizer(Protocol):
    """Text to ids and back. `stops` are the ids that end an answer (end of sequence, a newline)."""

    stops: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: str) -> None: ...


def encode(tokenizer: Tokenizer, question: Question) -> list[int]:
    """Ids of a prompt; messages go through the chat template, which sets special tokens itself. So
    does text under `chat = true`, as a user's turn."""
    if isinstance(question, str) and getattr(tokenizer, "turns", False):
        question = [{"role": "user", "content": question}]
    if isinstance(question, str):
        return tokenizer.encode(question)
    chat = getattr(tokenizer, "chat", None)
    if chat is None:
        raise ValueError(
            f"question: got chat messages; allowed: text, as {type(tokenizer).__name__} has no "
            f"chat template (a Hugging Face model may have one: --model)"
        )
    return list(chat(question))


class Policy(Protocol):
    """A causal language model, seen as hidden states and a head.

    P prompts, G samples of each; row `p * G + g` is sample g of prompt p. Tokens and lengths are
    given on the host or on the policy's device; hidden states are on the device.
    """

    compute: str  # "fp32" or "bf16": see `device.py`

    @property
    def device(self) -> torch.device: ...

    def head(self) -> Head: ...

    def prefill(
        self, prompts: list[list[int]], group: int, max_new: int
    ) -> tuple[Any, Tensor]:  # state, hidden [P*G, H] that predicts the first new token
        """Forward every prompt once and open a cache for `group * len(prompts)` rows."""
        ...

    def decode(self, state: Any, tokens: Tensor) -> Tensor:  # tokens [R] -> hidden [R, H]
        """Append one token to each of the R live rows."""
        ...

    def keep(self, state: Any, rows: Tensor) -> None:  # rows: int64 indices into the live rows
        """Go on with these rows only."""
        ...

    def hidden(
        self,
        prompts: list[list[int]],
        completions: Tensor,  # [P*G, w] int64; ids past a row's length are ignored
        group: int,
        lengths: Tensor,  # [P*G] int64, 1..w
        shared: bool = True,
    ) -> Tensor:  # [P*G, w, H]
        """Hidden states that *predict* the completion tokens, with gradients.

        Position t of a row has seen the prompt and `completions[:, :t]`. `shared=True` forwards a
        prompt once per group; `shared=False` forwards every row in full. Values are the same up to
        rounding. Positions past a row's length hold something finite.
        """
        ...

    def parameters(self) -> Iterable[torch.nn.Parameter]: ...

    def save(self, folder: str) -> None: ...
