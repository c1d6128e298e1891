"""Every promise of the README and every public name, once each, in half a minute.

``python -m pytest -m quick`` runs these, and what else has that marker. They find what is broken
altogether, on the way; the other tests find what is broken in a corner.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import l1inf_optax as l1inf
from l1inf_optax import bounds, plotting, selection
from tests.support import oracle

mpl.use("Agg")

import matplotlib.pyplot as plt

pytestmark = pytest.mark.quick

C = 0.5
BALL = {"hidden_*": C}
X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = np.sin(X[:, :1])
MODEL = l1inf.linen.AugmentedMLP((3, 1))
CHAINED = optax.chain(optax.sgd(0.1, momentum=0.9), l1inf.keep_params_in_l1inf_ball(BALL))
IN_ADAMS_METRIC = l1inf.constrain(optax.adam(0.05), BALL)
TRANSFORMATIONS = {"chained": CHAINED, "in Adam's metric": IN_ADAMS_METRIC}


def loss(params):
    return jnp.mean((MODEL.apply(params, X) - Y) ** 2)


@pytest.fixture(scope="module")
def start():
    """Parameters in the ball."""
    params = jax.jit(MODEL.init)(jax.random.key(0), X)
    return l1inf.project_params(params, BALL)


@pytest.fixture(scope="module")
def trained(start):
    """By transformation: what twenty steps in one scan end with."""

    def train(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["params"]["hidden_0"]["augmented_kernel"]

        carry = start, tx.init(start)
        return jax.jit(lambda carry: jax.lax.scan(step, carry, length=20))(carry)

    return {name: train(tx) for name, tx in TRANSFORMATIONS.items()}


@pytest.fixture(scope="module")
def project():
    return jax.jit(l1inf.projection_l1inf_ball)


MATRIX = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def test_a_projection_is_exact_and_a_norm_too(project):
    got = np.asarray(project(MATRIX, C))
    for column, projected in zip(MATRIX.T, got.T, strict=True):
        exact = [float(x) for x in oracle.project(column, C)]
        np.testing.assert_allclose(projected, exact, rtol=0, atol=4 * 2**-23 * C)
        assert oracle.norm64(projected) <= C
    norms = [oracle.norm64(column) for column in MATRIX.T]
    np.testing.assert_allclose(float(l1inf.l1inf_norm(MATRIX)), max(norms), rtol=1e-6)


def test_a_column_inside_is_untouched_and_a_nan_stays_at_home(project):
    x = MATRIX.copy()
    x[:, 0] /= 100
    x[1, 1] = np.nan
    got = np.asarray(project(x, C))
    np.testing.assert_array_equal(got[:, 0], x[:, 0])
    assert np.isnan(got[:, 1]).all()
    np.testing.assert_array_equal(got[:, 2], project(MATRIX, C)[:, 2])


def test_a_projection_has_derivatives_and_maps_over_radii(project):
    value = jax.jit(
        jax.vmap(jax.value_and_grad(lambda c: l1inf.projection_l1inf_ball(MATRIX, c).sum()))
    )
    radii = jnp.array([C, C / 2])
    sums, slopes = value(radii)
    np.testing.assert_allclose(sums, [project(MATRIX, c).sum() for c in radii], rtol=1e-5)
    support = np.asarray(project(MATRIX, C)) != 0
    slope = ((np.sign(MATRIX) * support).sum(0) / support.sum(0)).sum()
    np.testing.assert_allclose(slopes[0], slope, rtol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_step_is_feasible_and_learns(name, start, trained):
    (params, state), kernels = trained[name]
    assert (np.abs(np.asarray(kernels, np.float64)).sum(1) <= C).all()
    assert loss(params) < loss(start)
    kind = l1inf.KeepParamsInL1InfBallState if name == "chained" else l1inf.ConstrainState
    states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    assert any(isinstance(x, kind) for x in states)


def test_a_radius_falls_from_a_share_of_a_norm_and_holds_the_zeros(start):
    (radius,) = l1inf.relative_radii(start, {"hidden_*": 0.5}).values()
    np.testing.assert_allclose(radius, C / 2, rtol=1e-5)
    tx = l1inf.constrain(optax.adam(0.05), {"hidden_*": l1inf.shrink(radius, over=3)})
    params, state = start, tx.init(start)
    for _ in range(5):
        updates, state = jax.jit(tx.update)(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert isinstance(state.ball.shrinking, l1inf.ShrinkState)
    assert jax.tree.leaves(state.ball.shrinking.held_from) == [3]
    kernel = np.asarray(params["params"]["hidden_0"]["augmented_kernel"], np.float64)
    assert np.abs(kernel).sum(0).max() <= radius


def test_a_share_of_the_weights_becomes_zero_and_stays(start):
    tx = l1inf.constrain(optax.adam(0.05), {"hidden_*": l1inf.prune(0.75, over=2)})
    params, state = start, tx.init(start)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        weights = np.asarray(params["params"]["hidden_0"]["augmented_kernel"])[1:]
    assert (weights == 0).sum() == np.ceil(0.75 * weights.size)


def test_small_balls_are_made_up_for_in_the_readout(start):
    rescaled = l1inf.rescale_params(MODEL.apply, start, X, {"hidden_*": C / 10}, reference=C)
    assert isinstance(rescaled, l1inf.Rescaled)
    outputs = (MODEL.apply(params, X) for params in (rescaled.params, start))
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    state = l1inf.with_scales(optax.adam(0.1), rescaled.scales).init(rescaled.params)
    assert isinstance(state, l1inf.WithScalesState)


def test_a_state_comes_back_from_a_checkpoint(trained, tmp_path):
    (_, state), _ = trained["chained"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_layers_of_other_libraries_are_found_or_described():
    kernel = jnp.ones((4, 3))
    plain = {"hidden_0": {"kernel": kernel, "bias": jnp.zeros(3)}}
    table = {"table": jnp.ones((3, 4))}
    numbers = l1inf.LayerDimensionNumbers(1, 0)
    found = l1inf.project_params(plain, C)["hidden_0"]["kernel"]
    described = l1inf.project_params(table, C, layers={"table": numbers})["table"]
    np.testing.assert_allclose(found, np.full((4, 3), C / 4), rtol=1e-6)
    np.testing.assert_array_equal(described, found.T)
    augmented = {"hidden_0": {"augmented_kernel": jnp.zeros((5, 3))}}
    back = l1inf.convert_params(l1inf.convert_params(plain, augmented), plain)
    jax.tree.map(np.testing.assert_array_equal, back, plain)


def test_wrong_use_is_an_error_that_helps(start):
    with pytest.raises(ValueError, match="nowhere"):
        l1inf.project_params(start, {"nowhere": C})
    with pytest.raises(ValueError, match="metric"):
        l1inf.constrain(optax.lion(1e-3), C).init(start)


@pytest.mark.parametrize(
    ("layer", "plain", "inputs"),
    [
        (l1inf.linen.AugmentedDense(3), nn.Dense(3), X),
        (l1inf.linen.AugmentedConv(2, (2,)), nn.Conv(2, (2,)), X[None]),
    ],
    ids=["dense", "conv"],
)
def test_linen_layers_compute_what_flax_computes(layer, plain, inputs):
    params = jax.jit(plain.init)(jax.random.key(0), inputs)
    like = jax.eval_shape(layer.init, jax.random.key(0), inputs)
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    got = layer.apply(l1inf.convert_params(params, like), inputs)
    np.testing.assert_allclose(got, plain.apply(params, inputs), rtol=1e-5, atol=1e-6)


def test_nnx_layers_hold_the_one_matrix():
    rngs = nnx.Rngs(0)
    linear = l1inf.nnx.AugmentedLinear(4, 3, rngs=rngs)
    np.testing.assert_allclose(linear(X), X @ linear.kernel + linear.bias, rtol=1e-5, atol=1e-6)
    assert l1inf.nnx.AugmentedConv(4, 2, (2,), rngs=rngs)(X[None]).shape == (1, 16, 2)
    mlp = l1inf.nnx.AugmentedMLP(4, (3, 1), rngs=rngs)
    got = l1inf.project_params(mlp, C)
    assert float(l1inf.l1inf_norm(nnx.state(got)["hidden_0"]["augmented_kernel"][...])) <= C


def test_reports_and_findings_say_what_is_the_case(start, trained):
    (params, _), _ = trained["chained"]
    report = l1inf.sparsity_report(params, c=BALL)
    assert isinstance(report, l1inf.SparsityReport)
    assert all(isinstance(layer, l1inf.LayerSparsity) for layer in report.layers)
    assert "hidden_0" in str(report)
    diagnosis = l1inf.diagnose(CHAINED, start, BALL)
    assert isinstance(diagnosis, l1inf.Diagnosis)
    turned = optax.chain(l1inf.keep_params_in_l1inf_ball(BALL), optax.sgd(0.1))
    findings = l1inf.diagnose(turned, start, BALL).findings
    assert findings
    assert all(isinstance(finding, l1inf.Finding) for finding in findings)


def test_bounds_hold_numbers_and_certify_a_network(start):
    sample = {"n": 500, "m1": 4, "k": 1, "c": C}
    complexity = bounds.rademacher_bound(**sample, o=1.0)
    assert 0 < float(complexity) < float(bounds.regression_bound(**sample, norm=1.0, delta=0.05))
    norms = {"norm_1_1": 1.0, "norm_1_inf": 0.5}
    assert float(bounds.classification_bound(**sample, m2=2, **norms, delta=0.05)) > 0
    x = np.clip(X, -1, 1)
    certificate = bounds.certificate(start, x, Y, apply=MODEL.apply, c=BALL)
    assert isinstance(certificate, bounds.Certificate)
    assert isinstance(certificate.for_c, bounds.GapBound)


def test_c_is_found_by_cross_validation_and_by_search():
    folds = selection.cross_validate(
        lambda key, c: {"w": jnp.zeros(4)},
        lambda params, x: x @ params["w"],
        lambda outputs, y: (outputs - y) ** 2,
        lambda c: optax.sgd(0.01 * c),
        X,
        Y[:, 0],
        [0.5, 5.0],
        epochs=2,
        batch_size=8,
        cv=2,
    )
    assert isinstance(folds, selection.CrossValidation)
    assert folds.best_c == 5.0

    def hill(candidates):
        scores = [[-abs(np.log(c["hidden_0"]))] * 2 for c in candidates]
        return selection.CrossValidation(tuple(candidates), np.array(scores))

    found = selection.search_layer_c(hill, {"hidden_0": (0.1, 10.0)}, rounds=2)
    assert 0.1 <= found.best_c["hidden_0"] <= 10


DRAWN = {
    "plot_ball": partial(plotting.plot_ball, C),
    "plot_bounds": partial(
        plotting.plot_bounds, [0.5, 1.0], [0.1, 0.2], {"ours": [1.0, 2.0]}, trivial=1.5
    ),
    "plot_newton": partial(plotting.plot_newton, MATRIX[:, 0], C),
    "plot_path": partial(plotting.plot_path, [0.1, 1.0], np.ones((2, 3))),
    "plot_projection": partial(plotting.plot_projection, MATRIX[:2], C),
    "plot_receptive_fields": partial(plotting.plot_receptive_fields, MATRIX, (2, 2)),
    "plot_receptive_fields_over_training": partial(
        plotting.plot_receptive_fields_over_training, np.stack([MATRIX, MATRIX]), [0, 1], (2, 2)
    ),
    "plot_selection": partial(
        plotting.plot_selection,
        [0.5, 1.0],
        [-1.0, -2.0],
        [0.1, 0.1],
        best=0.5,
        one_standard_error=0.5,
    ),
    "plot_threshold": partial(plotting.plot_threshold, MATRIX[:, 0], 0.1),
    "plot_tradeoff": partial(plotting.plot_tradeoff, [0.5, 1.0], [90.0, 91.0], [80.0, 70.0]),
    "plot_trials": partial(plotting.plot_trials, [0.5, 1.0], np.ones((3, 2))),
    "plot_weight_matrix": partial(plotting.plot_weight_matrix, MATRIX),
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_can_be_plotted_is_plotted(name):
    assert DRAWN[name]() is not None
    plt.close("all")
