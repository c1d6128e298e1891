"""What becomes of exact zeros under minibatch noise, on the paper's classification.

`python -m tests.benchmarks.bench_zeros` prints Markdown: test accuracy, exact zeros among the
hidden weights at the end, and the share of entries that change between zero and not zero in the
last epoch, means and standard deviations of ten trials (new data, new initial weights). The radius
is 0.6, or falls to it from 3 over the first 70% of the steps; from there on zeros are held, or not.
A second table has what else might keep zeros, with momentum, minibatches and a falling radius. The
learning rates were chosen on other trials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l1inf_optax as l1inf
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.linen import AugmentedMLP

STEPS, SETTLED, TRIALS, SAMPLES = 3000, 2100, 10, 500
WIDE, NARROW = 3.0, 0.6
NETWORK = AugmentedMLP((100, 50, 20, 2))
# name: optimizer, factor of the initial readout.
OPTIMIZERS: dict[str, tuple[Callable[[], optax.GradientTransformation], float]] = {
    "momentum": (lambda: optax.sgd(decaying(1e-2), momentum=0.9), 2.0),
    "Adam": (lambda: optax.adam(decaying(5e-3)), 3.0),
}
LAST = 600  # steps that the alternatives average over, or take with full batches


def decaying(rate: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(rate, STEPS)


def falling(step: jax.Array) -> jax.Array:
    return WIDE * (NARROW / WIDE) ** jnp.minimum(step / SETTLED, 1.0)


RADII = {
    "fixed": (NARROW, None),
    "falls": (falling, None),
    "falls, then zeros held": (falling, SETTLED),
}


def start(key: jax.Array, radius: float, readout: float) -> Any:
    """Columns on the boundary, three tenths of each in its bias."""

    def leaf(path: tuple, x: jax.Array) -> jax.Array:
        if path[-1].key != "augmented_kernel":
            return x * readout if path[-1].key == "kernel" else x
        weights = x[1:] * (0.7 * radius / jnp.abs(x[1:]).sum(0))
        return jnp.concatenate([jnp.full_like(x[:1], 0.3 * radius), weights])

    params = NETWORK.init(key, jnp.zeros((1, synthetic.CLASSIFICATION_INPUTS)))
    return jax.tree_util.tree_map_with_path(leaf, params)


def is_zero(params: Any) -> jax.Array:
    layers = params["params"].values()
    return jnp.concatenate(
        [(x["augmented_kernel"] == 0).ravel() for x in layers if "augmented_kernel" in x]
    )


class Run(NamedTuple):
    """How one network trains.

    Attributes:
        tx: optimizer and projection.
        radius: the first.
        readout: factor of the initial readout.
        batch: examples per step.
        last_batch: examples per step in the last 600 steps.
        average: the result is the mean of the last 600 iterates, feasible as the ball is convex.
    """

    tx: optax.GradientTransformation
    radius: float
    readout: float
    batch: int
    last_batch: int
    average: bool = False


def trial(key: jax.Array, run: Run) -> jax.Array:
    """Accuracy, zeros and changes in the last epoch, in percent."""
    keys = jax.random.split(key, 4)
    x, y = synthetic.classification(keys[0], SAMPLES)
    x_test, y_test = synthetic.classification(keys[1], 1000)
    params = start(keys[2], run.radius, run.readout)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = NETWORK.apply(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def train(carry: Any, batch: int, steps: range) -> tuple[Any, jax.Array]:
        epoch = SAMPLES // batch

        def step(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
            params, state, total = carry
            order = jax.random.permutation(jax.random.fold_in(keys[3], i // epoch), SAMPLES)
            rows = jax.lax.dynamic_slice_in_dim(order, i % epoch * batch, batch)
            updates, state = run.tx.update(jax.grad(loss)(params, rows), state, params)
            moved = optax.apply_updates(params, updates)
            changed = (is_zero(moved) != is_zero(params)).mean()
            return (moved, state, jax.tree.map(jnp.add, total, moved)), changed

        carry, changed = jax.lax.scan(step, carry, jnp.arange(steps.start, steps.stop))
        return carry, changed[-epoch:].sum()

    nothing = jax.tree.map(jnp.zeros_like, params)
    carry = params, run.tx.init(params), nothing
    (params, state, _), _ = train(carry, run.batch, range(STEPS - LAST))
    carry = params, state, nothing
    (params, _, total), changed = train(carry, run.last_batch, range(STEPS - LAST, STEPS))
    if run.average:
        params = jax.tree.map(lambda t: t / LAST, total)
    accuracy = (NETWORK.apply(params, x_test).argmax(-1) == y_test).mean()
    return 100 * jnp.stack([accuracy, is_zero(params).mean(), changed])


def dual_averaging(rate: float) -> optax.GradientTransformation:
    """Steps from the start by the sum of all gradients: with a projection, dual averaging.

    Nesterov 2009; Xiao 2010, whose regularized form has the indicator of the ball for regularizer.
    """

    def init(params: Any) -> Any:
        return params

    def update(grads: Any, unprojected: Any, params: Any) -> tuple[Any, Any]:
        unprojected = jax.tree.map(lambda z, g: z - rate * g, unprojected, grads)
        return jax.tree.map(jnp.subtract, unprojected, params), unprojected

    return optax.GradientTransformation(init, update)


def runs() -> dict[str, Run]:
    """The first table."""
    table = {}
    for name, (optimizer, readout) in OPTIMIZERS.items():
        for batch in (50, SAMPLES):
            for radius, (c, hold) in RADII.items():
                tx = l1inf.constrain(optimizer(), layers(c), stickiness=0.0, hold_zeros_from=hold)
                first = WIDE if callable(c) else c
                table[f"{name} | {batch} | {radius}"] = Run(tx, first, readout, batch, batch)
    return table


def alternatives() -> dict[str, Run]:
    """The second table."""

    def run(optimizer: optax.GradientTransformation, **more: Any) -> Run:
        project = l1inf.keep_params_in_l1inf_ball(
            layers(falling), stickiness=0.0, hold_zeros_from=more.pop("hold", None)
        )
        settings = {"batch": 50, "last_batch": 50, **more}
        return Run(optax.chain(optimizer, project), WIDE, readout, **settings)

    make, readout = OPTIMIZERS["momentum"]
    momentum = make()
    return {
        "zeros held": run(momentum, hold=SETTLED),
        "nothing": run(momentum),
        "mean of the last 600 iterates": run(momentum, average=True),
        "mean of the gradients: momentum 0.99": run(optax.sgd(decaying(1e-3), momentum=0.99)),
        "sum of all gradients: dual averaging": run(dual_averaging(1e-2)),
        "a step size that does not shrink": run(optax.sgd(3e-3, momentum=0.9)),
        "full batches for the last 600 steps": run(momentum, last_batch=SAMPLES),
    }


def layers(c: Any) -> dict[str, Any]:
    return {"hidden_*": c, "readout": None}


def print_table(heads: str, table: dict[str, Run]) -> None:
    print(f"| {heads} | test accuracy, % | exact zeros, % | changed, % |")
    print("| --- " * (4 + heads.count("|")) + "|")
    keys = jax.random.split(jax.random.key(77), TRIALS)
    for name, run in table.items():
        results = jax.jit(jax.vmap(lambda key, run=run: trial(key, run)))(keys)
        results = np.asarray(results, np.float64)
        cells = zip(results.mean(0), results.std(0, ddof=1), strict=True)
        cells = " | ".join(f"{mean:.1f} ± {std:.1f}" for mean, std in cells)
        print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    print_table("optimizer | batch | c", runs())
    print()
    print_table("what keeps zeros", alternatives())


if __name__ == "__main__":
    main()
