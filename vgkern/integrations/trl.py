"""TRL 1.16: our log-prob and entropy op under every trainer, and a GRPOTrainer on the fused loss.

GRPO, RLOO, DPO, KTO and SFT trainers all score tokens through one autograd function of TRL's, which
the forward pass that `trl.trainer.add_fused_lm_head` installs looks up in `trl.trainer.utils` at
every call. `patch()` rebinds that name. Everything else stays TRL's: label shift, compaction,
FSDP gathering, PEFT, losses, metrics.
"""

import functools
import importlib
import types
from typing import Any

import torch
from torch import Tensor

from vgkern.integrations._head import head, no_autocast, options
from vgkern.integrations._patch import IntegrationError, Patch, parameters, refuse, version
from vgkern.ops.linear_sample import linear_sample
from vgkern.ops.linear_token_logprobs import linear_token_logprobs
from vgkern.ops.noise import Noise

NAME = "_ChunkedLogProbFunction"
PARAMETERS = (
    "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, "
    "logit_scale, outputs"
)
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # after the log-prob
REMEDY = "Install trl>=1.16,<1.17, or train without vgkern.integrations.trl."
BLOCK = 1 << 22  # logits held at once where their mean needs them


def patch(*, backend: str | None = None) -> Patch:
    """Puts `vgkern.linear_token_logprobs` under every TRL trainer; `.calls` says how often it ran.

        with patch(): ...      until the end of the block, exceptions included
        patch()                from here on; `undo()` of what it returns ends it

    Raises IntegrationError, before anything is changed, when TRL's function has other parameters,
    is not what TRL's fused head calls, or does not give our numbers on a small example.
    Needs one forward product more for `is_top1` (SFTTrainer asks for it).
    """
    utils = _module()
    stock: Any = getattr(utils, NAME, None)
    _check(utils, stock)

    def build(patch: Patch) -> list[tuple[Any, str, Any]]:
        @functools.wraps(stock.apply)
        def apply(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
            patch.calls += 1
            return scores(*args, backend=backend, **kwargs)

        return [(utils, NAME, types.SimpleNamespace(apply=apply, forward=stock.forward))]

    return Patch(build)


def scores(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    temperature: float,
    chunk_size: int,  # TRL's tile, not ours
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS,
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, ...]:
    """What TRL's function returns: log-prob, entropy (both differentiable), log sum_v p_v^2, mean
    logit, whether the target is the first maximum; [N] each, None where not asked for.

    The third needs no logits: log sum p^2 = lse(2z) - 2 lse(z) = 2 logp - logp', with logp' the
    log-prob at half the temperature.
    """
    given = head(hidden, weight, bias, temperature, final_logit_softcapping, logit_scale)
    h, w, *_ = given
    with no_autocast(hidden.device):
        out = linear_token_logprobs(h, w, targets, **options(given), backend=backend)
        square = mean = top = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                half = given._replace(temperature=given.temperature / 2)
                again = linear_token_logprobs(h, w, targets, **options(half), backend=backend)
                square = 2 * out.logp - again.logp
            if "mean_logits" in outputs:
                mean = _mean_logits(given)
            if "is_top1" in outputs:
                rows = torch.arange(len(targets), device=targets.device)
                greedy = {**options(given), "temperature": 0.0}
                best = linear_sample(h, w, Noise(0, rows, rows), **greedy, backend=backend).token
                top = best == targets
    return out.logp, out.entropy if "entropy" in outputs else None, square, mean, top


def _mean_logits(given: Any) -> Tensor:
    h, w, bias, temperature, cap = given
    if cap is None:  # linear: the mean over V of the head, once
        mean = h.float() @ w.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) / temperature
    out = []
    for rows in h.split(max(1, BLOCK // len(w))):
        z = rows.float() @ w.float().T
        z = z if bias is None else z + bias.float()
        out.append((cap * (z / cap).tanh()).mean(-1) / temperature)
    return torch.cat(out) if out else h.new_zeros(0, dtype=torch.float32)


def _module() -> Any:
    try:
        return importlib.import_module("trl.trainer.utils")
    except ImportError as error:
        raise IntegrationError(
            f"trl {version('trl')}: trl.trainer.utils cannot be imported ({error}). {REMEDY}"
        ) from error


def _check(utils: Any, stock: Any) -> None:
    where = f"trl.trainer.utils.{NAME}"
    refuse("trl", where, type(stock).__name__ if stock is None else "found", "found", REMEDY)
    found = parameters(getattr(stock, "forward", None))
    refuse("trl", f"the signature of {where}.forward", found, PARAMETERS, REMEDY)
    used = NAME in _names(getattr(utils.add_fused_lm_head, "__code__", None))
    what = f"the function that add_fused_lm_head calls (is it {NAME}?)"
    refuse("trl", what, used, True, REMEDY)
    worst: float | str
    try:
        worst = _compare(stock)
    except Exception as error:
        worst = f"{type(error).__name__}: {error}"
    if not isinstance(worst, float) or not worst < 1e-4:
        what = f"the result of {where} on 3 rows"
        refuse("trl", what, f"differs from ours by {worst}", "at most 1e-4", REMEDY)


def _names(code: Any) -> set[str]:
    """Global names that a function and those defined in it look up."""
    if not isinstance(code, types.CodeType):
        return set()
    return set(code.co_names).union(*(_names(const) for const in code.co_consts))


def _compare(stock: Any) -> float:
    """Largest difference of any output or gradient of the two functions on 3 rows."""
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw) for shape in ((3, 4), (5, 4), (5,))]
    results: list[list[Tensor]] = []
    functions: tuple[Any, ...] = (stock.apply, scores)
    for function in functions:
        leaves = [v.clone().requires_grad_() for v in values]
        out = function(*leaves, torch.tensor([4, 0, 2]), 0.7, 4, 3.0, 1.5, OUTPUTS)
        (out[0].sum() + 2 * out[1].sum()).backward()
        results.append([x.detach().float() for x in (*out, *(v.grad for v in leaves))])
    pairs = zip(*results, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def __getattr__(name: str) -> Any:
    if name == "GRPOTrainer":  # imports TRL's trainer: seconds
        return importlib.import_module("vgkern.integrations._trl_grpo").GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
