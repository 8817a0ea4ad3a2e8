"""What is special to group_advantages: ragged ids, zero variance, and its invariances."""

import conftest
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vgkern
from vgkern.objectives import ESTIMATORS

BACKENDS = conftest.BACKENDS


def test_by_hand(backend):
    r = torch.tensor([1.0, 0.0, 1.0, 5.0, 7.0])
    g = torch.tensor([9, 9, 9, -4, -4])

    def of(estimator):
        return vgkern.group_advantages(r, g, estimator=estimator, backend=backend).tolist()

    s = (1 / 3) ** 0.5  # unbiased deviation of 1, 0, 1
    z = [1 / 3 / (s + 1e-4), -2 / 3 / (s + 1e-4)]
    t = 2**0.5
    assert of("grpo") == pytest.approx([*z, z[0], -1 / (t + 1e-4), 1 / (t + 1e-4)], rel=1e-6)
    assert of("dr_grpo") == pytest.approx([1 / 3, -2 / 3, 1 / 3, -1, 1], rel=1e-6)
    assert of("rloo") == pytest.approx([0.5, -1, 0.5, -2, 2], rel=1e-6)
    assert of("none") == r.tolist()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 1e30, -7.7])
@pytest.mark.parametrize("size", [2, 3, 7, 1001])
@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
def test_zero_variance_is_exactly_zero(estimator, size, value, backend):
    """Also for rewards whose mean rounds: nothing may be left to divide by a tiny deviation."""
    r = torch.full((size,), value)
    out = vgkern.group_advantages(
        r, torch.zeros(size, dtype=torch.int64), estimator=estimator, backend=backend
    )
    assert (out == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_and_ids_do_not_matter(estimator, backend):
    g = torch.Generator().manual_seed(0)
    r = torch.randn(50, generator=g)
    groups = torch.arange(50) // 3 % 15
    want = vgkern.group_advantages(r, groups, estimator=estimator, backend=backend)
    order = torch.randperm(50, generator=g)
    ids = torch.randint(-(2**60), 2**60, (15,), generator=g)[groups]
    got = vgkern.group_advantages(r[order], ids[order], estimator=estimator, backend=backend)
    torch.testing.assert_close(got, want[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_detachment(dtype, backend):
    r = torch.tensor([0.0, 1.0, 1.0], dtype=dtype, requires_grad=True)
    out = vgkern.group_advantages(r, torch.tensor([2, 2, 2]), backend=backend)
    assert out.dtype == dtype and not out.requires_grad


def test_large_offsets_keep_the_difference(backend):
    """fp64 statistics: rewards of 1e6 + {0, 1} in fp32."""
    r = 1e6 + torch.tensor([0.0, 1.0, 1.0, 0.0])
    out = vgkern.group_advantages(r, torch.zeros(4, dtype=torch.int64), backend=backend)
    small = vgkern.group_advantages(r - 1e6, torch.zeros(4, dtype=torch.int64), backend=backend)
    torch.testing.assert_close(out, small, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
@given(
    rewards=st.lists(st.integers(-64, 64), min_size=4, max_size=60),
    shift=st.integers(-1000, 1000),
    scale=st.sampled_from([0.5, 2.0, 8.0]),
)
def test_invariances(backend, rewards, shift, scale):
    """Mean 0 per group, blind to a shift of the rewards; z-scores, but for eps, to their scale."""
    r = torch.tensor(rewards, dtype=torch.float64) / 16
    groups = torch.arange(len(rewards)) % 2
    for estimator in ("grpo", "dr_grpo", "rloo"):
        a = vgkern.group_advantages(r, groups, estimator=estimator, backend=backend)
        for g in (0, 1):
            assert abs(float(a[groups == g].mean())) < 1e-9
        b = vgkern.group_advantages(r + shift, groups, estimator=estimator, backend=backend)
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        c = vgkern.group_advantages(r * scale, groups, estimator=estimator, backend=backend)
        want = a if estimator == "grpo" else a * scale
        torch.testing.assert_close(c, want, rtol=4e-2 if estimator == "grpo" else 1e-9, atol=1e-9)
