"""Empirical Rademacher complexities of small classes: exact without hidden layers, else from below.

The expectation runs over all sign vectors, so it has no sampling error. Nothing here knows a bound,
or any code of the library.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# An activation is a mixture of ReLU, tanh and the identity: their weights. It is 0 at 0, and
# Lipschitz with the sum of the weights.
ACTIVATIONS = {
    "ReLU": (1.0, 0.0, 0.0),
    "tanh": (0.0, 1.0, 0.0),
    "steep leaky ReLU": (1.8, 0.0, 0.2),
}


def signs(n):
    """All sign vectors up to a factor of -1, which no class here notices: (2^(n-1), n)."""
    return np.array([(1.0, *rest) for rest in itertools.product((-1.0, 1.0), repeat=n - 1)])


def linear(x, o):
    """k = 0, exactly: (o / n) E max(|sum eps|, ||sum eps x||_inf)."""
    epsilon = signs(len(x))
    sums = np.concatenate([epsilon.sum(axis=1, keepdims=True), epsilon @ x], axis=1)
    return o / len(x) * np.abs(sums).max(axis=1).mean()


@partial(jax.jit, static_argnames=("k", "restarts", "steps", "width"))
def ascended(key, x, c, o, activation, *, k, restarts=8, steps=40, width=6):
    """k = 1, 2, ... from below: projected gradient ascent, for many samples and radii at once.

    The output layer's supremum is known: all of o goes into the bias, or into one hidden unit. So
    what is searched is that unit's weights, and the layers below it.

    Args:
        key: of the starts.
        x: ``(settings, n, m1)``.
        c: ``(settings,)``.
        o: ``(settings,)``.
        activation: ``(settings, 3)``, weights as in `ACTIVATIONS`.

    Returns:
        ``(settings,)``.
    """
    n, m1 = x.shape[1:]
    epsilon = jnp.asarray(signs(n), x.dtype)
    shapes = [(m1 + 1, width), *[(width + 1, width)] * (k - 1)]
    shapes[-1] = (shapes[-1][0], 1)

    def unit(layers, x, weights):
        for layer in layers:
            u = jnp.concatenate([jnp.ones((len(x), 1), x.dtype), x], axis=1) @ layer
            x = weights @ jnp.stack([jax.nn.relu(u), jnp.tanh(u), u]).reshape(3, -1)
            x = x.reshape(u.shape)
        return x[:, 0]

    def climb(key, epsilon, x, c, weights):
        def size(layers):
            return jnp.abs(epsilon @ unit(layers, x, weights))

        def step(layers, rate):
            value, slopes = jax.value_and_grad(size)(layers)
            moved = [
                _project(v + rate * c * g / (jnp.abs(g).max() + 1e-12), c)
                for v, g in zip(layers, slopes, strict=True)
            ]
            return moved, value

        keys = jax.random.split(key, (k, 2))
        starts = [
            _project(c * (_corners(one, shape) + jax.random.normal(two, shape) / shape[0] / 5), c)
            for shape, (one, two) in zip(shapes, keys, strict=True)
        ]
        layers, values = jax.lax.scan(step, starts, jnp.geomspace(0.5, 0.01, steps))
        return jnp.maximum(values.max(), size(layers))

    def complexity(key, x, c, o, weights):
        keys = jax.random.split(key, (len(epsilon), restarts))
        one_sign = jax.vmap(climb, in_axes=(0, None, None, None, None))
        found = jax.vmap(one_sign, in_axes=(0, 0, None, None, None))(keys, epsilon, x, c, weights)
        best = jnp.maximum(found.max(axis=1), jnp.abs(epsilon.sum(axis=1)))
        return o / n * best.mean()

    settings = jax.random.split(key, len(x)), x, c, o, activation
    return jax.lax.map(lambda setting: complexity(*setting), settings)


def _corners(key, shape):
    """One corner of every column's ball."""
    row_key, sign_key = jax.random.split(key)
    rows = jax.random.randint(row_key, shape[1:], 0, shape[0])
    return jax.nn.one_hot(rows, shape[0], axis=0) * jax.random.rademacher(sign_key, shape[1:])


def _project(v, c):
    """Columns into the L1 ball, by sorting (Duchi et al. 2008); a rounding error short of it."""
    mu = jnp.sort(jnp.abs(v), axis=0, descending=True)
    counts = jnp.arange(1, len(v) + 1)[:, None]
    theta = jnp.maximum(((jnp.cumsum(mu, axis=0) - c) / counts).max(axis=0), 0)
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - theta, 0) * (1 - 1e-6)
