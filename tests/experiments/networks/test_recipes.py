"""Starts on the boundary, and schedules at the steps where they turn."""

import jax
import numpy as np
import pytest

from l1inf_optax.experiments.networks import recipes
from l1inf_optax.linen import AugmentedMLP

PARAMS = jax.jit(AugmentedMLP((4, 3, 2)).init)(jax.random.key(0), np.zeros((1, 5)))


def test_columns_start_on_the_boundary_and_keep_the_ratios_of_their_weights():
    got = recipes.start_on_boundary(PARAMS, np.float32(0.3), 0.25, 7.0)["params"]
    for name in ("hidden_0", "hidden_1"):
        columns = np.asarray(got[name]["augmented_kernel"], np.float64)
        before = np.asarray(PARAMS["params"][name]["augmented_kernel"], np.float64)
        np.testing.assert_allclose(columns[0], 0.25 * 0.3, rtol=1e-6)
        np.testing.assert_allclose(np.abs(columns[1:]).sum(axis=0), 0.75 * 0.3, rtol=1e-5)
        np.testing.assert_allclose(
            columns[1:] / columns[1], before[1:] / before[1], rtol=1e-4, atol=1e-7
        )
    readout = PARAMS["params"]["readout"]
    np.testing.assert_allclose(got["readout"]["kernel"], 7 * readout["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(got["readout"]["bias"], readout["bias"])


def test_without_a_radius_only_the_readout_is_scaled():
    got = recipes.start_on_boundary(PARAMS, np.inf, 0.25, 7.0)["params"]
    for name in ("hidden_0", "hidden_1"):
        expected = PARAMS["params"][name]["augmented_kernel"]
        np.testing.assert_array_equal(got[name]["augmented_kernel"], expected)


@pytest.mark.parametrize(("step", "radius"), [(0, 0.8), (5, 0.4), (10, 0.2), (11, 0.2), (99, 0.2)])
def test_the_radius_falls_geometrically_and_stays(step, radius):
    assert recipes.falling_radius(0.2, 4.0, 10)(step) == pytest.approx(radius, rel=1e-5)
    assert recipes.falling_radius(np.inf, 4.0, 10)(step) == np.inf


@pytest.mark.parametrize(("step", "rate"), [(0, 0.0), (5, 0.25), (10, 0.5), (55, 0.25), (100, 0.0)])
def test_the_step_size_rises_and_falls(step, rate):
    schedule = recipes.warm_up_and_decay(0.5, 0.1, 100)
    assert schedule(step) == pytest.approx(rate, abs=1e-6)
