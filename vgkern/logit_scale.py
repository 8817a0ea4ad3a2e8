"""What a Hugging Face model does to its logits after the head."""

from typing import Any


def scaling(config: Any) -> tuple[float | None, float]:
    """(soft-cap, scale) of the logits of a model, from its text config."""
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return softcap, getattr(text, name)
    by = getattr(text, "logits_scaling", None)
    if by is None:
        return softcap, 1.0
    return softcap, by if text.model_type == "hyperclovax" else 1 / by
