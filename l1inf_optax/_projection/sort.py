"""Algorithm 2 of the paper (Duchi et al. 2008): the readable reference, by sorting."""

import math

import jax
import jax.numpy as jnp

from l1inf_optax._projection.arguments import Arrays, Axes
from l1inf_optax._projection.columns import Columns


def sorted_thresholds(columns: Columns, axes: Axes) -> jax.Array:
    """The threshold of every column, vmapped over columns."""

    def threshold(key: jax.Array, slope: jax.Array, c: jax.Array) -> jax.Array:
        order = jnp.argsort(-key)
        mu, g = key[order], slope[order]
        theta = (jnp.cumsum(g * mu) - c) / jnp.cumsum(g)
        p = jnp.cumprod(mu > theta).sum()
        return theta[p - 1]

    keys = _as_rows(tuple(map(columns.magnitude, columns.entries)), columns.c.size, axes)
    if keys.size == 0:
        return jnp.zeros_like(columns.c)
    if columns.slope is None:
        slopes = jnp.ones_like(keys)
    else:
        slopes = _as_rows(columns.slope, columns.c.size, axes)
    thresholds = jax.vmap(threshold)(keys / slopes, slopes, columns.c.reshape(-1))
    return thresholds.reshape(columns.c.shape)


def _as_rows(parts: Arrays, columns: int, axes: Axes) -> jax.Array:
    """Every column, all parts together, as a row."""
    last = tuple(range(-len(axes), 0))
    moved = (jnp.moveaxis(x, axes, last) for x in parts)
    return jnp.concatenate(
        [x.reshape(columns, math.prod(x.shape[x.ndim - len(axes) :])) for x in moved], axis=1
    )
