"""A small training with lanes, for tests that compare processes.

``python -m tests.support.lanes FILE`` keeps what this process trains.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l1inf_optax._lanes import Lane, Task, train

RNG = np.random.default_rng(1)
N, D = 20, 3
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = (X @ [1.0, -2.0, 0.5]).astype(np.float32)
LANES = [Lane(0, 0.5), Lane(0, np.inf), Lane(1, 0.5), Lane(2, 1.0)]
OPTIONS = {"epochs": 3, "batch_size": 6, "seed": 4}


def init(key, c):
    return {"w": jnp.minimum(jax.random.normal(key, (D,)), c)}


def apply(params, x):
    return x @ params["w"]


def loss(outputs, y):
    return (outputs - y) ** 2


def clip(c):
    """A stand-in for a constraint: entries at most c."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, p: jnp.minimum(p + u, c) - p, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


TASK = Task(init, apply, loss, lambda c: optax.chain(optax.sgd(0.05, momentum=0.9), clip(c)))
SHARED = (X[None], Y[None])


def trained():
    """What the loop trains: parameters and losses of all lanes."""
    params, history = train(TASK, LANES, SHARED, **OPTIONS)
    return [*jax.tree.leaves(params), np.array([progress.loss for progress in history])]


if __name__ == "__main__":
    np.savez(sys.argv[1], *map(np.asarray, trained()))
