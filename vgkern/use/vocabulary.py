"""How many tokens a checkpoint knows, from its configuration alone: said before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from vgkern.errors import CheckpointError
from vgkern.train.hf_load import INSTALL


def vocabulary(weights: str) -> int | None:
    """None where only loading tells. Raises CheckpointError where there is nothing to load."""
    folder = Path(weights)
    if weights == "smollm2" or (weights.endswith(".gguf") and folder.is_file()):
        return None
    if folder.is_dir():
        try:
            config = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            raise CheckpointError(f"no config.json in {weights}; not a checkpoint folder") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{weights}/config.json: {error}") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{weights}/config.json: not a JSON object")
        inner = config.get("text_config")
        sizes = (config.get("vocab"), config.get("vocab_size"))
        inside = inner.get("vocab_size") if isinstance(inner, dict) else None
        return next((size for size in (*sizes, inside) if isinstance(size, int)), None)
    if weights.startswith((".", "/", "~")) or weights.count("/") > 1 or folder.is_file():
        raise CheckpointError(f"no such folder: {weights}")
    try:
        from transformers import AutoConfig
    except ImportError:
        allowed = f"no such folder, and a Hugging Face name needs transformers: {INSTALL}"
        raise CheckpointError(allowed) from None
    try:
        size = AutoConfig.from_pretrained(weights).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"no such folder, and not loadable by that name: {reason}") from None
    return size if isinstance(size, int) else None
