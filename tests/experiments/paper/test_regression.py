"""The command from its arguments to the files it writes, with few steps; its recipe."""

import itertools
import json

import jax
import matplotlib.image
import numpy as np
import optax
import pytest

import l1inf_optax as l1inf
from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.paper import regression

STEPS = 12


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "regression"
    arguments = ["--c", "inf", "1", "0.35", "--epochs", str(STEPS), "--trials", "2"]
    assert main(["regression", *arguments, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), out


def test_the_json_has_a_row_for_every_c_beside_the_papers(result):
    document, out = result
    assert document["experiment"] == "regression"
    assert document["settings"] == {"c": [None, 1.0, 0.35], "epochs": STEPS, "trials": 2, "seed": 1}
    free, one, other = document["rows"]
    assert (free["c"], one["c"], other["c"]) == (None, 1.0, 0.35)
    assert (free["paper_test_error"], free["paper_sparsity"]) == (69.520, 3.02)
    assert (one["paper_test_error"], one["paper_sparsity"]) == (2.424, 84.69)
    assert "paper_test_error" not in other
    for row in document["rows"]:
        assert row["test_error"] > 0
        assert row["sparsity"] <= row["sparsity_1e-3"] <= 100
    assert str(out) not in json.dumps(document)


def test_the_lasso_is_measured_on_the_same_data(result):
    lasso = result[0]["lasso_cv"]
    assert 1.0 < lasso["test_error"] < 4.0  # the noise has variance 1, the target about 150
    assert 50 < lasso["sparsity"] < 90  # 90% of the coefficients are zero
    assert lasso["std"]["test_error"] > 0


def test_the_figure_is_written_and_not_blank(result):
    _, out = result
    assert {path.name for path in out.iterdir()} == {"results.json", "trials.png"}
    pixels = matplotlib.image.imread(out / "trials.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(("c", "norm", "readout"), [(0.25, 0.45, 14 / 0.25**1.7), (10.0, 18.0, 1)])
def test_the_start(c, norm, readout):
    key = jax.random.key(3)
    plain = regression.NETWORK.init(key, np.zeros((1, synthetic.REGRESSION_INPUTS)))["params"]
    params = regression.make_task(STEPS).init(key, np.float32(c))["params"]
    columns = np.asarray(params["hidden_0"]["augmented_kernel"], np.float64)
    np.testing.assert_allclose(np.abs(columns).sum(axis=0), norm, rtol=1e-5)
    np.testing.assert_allclose(columns[0], norm / 2, rtol=1e-6)
    np.testing.assert_allclose(
        params["readout"]["kernel"], readout * plain["readout"]["kernel"], rtol=1e-5
    )


def test_without_a_constraint_the_start_is_the_networks_own():
    key = jax.random.key(3)
    plain = regression.NETWORK.init(key, np.zeros((1, synthetic.REGRESSION_INPUTS)))
    params = regression.make_task(STEPS).init(key, np.float32(np.inf))
    jax.tree.map(np.testing.assert_array_equal, params, plain)


@pytest.mark.parametrize("c", [0.25, 4.0])
def test_columns_fall_into_the_ball_and_their_zeros_stay(c):
    task, c = regression.make_task(STEPS), np.float32(c)
    params = task.init(jax.random.key(0), c)
    tx = task.optimizer(c)
    state = tx.init(params)
    kernels = []
    for step in range(STEPS):
        grads = jax.tree.map(
            lambda p, s=step: np.sin(np.arange(p.size) + s).reshape(p.shape), params
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        kernels.append(np.asarray(params["params"]["hidden_0"]["augmented_kernel"]))
    fallen = kernels[round(0.4 * STEPS) :]
    assert l1inf.l1inf_norm(kernels[0]) > c
    assert all(l1inf.l1inf_norm(kernel) <= c for kernel in fallen)
    assert (fallen[0] == 0).mean() > 0.1
    for before, after in itertools.pairwise(fallen[1:]):
        assert (after[before == 0] == 0).all()


def test_a_small_radius_slows_the_hidden_layer_alone():
    task = regression.make_task(STEPS)
    like = task.init(jax.random.key(0), np.float32(1))
    params = jax.tree.map(np.zeros_like, like)  # inside every ball, so that nothing is projected
    grads = jax.tree.map(lambda p: np.eye(*p.shape) if p.ndim == 2 else np.ones(p.shape), params)
    for c, hidden in ((0.25, 0.015), (1.0, 0.03), (np.inf, 0.03)):
        tx = task.optimizer(np.float32(c))
        _, state = tx.update(grads, tx.init(params), params)  # the first rate is zero,
        updates, _ = tx.update(grads, state, params)  # the second the highest
        layers = updates["params"]
        np.testing.assert_allclose(layers["hidden_0"]["augmented_kernel"][0, 0], -hidden, rtol=1e-4)
        np.testing.assert_allclose(layers["readout"]["kernel"][0, 0], -0.03, rtol=1e-4)
