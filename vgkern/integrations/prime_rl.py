"""prime-rl: any vgkern objective as its custom loss, by import path.

    [trainer.loss]
    type = "custom"
    import_path = "vgkern.integrations.prime_rl.loss"
    kwargs = { objective = "dapo", clip_high = 0.28 }

prime-rl calls it once per sequence, adds up, and divides by its own count of tokens: so the
reduction is "sum" whatever the objective's is, which over there means the mean over tokens. The
ratio is trainer against inference, so `old_logp` is `inference_logprobs`.
"""

import dataclasses
import importlib
from typing import Any

from vgkern import objectives
from vgkern.integrations._patch import IntegrationError, refuse, version
from vgkern.objectives import Objective
from vgkern.ops._policy_rows import token_level
from vgkern.ops.policy_loss import policy_loss

MODULE = "prime_rl.trainer.rl.loss"
NEEDED = {"trainer_logprobs", "inference_logprobs", "advantages", "loss_mask"}
KNOWN = NEEDED | {"ref_logprobs", "teacher_logprobs", "loss_weights"}
REMEDY = "Use a prime-rl whose custom losses take these (0.8), or one of its own losses."
LOGGED = ("ratio_mean", "ratio_min", "ratio_max", "clip_low", "clip_high", "dual_clip", "kl")


def loss(inputs: Any, objective: str | Objective = "grpo", **knobs: Any) -> Any:
    """`LossInputs` of one sequence -> `LossOutputs`: the sum over its tokens, and metrics.

    objective: a preset by name; knobs: what `Objective.replace` takes, but for `reduction`.
    `ref_logprobs` (or `teacher_logprobs`) is the reference of `beta`; `loss_weights` multiplies the
    tokens' losses, KL term included.

    Raises IntegrationError when prime-rl's inputs or outputs have changed, ValueError for a
    `reduction`, for an entropy term (prime-rl gives no entropy) or a sampler correction, and for
    loss_weights that are negative.
    """
    outputs = _outputs(type(inputs))
    o = objectives.resolve(objective)
    if "reduction" in knobs:
        raise ValueError(
            f"reduction: got {knobs['reduction']!r}; allowed: nothing, prime-rl divides by its "
            "number of tokens"
        )
    o = o.replace(**knobs, reduction="sum")
    if o.entropy_coef or o.sampler_correction != "none":
        raise ValueError(
            f"objective: got entropy_coef {o.entropy_coef}, sampler_correction "
            f"{o.sampler_correction!r}; allowed: 0.0 and 'none' (the ratio to the sampler is the "
            "objective's own ratio here, and there is no entropy)"
        )
    weights = getattr(inputs, "loss_weights", None)
    if weights is not None and bool((weights < 0).any()):
        raise ValueError("loss_weights: got a negative weight; allowed: 0 or more")
    ref = getattr(inputs, "ref_logprobs", None)
    ref = getattr(inputs, "teacher_logprobs", None) if ref is None else ref
    with token_level():  # [T] advantages of what is always one sequence
        out = policy_loss(
            inputs.trainer_logprobs[None], inputs.advantages[None], objective=o,
            old_logp=inputs.inference_logprobs[None], mask=inputs.loss_mask[None],
            ref_logp=None if ref is None or not o.beta else ref[None],
            token_weight=None if weights is None else weights[None],
        )  # fmt: skip
    return outputs(loss=out.loss, metrics={name: out.metrics[name] for name in LOGGED})


_checked: dict[type, Any] = {}


def _outputs(given: type) -> Any:
    """`LossOutputs`, after a look at both records; once per type of inputs."""
    if given not in _checked:
        try:
            module = importlib.import_module(MODULE)
        except ImportError as error:
            raise IntegrationError(
                f"prime-rl {version('prime-rl')}: {MODULE} cannot be imported ({error}). {REMEDY}"
            ) from error
        fields = {f.name for f in dataclasses.fields(given)}
        what = f"what {given.__name__} has of {', '.join(sorted(NEEDED))}"
        refuse("prime-rl", what, sorted(NEEDED & fields), sorted(NEEDED), REMEDY)
        what = f"what {given.__name__} has besides {', '.join(sorted(KNOWN))}"
        refuse("prime-rl", what, sorted(fields - KNOWN), [], REMEDY)
        made = [f.name for f in dataclasses.fields(module.LossOutputs)]
        refuse("prime-rl", "the fields of LossOutputs", made, ["loss", "metrics"], REMEDY)
        _checked[given] = module.LossOutputs
    return _checked[given]
