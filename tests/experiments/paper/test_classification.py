"""The command from its arguments to the files it writes, with few steps; its recipe."""

import itertools
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import l1inf_optax as l1inf
from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.paper import classification
from l1inf_optax.linen import AugmentedMLP

STEPS = 20
LAYERS = ("hidden_0", "hidden_1", "hidden_2")
EVERYWHERE = {"hidden_0": 0.05, "hidden_1": 0.5, "hidden_2": 0.125}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "classification"
    arguments = ["--c", "inf", "1", "0.35", "--epochs", "2", "--trials", "2", "--starts", "2"]
    assert main(["classification", *arguments, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), out


def test_the_json_has_a_row_for_every_c_beside_the_papers(result):
    document, out = result
    assert document["experiment"] == "classification"
    expected = {"c": [None, 1.0, 0.35], "epochs": 2, "trials": 2, "starts": 2, "seed": 1}
    assert document["settings"] == expected
    free, one, other = document["rows"]
    assert (free["c"], one["c"], other["c"]) == (None, 1.0, 0.35)
    assert (free["paper_test_accuracy"], free["paper_sparsity"]) == (71.60, 2.39)
    assert (one["paper_test_accuracy"], one["paper_sparsity"]) == (83.50, 66.71)
    assert "paper_test_accuracy" not in other
    for row in document["rows"]:
        assert 0 < row["test_accuracy"] < 100
        assert 0 <= row["true_inputs"] <= 4
        assert row["sparsity"] <= row["sparsity_1e-3"] <= 100
    assert str(out) not in json.dumps(document)


def test_the_figures_are_written_and_not_blank(result):
    _, out = result
    assert {p.name for p in out.iterdir()} == {"results.json", "trials.png", "weights.png"}
    for name in ("trials.png", "weights.png"):
        pixels = matplotlib.image.imread(out / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_an_inputs_weight_is_its_sum_over_all_units():
    kernels = np.zeros((3, 8, 2))
    kernels[0, 1:5] = 1  # row 0 is the bias
    kernels[1, [0, 1, 6, 7]] = 1
    kernels[1, [2, 5]] = [[0.6, -0.6], [0, -1.1]]
    kernels[2, 4:8] = -1
    np.testing.assert_array_equal(classification.true_inputs(kernels), [4, 2, 1])


# --- the recipe -----------------------------------------------------------------------------------


def outputs(c):
    """Of a network at its start, and the network."""
    task = classification.make_task(STEPS)
    params = task.init(jax.random.key(2), c)
    x = np.random.default_rng(0).normal(size=(40, 500)).astype(np.float32)
    return np.asarray(task.apply(params, x)), params["params"]


@pytest.mark.parametrize("c", [0.1, 0.01, EVERYWHERE])
def test_a_smaller_radius_hardly_changes_the_start_but_for_the_scale_of_the_layers(c):
    expected, _ = outputs(0.001)
    got, params = outputs(c)
    np.testing.assert_allclose(got, expected, rtol=0.05, atol=1e-3)
    scale = 1.0
    for name in LAYERS:
        radius = c if isinstance(c, float) else c[name]
        columns = np.abs(np.asarray(params[name]["augmented_kernel"], np.float64))
        first = 10 if name == "hidden_0" else 2
        share = 0.02 if name == "hidden_0" else 0.1 * scale
        np.testing.assert_allclose(columns.sum(axis=0), first * radius, rtol=1e-5)
        np.testing.assert_allclose(columns[0], share * first * radius, rtol=1e-5)
        scale *= radius


@pytest.mark.parametrize("factor", [None, 0.125])  # of all rates, where a lane names one
@pytest.mark.parametrize("c", [0.25, EVERYWHERE])
def test_steps_are_in_proportion_to_what_they_move(c, factor):
    task = classification.make_task(STEPS)
    params = jax.tree.map(jnp.zeros_like, task.init(jax.random.key(0), c))  # inside every ball
    grads = jax.tree.map(lambda p: jnp.eye(*p.shape) if p.ndim == 2 else jnp.ones(p.shape), params)
    tx = task.optimizer(c) if factor is None else task.optimizer(c, factor)
    state = tx.init(params)
    for _ in range(3):  # after a tenth of the steps the rate is the highest
        updates, state = tx.update(grads, state, params)
    steps = jax.tree.map(lambda u: -np.asarray(u) / (factor or 1.0), updates)["params"]
    scale = 1.0
    for name in LAYERS:
        radius = c if isinstance(c, float) else c[name]
        rate, bias_rate = (
            (classification.RATES[0], classification.BIAS_RATE[0])
            if name == "hidden_0"
            else (classification.RATES[1], classification.BIAS_RATE[1])
        )
        kernel = steps[name]["augmented_kernel"]
        np.testing.assert_allclose(kernel[1, 1], rate * radius, rtol=1e-4)
        np.testing.assert_allclose(kernel[0, 0], bias_rate * scale * rate * radius, rtol=1e-4)
        scale *= radius
    readout = steps["readout"]
    np.testing.assert_allclose(
        readout["kernel"][0, 0], classification.READOUT_RATE / scale, rtol=1e-4
    )
    np.testing.assert_allclose(readout["bias"], classification.READOUT_BIAS_RATE, rtol=1e-4)


@pytest.mark.parametrize("c", [0.05, EVERYWHERE])
def test_columns_fall_into_the_ball_and_their_zeros_stay(c):
    radii = c if isinstance(c, dict) else dict.fromkeys(LAYERS, c)
    radii = {layer: np.float32(radius) for layer, radius in radii.items()}
    task, c = classification.make_task(STEPS), jax.tree.map(np.float32, c)
    params = task.init(jax.random.key(0), c)
    tx = task.optimizer(c)
    state = tx.init(params)
    kernels = []
    for step in range(STEPS):
        grads = jax.tree.map(
            lambda p, s=step: np.sin(np.arange(p.size, dtype=np.float32) + s).reshape(p.shape),
            params,
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        kernels.append({k: np.asarray(params["params"][k]["augmented_kernel"]) for k in LAYERS})
    fallen = kernels[round(classification.FALL * STEPS) :]
    for name in LAYERS:
        assert l1inf.l1inf_norm(kernels[0][name]) > radii[name]
        assert all(l1inf.l1inf_norm(kernel[name]) <= radii[name] for kernel in fallen)
        for before, after in itertools.pairwise(fallen[1:]):
            assert (after[name][before[name] == 0] == 0).all()
    assert (fallen[0]["hidden_0"] == 0).mean() > 0.1


def test_without_a_constraint_the_hidden_layers_start_as_the_networks_own():
    params = classification.make_task(STEPS).init(jax.random.key(3), np.float32(np.inf))["params"]
    network = AugmentedMLP((*classification.HIDDEN, 2))
    plain = network.init(jax.random.key(3), np.zeros((1, 500)))["params"]
    for name in LAYERS:
        jax.tree.map(np.testing.assert_array_equal, params[name], plain[name])
