"""The lanes of the training loop against networks trained one at a time by a plain Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l1inf_optax._lanes import Lane, share_of_zeros, train
from l1inf_optax.experiments.networks.evaluation import evaluate
from tests.support import devices
from tests.support.lanes import LANES, OPTIONS, SHARED, TASK, D, N, X, Y, apply, clip, loss, trained


def test_every_lane_equals_the_same_lane_trained_alone():
    together = train(TASK, LANES, SHARED, **OPTIONS).params["w"]
    for lane, w in zip(LANES, together, strict=True):
        alone = train(TASK, [lane], SHARED, **OPTIONS).params["w"][0]
        np.testing.assert_array_equal(w, alone)


def test_lanes_on_many_devices_equal_those_on_one(tmp_path):
    devices.run("tests.support.lanes", 3, tmp_path / "got.npz")
    got = np.load(tmp_path / "got.npz")
    for name, expected in zip(got.files, trained(), strict=True):
        np.testing.assert_array_equal(got[name], expected)


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_lanes_computed_together_agree_to_rounding(at_once):
    expected = train(TASK, LANES, SHARED, **OPTIONS).params["w"]
    got = train(TASK, LANES, SHARED, lanes_at_once=at_once, **OPTIONS).params["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("steps_per_call", "heard"), [(1, range(1, 10)), (2, [2, 3, 5, 6, 8, 9]), (7, [6, 9])]
)
def test_the_size_of_a_call_changes_nothing(steps_per_call, heard):
    expected = train(TASK, LANES, SHARED, steps_per_call=3, **OPTIONS)
    got = train(TASK, LANES, SHARED, steps_per_call=steps_per_call, **OPTIONS)
    np.testing.assert_array_equal(got.params["w"], expected.params["w"])
    assert [p.step for p in expected.history] == [3, 6, 9]
    assert [p.step for p in got.history] == list(heard)


def test_trials_differ_and_c_changes_neither_start_nor_batches():
    frozen = TASK._replace(optimizer=lambda c: optax.sgd(0.0))
    lanes = [Lane(0, 9.0), Lane(0, np.inf), Lane(1, 9.0)]
    trained = train(frozen, lanes, SHARED, **OPTIONS)
    w, losses = trained.params["w"], np.array([p.loss for p in trained.history])
    np.testing.assert_array_equal(w[0], w[1])
    np.testing.assert_array_equal(losses[:, 0], losses[:, 1])
    assert (w[0] != w[2]).all()
    assert (losses[:, 0] != losses[:, 2]).all()


def test_the_seed_decides_everything():
    first, again, other = (
        train(TASK, LANES, SHARED, epochs=2, batch_size=6, seed=seed).params["w"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_full_batches_take_the_steps_of_gradient_descent():
    task = TASK._replace(optimizer=lambda c: optax.sgd(0.05))
    start = train(TASK._replace(optimizer=lambda c: optax.sgd(0.0)), LANES, SHARED, **OPTIONS)
    got = train(task, LANES, SHARED, epochs=5, batch_size=1000, seed=4).params["w"]
    for w, expected in zip(got, np.asarray(start.params["w"], np.float64), strict=True):
        for _ in range(5):
            expected = expected - 0.05 * 2 * X.T @ (X @ expected - Y) / N
        np.testing.assert_allclose(w, expected, rtol=1e-4)


def test_an_epoch_takes_every_example_once_in_a_new_order():
    y = np.arange(8, dtype=np.float32)
    tell = TASK._replace(loss=lambda outputs, y: y + 0 * outputs)
    trained = train(
        tell, LANES, (X[None, :8], y[None]), epochs=2, batch_size=1, seed=0, steps_per_call=1
    )
    order = np.array([p.loss for p in trained.history])
    first, second = order[:8], order[8:]
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch, axis=0), np.tile(y[:, None], len(LANES)))
    assert (first != second).any(axis=0).all()


def test_each_trial_can_have_its_own_data():
    x, y = np.stack([X, 2 * X]), np.stack([Y, Y])
    lanes = [Lane(0, np.inf), Lane(1, np.inf)]
    both = train(TASK, lanes, (x, y), **OPTIONS)
    first = train(TASK, lanes, (x[:1], y[:1]), **OPTIONS)
    second = train(TASK, lanes, (x[1:], y[1:]), **OPTIONS)
    np.testing.assert_array_equal(both.params["w"][0], first.params["w"][0])
    np.testing.assert_array_equal(both.params["w"][1], second.params["w"][1])
    errors = evaluate(apply, {"error": loss}, both.params, lanes, (x, y))["error"]
    expected = [
        np.mean((x[t].astype(np.float64) @ np.asarray(both.params["w"][t]) - y[t]) ** 2)
        for t in range(2)
    ]
    np.testing.assert_allclose(errors, expected, rtol=1e-4)


def test_each_trial_can_have_its_own_rows():
    """Every example is told by its target: with batches of one the losses say which were taken."""
    y = np.arange(10, dtype=np.float32)
    tell = TASK._replace(loss=lambda outputs, y: y + 0 * outputs)
    rows = np.array([[1, 3, 5, 7, 9], [8, 6, 2, -1, -1]])
    trained = train(
        tell,
        [Lane(0, 1.0), Lane(1, 1.0)],
        (X[None, :10], y[None]),
        epochs=20,
        batch_size=1,
        seed=0,
        rows=rows,
        steps_per_call=1,
    )
    taken = np.array([p.loss for p in trained.history]).reshape(20, 3, 2)
    for lane, fold in enumerate(rows):
        own = set(fold[fold >= 0])
        epochs = [set(epoch) for epoch in taken[:, :, lane]]
        assert all(len(epoch) == 3 and epoch <= own for epoch in epochs)
        assert set().union(*epochs) == own
    assert len({tuple(epoch) for epoch in taken[:, :, 0]}) > 15


def test_c_may_differ_by_layer():
    own = TASK._replace(
        init=lambda key, c: {"w": jnp.stack([c["b"], c["a"]])},
        apply=lambda params, x: x[:, :2] @ params["w"],
        optimizer=lambda c: optax.sgd(0.0 * c["b"]),
    )
    lanes = [Lane(0, {"a": 0.1, "b": 2.0}), Lane(0, {"a": 3.0, "b": 0.7})]
    w = np.asarray(train(own, lanes, SHARED, epochs=1, batch_size=6, seed=0).params["w"])
    np.testing.assert_allclose(w, [[2.0, 0.1], [0.7, 3.0]], rtol=2e-7)
    assert float(w[0, 1]) <= 0.1
    assert float(w[1, 0]) <= 0.7


def test_no_radius_is_rounded_up():
    radii = [0.1, 0.3, 0.7, 1.0, 1e-3, 1e10]
    task = TASK._replace(
        init=lambda key, c: {"w": c * jnp.ones(D)}, optimizer=lambda c: optax.sgd(0.0)
    )
    trained = train(task, [Lane(0, c) for c in radii], SHARED, **OPTIONS)
    got = np.asarray(trained.params["w"][:, 0], np.float64)
    assert (got <= radii).all()
    np.testing.assert_allclose(got, radii, rtol=2e-7)


def test_whoever_watches_hears_every_call():
    heard = []
    trained = train(TASK, LANES, SHARED, steps_per_call=3, watch=heard.append, **OPTIONS)
    assert [p.step for p in heard] == [3, 6, 9]
    assert heard == trained.history
    assert all(p.loss.shape == p.sparsity.shape == (4,) for p in heard)
    assert (heard[-1].loss < heard[0].loss).all()


@pytest.mark.parametrize("name", ["epochs", "batch_size", "steps_per_call"])
def test_nothing_to_do_is_an_error(name):
    options = {**OPTIONS, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        train(TASK, LANES, SHARED, **options)


def test_no_lanes_is_an_error():
    with pytest.raises(ValueError, match="number of lanes is 0"):
        train(TASK, [], SHARED, **OPTIONS)


def test_zeros_are_counted_over_all_parameters():
    params = {"a": jnp.array([[0.0, -0.0], [1e-4, -2.0]]), "b": jnp.array([0.0, 1e-3, -9e-4, 5.0])}
    assert share_of_zeros(params) == pytest.approx(100 * 3 / 8)
    assert share_of_zeros(params, 1e-3) == pytest.approx(100 * 5 / 8)


def test_lanes_may_differ_in_their_learning_rates():
    rates = [0.0, 0.01, 0.05]
    own = TASK._replace(optimizer=lambda c, rate: optax.chain(optax.sgd(rate), clip(c)))
    lanes = [Lane(0, 0.5, rate) for rate in rates]
    together = train(own, lanes, SHARED, **OPTIONS).params["w"]
    for rate, w in zip(rates, together, strict=True):
        fixed = TASK._replace(optimizer=lambda c, rate=rate: optax.chain(optax.sgd(rate), clip(c)))
        alone = train(fixed, [Lane(0, 0.5)], SHARED, **OPTIONS).params["w"][0]
        np.testing.assert_allclose(w, alone, rtol=1e-6)


def test_an_augmentation_that_changes_nothing_changes_no_bit():
    plain = train(TASK, LANES, SHARED, **OPTIONS)
    same = train(TASK._replace(augment=lambda key, x: x), LANES, SHARED, **OPTIONS)
    np.testing.assert_array_equal(same.params["w"], plain.params["w"])
    for got, expected in zip(same.history, plain.history, strict=True):
        np.testing.assert_array_equal(got.loss, expected.loss)


def test_every_step_of_every_trial_augments_anew_and_alike_for_every_c():
    noisy = TASK._replace(
        augment=lambda key, x: jnp.full_like(x, jax.random.uniform(key)),
        apply=lambda params, x: x[:, 0] + 0 * params["w"].sum(),
        loss=lambda outputs, y: outputs,
    )
    lanes = [Lane(0, 0.5), Lane(0, np.inf), Lane(1, 0.5)]
    single, together = (
        np.array([p.loss for p in train(noisy, lanes, SHARED, **OPTIONS, steps_per_call=n).history])
        for n in (1, 9)
    )
    np.testing.assert_array_equal(single[:, 0], single[:, 1])
    assert len(np.unique(single[:, [0, 2]])) == 2 * 9
    np.testing.assert_allclose(together, single.mean(axis=0, keepdims=True), rtol=1e-6)


def test_the_history_counts_the_zeros_of_the_parameters_counted():
    start = {"w": jnp.zeros(D), "free": jnp.ones(D)}
    still = TASK._replace(
        init=lambda key, c: start,
        optimizer=lambda c: optax.sgd(0.0),
        counted=lambda params: {"w": params["w"]},
    )
    (*_, last) = train(still, [Lane(0, np.inf)], SHARED, **OPTIONS).history
    np.testing.assert_allclose(last.sparsity, [100])
