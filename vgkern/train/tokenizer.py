"""One id per character: the tokenizer of the small decoder."""

from __future__ import annotations

import json
from pathlib import Path

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*=> "


class CharTokenizer:
    """Ids 0 and 1 are padding and end of sequence; ids past the characters are unused."""

    pad, eos = 0, 1
    stops: tuple[int, ...] = (eos,)

    def __init__(self, characters: str = CHARACTERS, vocab: int = 48) -> None:
        if len(set(characters)) != len(characters) or len(characters) + 2 > vocab:
            raise ValueError(
                f"characters: got {characters!r}; allowed: at most {vocab - 2} different ones"
            )
        self.characters, self.vocab = characters, vocab
        self.id = {character: i + 2 for i, character in enumerate(characters)}

    @property
    def blocked(self) -> list[int]:
        """Ids that must never be sampled."""
        return [self.pad, *range(len(self.characters) + 2, self.vocab)]

    def encode(self, text: str) -> list[int]:
        try:
            return [self.id[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"text {text!r}: character {error.args[0]!r} is unknown; "
                f"allowed: {self.characters!r}"
            ) from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i - 2] if 2 <= i < len(self.id) + 2 else "" for i in ids)

    def save(self, folder: str) -> None:
        state = {"kind": "characters", "characters": self.characters, "vocab": self.vocab}
        Path(folder, "tokenizer.json").write_text(json.dumps(state, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> CharTokenizer:
        state = json.loads(Path(folder, "tokenizer.json").read_text())
        return cls(state["characters"], state["vocab"])
