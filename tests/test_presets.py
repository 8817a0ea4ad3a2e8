"""What holds for every preset: locality, far-off values, NaN, no host sync, metrics, knobs."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_algorithms import LP, ours

import vgkern
from vgkern import Objective, objectives
from vgkern.objectives import PRESETS

LOCAL = {"grpo", "dr_grpo", "bnpo", "dapo", "cispo_absolute", "cispo_relative", "sapo", "reinforce",
         "reinforce_pp", "reinforce_pp_baseline", "rloo", "ppo", "ppo_delta"}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_row_local_means_that_no_other_token_matters(name, backend):
    """dlogp of a token, as another token's logp moves: the same bits, or the claim is not made."""
    o = PRESETS[name]
    moved = LP.clone()
    moved[:, 0] += 0.003
    one, two = (ours(o, backend, logp=x)[1][:, 1:] for x in (LP, moved))
    assert torch.equal(one, two) == o.row_local == (name in LOCAL)
    assert not o.replace(sampler_correction="token_mask").row_local or o.row_local


def test_the_fused_operator_refuses_what_is_not_row_local(backend):
    if backend != "cpu":
        pytest.skip("a check of the C++ operator")
    h, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    for o in (*PRESETS.values(), objectives.GRPO.replace(sampler_correction="sequence_mask")):
        args = (h, w, None, y, torch.ones(3), torch.ones(3), None, None, None, 1.0, 0.0, o.pack())
        if o.row_local:
            torch.ops.vgkern.linear_policy_loss_fwd(*args, [True] * 3)
        else:
            with pytest.raises(RuntimeError, match="needs all rows"):
                torch.ops.vgkern.linear_policy_loss_fwd(*args, [True] * 3)


INF = float("inf")
LOG_RATIOS = (100.0, -100.0, 21.0, -INF, INF, 0.0)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", PRESETS)
def test_extreme_log_ratios_are_finite(name, sign, backend):
    """+-100, beyond the clamp, one or both at -inf; NaN and inf where masked."""
    o = PRESETS[name].replace(beta=0.1, kl="k3_clamped", sampler_correction="token_truncate")
    old = torch.full((2, 8), -120.0)
    logp = old + torch.tensor([*LOG_RATIOS, 0.1, 0.1])
    old[0, 4], logp[0, 4] = -INF, -1.0
    old[0, 5], logp[0, 5] = -INF, -INF
    logp[1] = old[1] + 0.05
    mask = torch.ones(2, 8)
    mask[:, 6:], mask[1, 0] = 0, 0
    logp[:, 6], old[:, 7], old[1, 0], logp[:, 7] = torch.nan, -INF, torch.nan, INF
    results = []
    for b in ("torch", backend):
        x = logp.clone().requires_grad_()
        out = vgkern.policy_loss(
            x, sign * torch.tensor([1.0, 0.5]), objective=o, old_logp=old, ref_logp=old,
            sampler_logp=old, mask=mask, backend=b
        )  # fmt: skip
        (g,) = torch.autograd.grad(out.loss, x)
        assert out.loss.isfinite() and g.isfinite().all()
        assert (g[mask == 0] == 0).all() and g[0, 3] == 0 and g[0, 5] == 0
        gap = out.metrics["sampler_gap"]  # to a sampler that says it cannot draw what it drew
        assert gap == INF
        assert all(v.isfinite() for v in out.metrics.values() if v is not gap), out.metrics
        results.append((out.loss.detach(), g, torch.stack(list(out.metrics.values()))))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_nan_in_an_active_row_stays_visible(backend):
    """Nothing swallows it: the loss is NaN, on and off policy, for every preset."""
    logp = torch.tensor([[-1.0, torch.nan]])
    for name in PRESETS:
        for old in (None, torch.tensor([[-1.0, -1.0]])):
            out = vgkern.policy_loss(
                logp, torch.ones(1), objective=name, old_logp=old, backend=backend
            )
            assert out.loss.isnan(), name
    one = torch.tensor([[-1.0, -1.0]])
    for c in objectives.CORRECTIONS[1:]:  # a sampler that could not score a token
        out = vgkern.policy_loss(
            one, torch.ones(1), objective=Objective(sampler_correction=c), sampler_logp=logp,
            backend=backend
        )  # fmt: skip
        assert out.loss.isnan(), c


@pytest.mark.parametrize("name", PRESETS)
def test_no_host_sync(name):
    """A meta tensor has no values: whatever asks for one raises."""
    x = torch.empty(2, 3, device="meta", requires_grad=True)
    o = PRESETS[name].replace(beta=0.1, sampler_correction="token_mask")
    d = {"device": "meta"}
    out = vgkern.policy_loss(
        x, torch.empty(2, **d), objective=o, old_logp=torch.empty(2, 3, **d), mask=x.detach(),
        ref_logp=torch.empty(2, 3, **d), sampler_logp=torch.empty(2, 3, **d), backend="torch"
    )  # fmt: skip
    out.loss.backward()
    assert x.grad is not None and not any(v.requires_grad for v in out.metrics.values())


SHARES = {  # ratios exp(0.5), exp(-0.5), exp(0.1), exp(-0.1): shares for A > 0, for A < 0
    "grpo": ((0, 0.25, 0), (0.25, 0, 0)),
    "ppo_delta": ((0, 0.25, 0), (0.25, 0, 0)),
    "cispo_relative": ((0.25, 0.25, 0), (0.25, 0.25, 0)),
    "cispo_absolute": ((0, 0, 0), (0, 0, 0)),
    "gmpo": ((0, 0.25, 0), (0.25, 0, 0)),
    "sapo": ((0, 0, 0), (0, 0, 0)),
    "reinforce": ((0, 0, 0), (0, 0, 0)),
    "vespo": ((0, 0, 0), (0, 0, 0)),
    Objective(delta=1.3): ((0, 0.25, 0), (0.25, 0, 0.25)),
    Objective(delta=1.05, clip_high=0.3): ((0, 0.25, 0.25), (0.25, 0, 0)),
    Objective(dual_clip=1.3): ((0, 0.25, 0), (0.25, 0, 0.25)),
    Objective(ratio="sequence", clip_high=0.05): ((0, 1, 0), (0, 0, 0)),  # its mean is 0.1
}


@pytest.mark.parametrize("o", SHARES, ids=str)
def test_shares_of_clipped_tokens(o, backend):
    d = torch.tensor([[0.5, -0.5, 0.1, -0.1]])
    if isinstance(o, Objective) and o.ratio == "sequence":
        d = d + 0.1
    for a, want in zip((1.0, -1.0), SHARES[o], strict=True):
        out = vgkern.policy_loss(
            d - 1, torch.tensor([a]), objective=o, old_logp=torch.full((1, 4), -1.0),
            backend=backend
        ).metrics  # fmt: skip
        assert tuple(float(out[k]) for k in ("clip_low", "clip_high", "dual_clip")) == want


def test_pack_is_the_order_that_the_kernels_read():
    o = Objective(
        ratio="sequence_sum", surrogate="vespo", clip_low=0.1, clip_high=0.3, beta=0.5,
        kl="k3_clamped", kl_ratio_corrected=True, sampler_correction="token_mask", sampler_min=0.4,
        sampler_max=5.0, entropy_coef=0.01, tau_pos=1.5, tau_neg=1.6, vespo_k_pos=2.1,
        vespo_lambda_pos=3.1, vespo_k_neg=3.2, vespo_lambda_neg=2.2
    )  # fmt: skip
    assert o.pack() == [3, 4, 0.1, 0.3, 0, 0, 0.5, 3, True, False, 2, 0.4, 5.0, 0.01, 1.5, 1.6,
                        2.1, 3.1, 3.2, 2.2]  # fmt: skip
    assert objectives.GMPO.pack()[:2] == [5, 1] and objectives.SAPO.pack()[:2] == [1, 3]
    assert objectives.PPO.pack()[4:6] == [3.0, 0.0] and objectives.PPO_DELTA.pack()[4:6] == [0, 4]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": "geometric"}, "objective.ratio: got 'geometric'; allowed: token or sequence"),
        ({"surrogate": "vespo"}, "objective.ratio: got 'token'; allowed: sequence_sum with"),
        ({"surrogate": "cispo", "ratio": "none"}, "objective.ratio: got 'none'"),
        ({"surrogate": "sapo", "delta": 2.0}, "objective.delta: got 2.0; allowed: None with"),
        ({"surrogate": "linear", "dual_clip": 2.0}, "objective.dual_clip: got 2.0; allowed: None"),
        ({"delta": 1.0}, "objective.delta: got 1.0; allowed: None or a ratio > 1"),
        ({"tau_pos": 0.0}, "objective.tau_pos: got 0.0; allowed: a finite number > 0"),
        ({"vespo_k_neg": float("nan")}, "objective.vespo_k_neg: got nan"),
        ({"sampler_min": 4.0}, "objective.sampler_min: got 4.0; allowed: 0 <= sampler_min"),
        ({"advantage": "gae"}, "objective.advantage: got 'gae'; allowed: grpo, "),
    ],
)
def test_knobs_that_do_not_go_together(knobs, message):
    with pytest.raises(ValueError) as e:
        Objective(**knobs)
    assert message in str(e.value)


def test_the_maths_of_an_objective_needs_no_torch(tmp_path):
    """objective.h is shared with GPU kernels: it compiles alone, as host and as device code."""
    header = Path(__file__).parent.parent / "csrc" / "objective.h"
    source = tmp_path / "alone.cc"
    source.write_text(
        f'#include "{header}"\nusing namespace vgkern;\n'
        "VG_HD float f(const Token& t, const Objective& o) {\n"
        "  Sequence s = sequence_of(2, ratio_part(t, o), mismatch_part(t, o), o);\n"
        "  TokenLoss l = token_loss(t, s, o);\n"
        "  return l.slope + l.sequence_slope * ratio_share(t, s, o);\n}\n"
    )
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    nvcc = nvcc or shutil.which("/usr/local/bin/nvcc")
    found = [shutil.which(c) for c in ("c++", "g++", "clang++")]
    commands = [[c, "-fsyntax-only", "-std=c++17", "-Wall", "-Werror"] for c in found if c][:1]
    if nvcc:
        alone = ["-x", "cu", "-arch=sm_90", "-std=c++17", "-Werror", "all-warnings", "-dc"]
        commands.append([nvcc, *alone, "-o", str(tmp_path / "alone.o")])
    if not commands:
        pytest.skip("no C++ compiler here")
    for command in commands:
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
