"""What becomes of exact zeros under minibatch noise, on the paper's classification.

`python -m tests.benchmarks.bench_zeros` prints Markdown: test accuracy, exact zeros among the
hidden weights at the end, and the share of entries that change between zero and not zero in the
last epoch, means and standard deviations of ten trials (new data, new initial weights). The radius
is 0.6, or falls to it from 3 over the first 70% of the steps; from there on zeros are held, or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l1inf_optax as l1inf
from l1inf_optax.experiments import synthetic
from l1inf_optax.linen import AugmentedMLP

STEPS, SETTLED, TRIALS, SAMPLES = 3000, 2100, 10, 500
WIDE, NARROW = 3.0, 0.6
NETWORK = AugmentedMLP((100, 50, 20, 2))
# name: optimizer, factor of the initial readout.
OPTIMIZERS: dict[str, tuple[Callable[[], optax.GradientTransformation], float]] = {
    "momentum": (lambda: optax.sgd(decaying(1e-2), momentum=0.9), 2.0),
    "Adam": (lambda: optax.adam(decaying(1e-3)), 3.0),
}


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


def trial(
    key: jax.Array, tx: optax.GradientTransformation, radius: float, readout: float, batch: int
) -> jax.Array:
    """Accuracy, zeros and changes in the last epoch, in percent."""
    keys = jax.random.split(key, 4)
    x, y = synthetic.classification(keys[0], SAMPLES)
    x_test, y_test = synthetic.classification(keys[1], 1000)
    params = start(keys[2], radius, readout)
    epoch = SAMPLES // batch

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = NETWORK.apply(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(carry: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        order = jax.random.permutation(jax.random.fold_in(keys[3], i // epoch), SAMPLES)
        rows = jax.lax.dynamic_slice_in_dim(order, i % epoch * batch, batch)
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        moved = optax.apply_updates(params, updates)
        return (moved, state), (is_zero(moved) != is_zero(params)).mean()

    (params, _), changed = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))
    accuracy = (NETWORK.apply(params, x_test).argmax(-1) == y_test).mean()
    return 100 * jnp.stack([accuracy, is_zero(params).mean(), changed[-epoch:].sum()])


def main() -> None:
    print("| optimizer | batch | c | test accuracy, % | exact zeros, % | changed, % |")
    print("| --- " * 6 + "|")
    keys = jax.random.split(jax.random.key(77), TRIALS)
    for name, (optimizer, readout) in OPTIMIZERS.items():
        for batch in (50, SAMPLES):
            for radius, (c, hold) in RADII.items():
                tx = l1inf.constrain(
                    optimizer(), {"hidden_*": c, "readout": None}, hold_zeros_from=hold
                )
                first = WIDE if callable(c) else c

                def one(key: jax.Array, tx=tx, first=first, readout=readout, batch=batch):
                    return trial(key, tx, first, readout, batch)

                results = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
                cells = zip(results.mean(0), results.std(0, ddof=1), strict=True)
                cells = " | ".join(f"{mean:.1f} ± {std:.1f}" for mean, std in cells)
                print(f"| {name} | {batch} | {radius} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
