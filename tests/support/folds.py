"""A small cross-validation, for tests that compare processes.

``python -m tests.support.folds FILE`` keeps the scores of this process.
"""

import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l1inf_optax.selection import cross_validate

RNG = np.random.default_rng(3)
N, D = 60, 30
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = (X[:, 0] - X[:, 1] + 0.3 * RNG.normal(size=N)).astype(np.float32)
RADII = [0.5, 2.0, math.inf, 8.0]
RATE = 0.1


def random_init(key, c):
    return {"kernel": jax.random.normal(key, (D, 1)), "bias": jnp.zeros(1)}


def apply(params, x):
    return (x @ params["kernel"] + params["bias"])[:, 0]


def loss(outputs, y):
    return (outputs - y) ** 2


def light(c):
    """Depends on c, and compiles in no time."""
    return optax.sgd(RATE / (2 + 1 / c))


validate_light = partial(cross_validate, random_init, apply, loss, light, X, Y, RADII)


def validated():
    """The scores of a few epochs."""
    return validate_light(epochs=3, batch_size=10).scores


if __name__ == "__main__":
    np.save(sys.argv[1], validated())
