"""What trained networks are worth: the paper's columns, and which of several starts is best."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from l1inf_optax._lanes import (
    Apply,
    Data,
    Lane,
    Metric,
    Params,
    Progress,
    Task,
    gathered,
    map_lanes,
    on_all_devices,
    share_of_zeros,
    shared_out,
    train,
)


def train_best_starts(
    task: Task,
    lanes: Sequence[Lane],
    data: Data,
    *,
    trials: int,
    starts: int,
    epochs: int,
    batch_size: int,
    seed: int,
    lanes_at_once: int | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> tuple[list[Lane], Params]:
    """Train every lane from several starts, and keep the network of the lowest training error.

    Args:
        task: what to train.
        lanes: the networks wanted, of the trials below ``trials``.
        data: what they train on, as for `train`: one set, or one for each trial.
        trials: their number.
        starts: how many initial weights and orders of minibatches each lane is given.
        epochs: as for `train`, like what follows.
        batch_size: also how many examples are evaluated at once.
        seed: of everything random.
        lanes_at_once: how many lanes of a device a step computes together.
        watch: called after every compiled call.

    Returns:
        The lanes kept, in the order of ``lanes``, and their stacked parameters. A lane's trial may
        be another one of the same data set.
    """
    tried = [lane._replace(trial=lane.trial + trials * s) for s in range(starts) for lane in lanes]
    params = train(
        task,
        tried,
        data,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        lanes_at_once=lanes_at_once,
        watch=watch,
    ).params
    if starts == 1:
        return tried, params
    errors = evaluate(task.apply, {"error": task.loss}, params, tried, data, batch_size)["error"]
    errors = np.nan_to_num(errors, nan=np.inf).reshape(starts, -1)  # one may have diverged
    best = errors.argmin(axis=0) * len(lanes) + np.arange(len(lanes))
    return [tried[i] for i in best], jax.tree.map(lambda leaf: leaf[best], params)


def evaluate(
    apply: Apply,
    metrics: Mapping[str, Metric],
    params: Params,
    lanes: Sequence[Lane],
    data: Data,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Means of ``metrics`` over a data set, for every lane.

    Args:
        apply: ``(params, x) -> outputs``.
        metrics: name to ``(outputs, y) -> (n,)``.
        params: stacked parameters, as `train` returns them.
        lanes: the lanes, in the same order.
        data: inputs and targets, laid out as for `train`.
        batch_size: how many examples ``apply`` sees at once, where memory does not hold what a
            network makes of all of them.

    Returns:
        ``(lanes,)`` float32 for every name.
    """

    def one(lane: tuple[Params, jax.Array], data: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        params, trial = lane
        x, y = data
        own = trial % y.shape[0]
        if batch_size is None:
            outputs = apply(params, x[own])
        else:
            outputs = jax.lax.map(
                lambda row: apply(params, row[None])[0], x[own], batch_size=batch_size
            )
        return {name: metric(outputs, y[own]).mean() for name, metric in metrics.items()}

    trials = np.array([lane.trial for lane in lanes])
    all_lanes = jax.jit(partial(map_lanes, one))
    means = all_lanes(shared_out((params, trials)), tuple(map(on_all_devices, data)))
    return gathered(means, len(lanes))


def measure(
    task: Task,
    params: Params,
    lanes: Sequence[Lane],
    train_data: Data,
    test_data: Data,
    *,
    batch_size: int | None = None,
    **more: Metric,
) -> dict[str, np.ndarray]:
    """The columns of the paper's tables, for every lane.

    Args:
        task: what was trained; its loss is the error.
        params: stacked parameters, as `train` returns them.
        lanes: the lanes, in the same order.
        train_data: what they trained on.
        test_data: what they have not seen, laid out alike.
        batch_size: as in `evaluate`.
        **more: further means over the test data, by name.

    Returns:
        ``(lanes,)`` for each of train_error, test_error, generalization_error (their distance),
        the names in ``more``, sparsity (exact zeros among the parameters counted, in percent) and
        sparsity_1e-3 (magnitudes below 1e-3, as the paper counts by all signs).
    """
    error: dict[str, Metric] = {"error": task.loss}
    on_train = evaluate(task.apply, error, params, lanes, train_data, batch_size)["error"]
    on_test = evaluate(task.apply, {**error, **more}, params, lanes, test_data, batch_size)
    counted = task.counted(params)
    test_error = on_test.pop("error")
    return {
        "train_error": on_train,
        "test_error": test_error,
        "generalization_error": np.abs(test_error - on_train),
        **on_test,
        "sparsity": np.asarray(jax.vmap(share_of_zeros)(counted)),
        "sparsity_1e-3": np.asarray(jax.vmap(partial(share_of_zeros, below=1e-3))(counted)),
    }


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Of a network with one output, which is ``(batch, 1)``."""
    return (outputs[:, 0] - y) ** 2


def right_percent(logits: jax.Array, y: jax.Array) -> jax.Array:
    """100 where the largest logit is the class's, 0 elsewhere: its mean is the accuracy."""
    return 100.0 * (logits.argmax(-1) == y)
