"""Plain PyTorch for continuous actions and states, as users write it; in fp64 the truth."""

import torch
from mutation import reference, scaled_gradient


def eager_gaussian_action(mean, log_std, noise):
    eps = noise.normal(mean.shape[-1], torch.promote_types(mean.dtype, torch.float32))
    sigma = log_std.exp().expand(mean.shape)
    action = mean + sigma * eps.to(mean.dtype)
    policy = torch.distributions.Normal(mean, sigma, validate_args=False)
    return {"action": action, "logp": policy.log_prob(action.detach()).sum(-1)}


def eager_costate_scan(jacobian, local_grad, terminal, gamma=1.0, done=None):
    lam = [terminal]
    for t in reversed(range(local_grad.shape[1])):
        A = jacobian[:, t]
        pulled = A * lam[0] if A.ndim == 2 else (A.mT @ lam[0][..., None]).squeeze(-1)
        if done is not None:
            pulled = pulled * ~done[:, t, None]
        lam.insert(0, local_grad[:, t] + gamma * pulled)
    return {"costates": torch.stack(lam, 1)}


def eager_linear_rollout(jacobian, drift, sigma, initial, noise):
    n = initial.shape[-1]
    eps = noise.normal(n, torch.promote_types(initial.dtype, torch.float32)).to(initial.dtype)
    push = drift + sigma * eps
    states = [initial]
    for t in range(jacobian.shape[1]):
        A, s = jacobian[:, t], states[-1]
        moved = A * s if A.ndim == 2 else (A @ s[..., None]).squeeze(-1)
        states.append(moved + push[:, t])
    return {"states": torch.stack(states, 1)}


# What the oracle must see: (case, how the reference is broken)
MUTATIONS = {
    "gaussian_action: no score gradient": (
        "gaussian_action-n7-3d", reference(
            lambda ref, *a: (o := ref(*a))._replace(logp=o.logp.detach()))),
    "gaussian_action: no pathwise gradient to log_std": (
        "gaussian_action-n6-shared", reference(
            lambda ref, m, s, e: ref(m, s, e)._replace(action=ref(m, s.detach(), e).action))),
    "gaussian_action: noise of the next dimension": (
        "gaussian_action-n33-one", reference(
            lambda ref, m, *a: ref(m.roll(1, -1), *a)._replace(
                action=ref(m.roll(1, -1), *a).action.roll(-1, -1)))),
    "costate_scan: Jacobians not transposed": (
        "costate_scan-n4", reference(
            lambda ref, a, *r: ref(a.mT, *r))),
    "costate_scan: done one step late": (
        "costate_scan-n33-done", reference(
            lambda ref, a, g, x, d, k: ref(a, g, x, d.roll(1, 1), k))),
    "costate_scan: gamma not in the gradient": (
        "costate_scan-diagonal-n33-done", reference(
            lambda ref, a, *r: ref(scaled_gradient(a, 1 / 0.97), *r))),
    "linear_rollout: sigma squared": (
        "linear_rollout-n4-shared", reference(
            lambda ref, a, b, s, *r: ref(a, b, s * s, *r))),
    "linear_rollout: dsigma 1% too large": (
        "linear_rollout-diagonal-n33", reference(
            lambda ref, a, b, s, *r: ref(a, b, scaled_gradient(s), *r))),
}  # fmt: skip
