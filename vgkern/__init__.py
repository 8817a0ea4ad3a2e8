"""vgkern: fused kernels for critic-free RL of language models, seen as value-gradient learning."""

from vgkern.objectives import Objective
from vgkern.ops._backend import BackendError, use_backend
from vgkern.ops._check import NonFiniteError
from vgkern.ops.costate import Costate
from vgkern.ops.costate_scan import costate_scan
from vgkern.ops.gaussian_action import GaussianAction, gaussian_action
from vgkern.ops.group_advantages import group_advantages
from vgkern.ops.linear_divergence import Divergence, linear_divergence
from vgkern.ops.linear_policy_loss import linear_policy_loss
from vgkern.ops.linear_rollout import linear_rollout
from vgkern.ops.linear_sample import Sample, linear_sample
from vgkern.ops.linear_token_logprobs import linear_token_logprobs
from vgkern.ops.noise import Noise
from vgkern.ops.noisy_embedding import noisy_embedding
from vgkern.ops.policy_loss import PolicyLoss, policy_loss
from vgkern.ops.token_logprobs import TokenLogprobs, token_logprobs

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Costate",
    "Divergence",
    "GaussianAction",
    "Noise",
    "NonFiniteError",
    "Objective",
    "PolicyLoss",
    "Sample",
    "TokenLogprobs",
    "costate_scan",
    "gaussian_action",
    "group_advantages",
    "linear_divergence",
    "linear_policy_loss",
    "linear_rollout",
    "linear_sample",
    "linear_token_logprobs",
    "noisy_embedding",
    "policy_loss",
    "token_logprobs",
    "use_backend",
]
