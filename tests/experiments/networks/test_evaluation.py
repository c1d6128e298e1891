"""The columns of the paper's tables, and what else the experiments share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l1inf_optax._lanes import Lane, Task, train
from l1inf_optax.experiments.networks.evaluation import (
    evaluate,
    measure,
    right_percent,
    train_best_starts,
)
from l1inf_optax.experiments.networks.recipes import shrink_into_ball

RNG = np.random.default_rng(1)
N, D = 20, 3
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = (X @ [1.0, -2.0, 0.5]).astype(np.float32)
SHARED = (X[None], Y[None])
TASK = Task(
    init=lambda key, c: {"w": jnp.zeros(D)},
    apply=lambda params, x: x @ params["w"],
    loss=lambda outputs, y: (outputs - y) ** 2,
    optimizer=lambda c: optax.sgd(0.05),
)


def test_the_papers_columns_are_those_of_each_lane():
    params = {"w": np.array([[1.0, 0.0, 5e-4], [2.0, -3.0, 0.0]])}
    lanes = [Lane(0, 1.0), Lane(1, 1.0)]
    test_data = (X[None, ::2] + 1, Y[None, ::2])
    got = measure(TASK, params, lanes, SHARED, test_data, largest=lambda outputs, y: outputs)
    for i, w in enumerate(params["w"]):
        on_train = np.mean((X.astype(np.float64) @ w - Y) ** 2)
        outputs = test_data[0][0].astype(np.float64) @ w
        on_test = np.mean((outputs - test_data[1][0]) ** 2)
        np.testing.assert_allclose(got["train_error"][i], on_train, rtol=1e-5)
        np.testing.assert_allclose(got["test_error"][i], on_test, rtol=1e-5)
        np.testing.assert_allclose(
            got["generalization_error"][i], abs(on_test - on_train), rtol=1e-4
        )
        np.testing.assert_allclose(got["largest"][i], outputs.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["sparsity"], [100 / 3, 100 / 3], rtol=1e-6)
    np.testing.assert_allclose(got["sparsity_1e-3"], [200 / 3, 100 / 3], rtol=1e-6)


def test_what_is_evaluated_is_not_augmented():
    params = {"w": np.ones((1, D), np.float32)}
    task = TASK._replace(augment=lambda key, x: 0 * x)
    got, expected = (measure(t, params, [Lane(0, 1.0)], SHARED, SHARED) for t in (task, TASK))
    assert got == expected


@pytest.mark.parametrize("batch_size", [1, 7, 20, 50])
def test_an_evaluation_in_batches_is_the_same(batch_size):
    params = {"w": np.stack([np.ones(D), np.arange(D)])}
    lanes = [Lane(0, 1.0), Lane(1, 1.0)]
    expected = evaluate(TASK.apply, {"error": TASK.loss}, params, lanes, SHARED)["error"]
    got = evaluate(TASK.apply, {"error": TASK.loss}, params, lanes, SHARED, batch_size)["error"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_only_the_parameters_counted_are_counted():
    params = {"w": np.array([[1.0, 0.0, 5e-4]]), "free": np.array([[1.0, 1.0]])}
    task = TASK._replace(counted=lambda params: {"w": params["w"]})
    got = measure(task, params, [Lane(0, np.inf)], SHARED, SHARED)
    np.testing.assert_allclose(got["sparsity"], [100 / 3], rtol=1e-6)
    np.testing.assert_allclose(got["sparsity_1e-3"], [200 / 3], rtol=1e-6)


def test_of_several_starts_that_of_the_lowest_training_error_is_kept():
    data = (np.zeros((2, 10, 1), np.float32), np.array([[0] * 10, [1] * 10], np.float32))
    task = Task(
        init=lambda key, c: {"w": c * jax.random.normal(key, (1,))},
        apply=lambda params, x: x[:, 0] + params["w"],
        loss=lambda outputs, y: (outputs - y) ** 2,
        optimizer=lambda c: optax.sgd(0.0),
    )
    wanted = [Lane(t, c) for t in range(2) for c in (1.0, 2.0)]

    options = {"epochs": 1, "batch_size": 50, "seed": 0}

    def best(starts):
        return train_best_starts(task, wanted, data, trials=2, starts=starts, **options)

    each = [[Lane(lane.trial + 2 * s, lane.c) for lane in wanted] for s in range(3)]
    starts = [np.asarray(train(task, lanes, data, **options).params["w"]) for lanes in each]
    errors = np.array(
        [[(w[0] - lane.trial) ** 2 for w, lane in zip(s, wanted, strict=True)] for s in starts]
    )
    lanes, params = best(3)
    chosen = errors.argmin(axis=0)
    assert len(set(chosen)) > 1
    assert lanes == [each[s][i] for i, s in enumerate(chosen)]
    np.testing.assert_array_equal(params["w"], [starts[s][i] for i, s in enumerate(chosen)])
    assert best(1)[0] == wanted


def test_the_largest_logit_is_the_answer():
    logits = np.array([[0.1, 0.2, 0.0], [3.0, -1.0, 2.0]])
    np.testing.assert_array_equal(right_percent(jnp.array(logits), np.array([1, 2])), [100, 0])


def test_only_long_columns_of_augmented_kernels_are_shrunk():
    kernel = jnp.array([[3.0, 0.1, 0.0], [-1.0, 0.2, 0.0]])
    params = {"hidden_0": {"augmented_kernel": kernel}, "readout": {"kernel": 5 * kernel}}
    shrunk = shrink_into_ball(params, jnp.float32(2.0))
    np.testing.assert_allclose(
        shrunk["hidden_0"]["augmented_kernel"], [[1.5, 0.1, 0], [-0.5, 0.2, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(shrunk["readout"]["kernel"], 5 * kernel)
    free = shrink_into_ball(params, jnp.float32(jnp.inf))
    np.testing.assert_array_equal(free["hidden_0"]["augmented_kernel"], kernel)
