"""`sparse_tol` of the trainer: what is left out is measured, reported and bounded."""

import dataclasses

import pytest
from test_train import TINY, batch, gradient, trainer

from vgkern.errors import ConfigError
from vgkern.train.config import Config
from vgkern.train.report import speed
from vgkern.train.update import merge


@pytest.fixture(autouse=True)
def cpu():
    from conftest import skip_unless_runs

    skip_unless_runs("cpu")


def step(tol):
    made = trainer(sparse_tol=tol)
    prompts, rollout, rewards = batch(made)
    metrics = made.gradient(made.batch(prompts, rollout, rewards), first_pass=True)
    return made, metrics, gradient(made)


def test_the_gradient_is_as_near_as_it_says():
    _, plain, exact = step(0.0)
    _, metrics, found = step(0.4)
    assert metrics["loss"] == plain["loss"] and "sparse_error_dh" not in plain
    assert metrics["sparse_columns_dw"] < 1  # something was left out
    error = float((found - exact).norm() / exact.norm())
    told = max(metrics["sparse_error_dh"], metrics["sparse_error_dw"])
    assert 0 < error <= 2 * told and told < 0.8


def test_errors_of_micro_batches_merge_as_mean_squares():
    base = {"tokens": 1.0, "active": 1.0}
    out = merge([{**base, "sparse_error_dh": e, "sparse_columns_dh": e} for e in (1.0, 7.0)], False)
    assert out["sparse_error_dh"] == pytest.approx(5.0) and out["sparse_columns_dh"] == 4.0


def test_the_summary_says_what_was_left_out():
    made, metrics, _ = step(0.4)
    timing = {"ms_rollout": 1.0, "ms_score": 1.0, "ms_update": 1.0, "tokens": 9}
    made.log.of = lambda kind: [{**timing, **metrics}]
    made.log.records = [{"time": 1.0}]
    assert any("columns of the output layer multiplied" in line for line in speed(made))
    made.log.of = lambda kind: [timing]
    assert not any("columns" in line for line in speed(made))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"beta": 0.1}, "sparse_tol: got 0.001 with analytic terms"),
        ({"objective": "gspo"}, "sparse_tol: got 0.001 with objective 'gspo'"),
        ({"sparse_tol": 0.9}, "sparse_tol: got 0.9"),
    ],
)
def test_where_it_has_no_meaning_it_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(TINY, **{"sparse_tol": 1e-3, **settings})
    Config(sparse_tol=1e-3, beta=0.1, kl_estimator="sampled")
