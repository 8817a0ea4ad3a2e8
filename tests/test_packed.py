"""Packed rows: `segments` gives what the padded batch gives; packed rows without are refused."""

import pytest
import torch

import vgkern
from vgkern import Objective, objectives
from vgkern.case_inputs import head, policy_rows
from vgkern.costate import Teacher, analytic_loss, future_advantages
from vgkern.ops import _check

LENGTHS = [4, 0, 1, 7, 3, 0]  # ragged, with empty segments in the middle and at the end
PRESETS = list(objectives.PRESETS)
THREE = [2, 5, 4]


def mask_of(lengths, masked=True):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    live = mask.clone()
    if masked:  # a token in a sequence that does not count
        live[3, 2] = False
    return mask, live


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def rows(lengths=LENGTHS, seed=0, objective=objectives.GRPO):
    """logp [S, T], what goes with it, and the two masks."""
    kept, live = mask_of(lengths, len(lengths) > 3)
    g = torch.Generator().manual_seed(seed)
    logp = -2 * torch.randn(kept.shape, generator=g).abs()
    x = policy_rows(logp.double(), objective, seed)
    a = torch.randn(len(lengths), generator=g)
    return logp, {k: v for k, v in x.items() if k.endswith("logp")}, a, kept, live


@pytest.mark.parametrize("form", ["[N]", "[1, N]"])
@pytest.mark.parametrize("name", PRESETS)
def test_packed_equals_padded(name, form, backend):
    o = objectives.PRESETS[name].replace(beta=0.1, entropy_coef=0.02)
    logp, logs, a, kept, live = rows(objective=o)
    entropy = torch.rand(logp.shape, generator=torch.Generator().manual_seed(1))
    x, e = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    want = vgkern.policy_loss(x, a, objective=o, mask=live, entropy=e, **logs, backend=backend)
    dx, de = torch.autograd.grad(1.7 * want.loss, (x, e))

    def flat(t):
        return t[kept][None] if form == "[1, N]" else t[kept]

    p, q = (flat(t.detach()).requires_grad_() for t in (x, e))
    got = vgkern.policy_loss(
        p, a, objective=o, mask=flat(live), entropy=q, segments=ends(LENGTHS), backend=backend,
        **{k: flat(t) for k, t in logs.items()},
    )  # fmt: skip
    dp, dq = torch.autograd.grad(1.7 * got.loss, (p, q))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dp, flat(dx), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dq, flat(de), rtol=1e-6, atol=1e-7)
    for k in want.metrics:
        torch.testing.assert_close(got.metrics[k], want.metrics[k], rtol=1e-6, atol=1e-7)


def test_three_samples_of_four_tokens_under_gspo(backend):
    """Packed as one row they were taken for one sequence: -0.6570 for this -0.6597 in kind."""
    logp, logs, a, _, _ = rows([4, 4, 4], seed=3)
    truth = []
    for s in range(3):  # by hand
        own = (logp[s].double() - logs["old_logp"][s].double()).mean()
        r = own.exp()
        truth.append(-torch.minimum(r * a[s], r.clamp(1 - 3e-4, 1 + 4e-4) * a[s]))
    got = vgkern.policy_loss(
        logp.reshape(1, -1), a, objective="gspo", old_logp=logs["old_logp"].reshape(1, -1),
        segments=torch.tensor([0, 4, 8, 12]), backend=backend,
    )  # fmt: skip
    assert abs(float(got.loss) - float(torch.stack(truth).mean())) < 1e-6


def test_a_sequence_mask_drops_sequences_not_the_batch(backend):
    o = objectives.DAPO.replace(sampler_correction="sequence_mask", sampler_min=0.9)
    logp, _, a, _, _ = rows([4, 4, 4], seed=3)
    sampler = logp.clone()
    sampler[1] -= 2.0  # this one alone is beyond the bound
    want = vgkern.policy_loss(logp, a, objective=o, sampler_logp=sampler, backend=backend).loss
    got = vgkern.policy_loss(
        logp.reshape(-1), a, objective=o, sampler_logp=sampler.reshape(-1),
        segments=torch.tensor([0, 4, 8, 12]), backend=backend,
    ).loss  # fmt: skip
    assert abs(float(got)) > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "luspo", "gspo", "gspo_token", "gmpo", "vespo"]
)
@pytest.mark.parametrize("by", ["advantages", "rewards", "token advantages"])
def test_the_fused_loss(name, by, backend):
    kept, live = mask_of(LENGTHS)
    x, logp, _ = head(kept.shape, 16, 50, torch.float32, 0)
    logs = {"old_logp": policy_rows(logp, objectives.GRPO, 0)["old_logp"]}
    pick = torch.Generator().manual_seed(2)
    given = {
        "advantages": {"advantages": torch.randn(6, generator=pick)},
        "rewards": {"rewards": torch.rand(6, generator=pick),
                    "groups": torch.tensor([0, 0, 1, 1, 2, 2])},
        "token advantages": {"advantages": torch.randn(kept.shape, generator=pick)},
    }[by]  # fmt: skip
    h, w = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    if by == "token advantages":
        with pytest.warns(UserWarning, match="advantages: got different ones in row"):
            want = vgkern.linear_policy_loss(
                h, w, x["targets"], objective=name, mask=live, **logs, **given, backend=backend
            )
        given = {"advantages": given["advantages"][kept][None]}
    else:
        want = vgkern.linear_policy_loss(
            h, w, x["targets"], objective=name, mask=live, **logs, **given, backend=backend
        )
    dh, dw = torch.autograd.grad(want.loss, (h, w))
    p = h.detach()[kept][None].requires_grad_()
    got = vgkern.linear_policy_loss(
        p, w, x["targets"][kept][None], objective=name, mask=live[kept][None],
        old_logp=logs["old_logp"][kept][None], segments=ends(LENGTHS, torch.int64), **given,
        backend=backend,
    )  # fmt: skip
    dp, dq = torch.autograd.grad(got.loss, (p, w))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dp, dh[kept][None], rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(dq, dw, rtol=2e-5, atol=1e-6)


def test_the_modules_take_it(backend):
    from vgkern.nn import PolicyLoss

    logp, logs, a, kept, _ = rows()
    given = {"segments": ends(LENGTHS), "old_logp": logs["old_logp"][kept], "backend": backend}
    one = PolicyLoss("gspo")(logp[kept], a, **given).loss
    assert torch.equal(one, vgkern.policy_loss(logp[kept], a, objective="gspo", **given).loss)


def test_analytic_losses_packed():
    """Costs to come stay within their sequence and meet their group at their own position."""
    lengths = [4, 1, 7, 3]
    kept = torch.arange(7) < torch.tensor(lengths)[:, None]
    groups = torch.tensor([5, 5, 9, 9])
    cost = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    want = future_advantages(cost, groups, mask=kept, discount=0.9)
    got = future_advantages(cost[kept], groups, segments=ends(lengths), discount=0.9)
    torch.testing.assert_close(got, want[kept], rtol=1e-6, atol=1e-7)

    x, _, _ = head((4, 7), 16, 50, torch.float32, 0)
    t, _, _ = head((4, 7), 24, 50, torch.float32, 1)
    h, w = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    options = {"groups": groups, "rewards": torch.tensor([1.0, 0, 1, 0]), "entropy_coef": 0.1}
    whole = analytic_loss(
        h, w, x["targets"], Teacher(t["hidden"], t["weight"]), mask=kept, **options
    )
    dh, dw = torch.autograd.grad(whole.loss, (h, w))
    p = h.detach()[kept].requires_grad_()
    packed = analytic_loss(
        p, w, x["targets"][kept], Teacher(t["hidden"][kept], t["weight"]),
        segments=ends(lengths), **options,
    )  # fmt: skip
    dp, dq = torch.autograd.grad(packed.loss, (p, w))
    torch.testing.assert_close(packed.loss, whole.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dp, dh[kept], rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(dq, dw, rtol=2e-5, atol=1e-6)
    for k in whole.metrics:
        torch.testing.assert_close(packed.metrics[k], whole.metrics[k], rtol=1e-5, atol=1e-6)


def test_nothing_at_all(backend):
    out = vgkern.policy_loss(
        torch.zeros(0, requires_grad=True), torch.zeros(0), objective="gspo",
        segments=torch.tensor([0]), backend=backend,
    )  # fmt: skip
    assert float(out.loss) == 0
    out = vgkern.policy_loss(
        torch.zeros(0, requires_grad=True), torch.zeros(2), objective="gspo",
        segments=torch.tensor([0, 0, 0]), backend=backend,
    )  # fmt: skip
    assert float(out.loss) == 0


SEQUENCES = [n for n, o in objectives.PRESETS.items()
             if o.reduction in ("seq", "seq_sum", "fixed") or not o.row_local]  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_packed_rows_without_segments_are_refused(name):
    logp, _, a, kept, _ = rows(THREE)
    by_row = a.repeat_interleave(torch.tensor(THREE))
    for x, rows_ in ((logp[kept], by_row), (logp[kept][None], by_row[None])):
        with pytest.raises(ValueError, match=r"segments=, the cumulative lengths"):
            vgkern.policy_loss(x, rows_, objective=name)
    x, _, _ = head((11,), 8, 30, torch.float32, 0)
    with pytest.raises(ValueError, match=r"^targets: .*segments="):
        vgkern.linear_policy_loss(x["hidden"], x["weight"], x["targets"], by_row, objective=name)
    # and what the message names is right
    vgkern.policy_loss(logp[kept][None], by_row[None], objective=name,
                       segments=torch.tensor([0, 11]))  # fmt: skip


def test_one_row_with_one_advantage_is_a_batch_of_one():
    logp, _, a, kept, _ = rows(THREE)
    vgkern.policy_loss(logp[kept][None], a[:1], objective="gspo")
    vgkern.policy_loss(logp[kept][None], a[:1, None].expand(1, 11), objective="gspo")


@pytest.mark.parametrize(
    "segments, error, words",
    [
        ([0.0, 11.0], TypeError, "int32 or int64"),
        ([0, 4, 10], ValueError, "0 first and 10 last"),
        ([1, 4, 11], ValueError, "1 first"),
        ([0, 7, 4, 11], ValueError, "4 after 7 at 2"),
        ([[0, 11]], ValueError, r"tensor \[1, 2\]"),
        ([], ValueError, r"tensor \[0\]"),
        ([0], ValueError, "0 first and 0 last"),
    ],
)
def test_segments_that_are_none(segments, error, words):
    logp, _, a, kept, _ = rows(THREE)
    kind = None if segments and isinstance(segments[0], float) else torch.int64
    with pytest.raises(error, match=f"^segments: .*{words}"):
        vgkern.policy_loss(logp[kept], a, segments=torch.tensor(segments, dtype=kind))
    with pytest.raises(TypeError, match=r"^segments: got list"):
        vgkern.policy_loss(logp[kept], a, segments=[0, 11])
    with pytest.raises(ValueError, match=r"^segments: got rows of shape \[3, 5\]"):
        vgkern.policy_loss(logp, a, segments=torch.tensor([0, 15]))
    with pytest.raises(ValueError, match=r"^advantages: .*\[3\] for the segments"):
        vgkern.policy_loss(logp[kept], a[:2], segments=ends(THREE))


@pytest.mark.parametrize("segments", [[0, 4, 10], [3, 4, 11], [0, 7, 4, 11], [0, 4, 2**40]])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_where_nobody_can_look_the_loss_is_nan(segments, name, backend, monkeypatch):
    """As on a GPU: no row outside is touched, and nothing looks right."""
    monkeypatch.setattr(_check, "can_look", lambda device: False)
    logp, _, _, kept, _ = rows(THREE)
    given = torch.tensor(segments)
    a = torch.ones(len(segments) - 1)
    if backend == "cpu" and name == "gspo":
        given = given.clamp(0, 11)
        if segments in ([0, 4, 10], [3, 4, 11], [0, 7, 4, 11]):
            with pytest.raises(RuntimeError, match="segments must rise from 0 to 11"):
                vgkern.policy_loss(logp[kept], a, objective=name, segments=given, backend=backend)
            return
    out = vgkern.policy_loss(logp[kept], a, objective=name, segments=given, backend=backend)
    assert bool(out.loss.isnan()) or (backend == "cpu" and name == "gspo")


def test_token_weights(backend):
    """A factor of each term; the denominator counts tokens; 0 is masked."""
    logp, logs, a, kept, live = rows()
    weight = torch.rand(logp.shape, generator=torch.Generator().manual_seed(4)) + 0.1
    weight[0, 1] = 0
    o = Objective(reduction="seq", beta=0.0)
    x = logp.clone().requires_grad_()
    out = vgkern.policy_loss(
        x, a, objective=o, mask=live, token_weight=weight, backend=backend, **logs
    )
    m = (live & (weight != 0)).double()
    r = (logp.double() - logs["old_logp"].double()).exp()
    A = a.double()[:, None]
    terms = -torch.minimum(r * A, r.clamp(0.8, 1.2) * A) * weight.double() * m
    truth = (terms.sum(1) / m.sum(1).clamp(min=1)).mean()
    assert abs(float(out.loss) - float(truth)) < 1e-6
    (g,) = torch.autograd.grad(out.loss, x)
    assert float(g[0, 1]) == 0
    packed = vgkern.policy_loss(
        logp[kept], a, objective=o, mask=live[kept], token_weight=weight[kept],
        segments=ends(LENGTHS), backend=backend, **{k: t[kept] for k, t in logs.items()},
    )  # fmt: skip
    torch.testing.assert_close(packed.loss, out.loss.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_token_weights_that_are_none(bad):
    w = torch.ones(2, 3)
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"^token_weight: .* at \[1, 2\]"):
        vgkern.policy_loss(torch.zeros(2, 3), torch.ones(2), token_weight=w)
    w[1, 2] = bad
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    vgkern.policy_loss(torch.zeros(2, 3), torch.ones(2), token_weight=w, mask=mask)


@pytest.mark.parametrize("bad", [0.5, -1.0, 2, float("nan")])
def test_masks_that_are_none(bad):
    """They counted as 1."""
    mask = torch.ones(2, 3, dtype=torch.int64 if isinstance(bad, int) else torch.float32)
    mask[1, 2] = bad
    x, _, _ = head((2, 3), 8, 30, torch.float32, 0)
    calls = (
        lambda: vgkern.policy_loss(torch.zeros(2, 3), torch.ones(2), mask=mask),
        lambda: vgkern.linear_policy_loss(
            x["hidden"], x["weight"], x["targets"], torch.ones(2), mask=mask
        ),
        lambda: vgkern.linear_divergence(
            x["hidden"], x["weight"], x["hidden"], x["weight"], mask=mask
        ),
        lambda: future_advantages(torch.zeros(2, 3), torch.zeros(2).long(), mask=mask),
        lambda: analytic_loss(
            x["hidden"], x["weight"], x["targets"], rewards=torch.ones(2),
            groups=torch.zeros(2).long(), mask=mask,
        ),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(
            ValueError, match=r"^mask: got .* at \[1, 2\]; allowed: 0 or 1, or bool"
        ):
            call()
