"""Is a column in its ball? Decided exactly, for those whose norm is c to rounding."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.arguments import Arrays, Axes
from l1inf_optax._projection.columns import Columns
from l1inf_optax._projection.floats import exponent_of, power_of_two
from l1inf_optax._projection.sums import (
    add_doubled,
    additions,
    device_rounding_bound,
    doubled_column_sums,
    fold,
    length,
    over_devices,
)
from l1inf_optax._projection.xla_cpu import kept_in_the_loop


def invisible_in_float64(info: jnp.finfo) -> float:
    """By how much of c a norm may be above c and still, rounded to float64, be c."""
    return 0.0 if info.bits == 64 else 2.0**-53 * (1 - 2.0**-10)


def inside(columns: Columns, doubtful: jax.Array, axes: Axes) -> jax.Array:
    """Which doubtful columns are in their ball.

    One pass in doubled precision decides nearly all; the others are decided by their bits. A
    float32 column whose norm, rounded to float64, is c counts as inside.
    """
    eps = float(jnp.finfo(columns.c.dtype).eps)
    invisible = invisible_in_float64(jnp.finfo(columns.c.dtype))
    unit = power_of_two(-exponent_of(jnp.where(columns.c > 0, columns.c, 1)))
    radius = columns.c * unit

    def scaled_to_c(x: jax.Array) -> Arrays:  # an entry of 4 > c is outside alone
        return jnp.minimum(columns.magnitude(x) * unit, 4), jnp.zeros(x.shape, radius.dtype)

    def read() -> list[Arrays]:
        return [y for x in columns.entries for y in fold(scaled_to_c, (x,), axes, add_doubled)]

    sums = doubled_column_sums(read, axes, jnp.any(doubtful))
    total, error = over_devices(sums, radius, columns.rows)
    c_rest = functools.reduce(jnp.add, (x * unit for x in columns.c_rest), jnp.zeros_like(error))
    n = length(columns.entries, axes) * columns.rows.devices
    excess, doubt = (total - radius) + (error - c_rest), (additions(n) * eps) ** 2 * total
    doubt += device_rounding_bound(total, radius, columns.rows)
    surely = doubtful & (excess + doubt <= invisible)
    doubtful &= ~surely & (excess - doubt <= invisible)
    return surely | _inside_by_bits(columns, doubtful, unit, axes)


def _inside_by_bits(
    columns: Columns, doubtful: jax.Array, unit: jax.Array, axes: Axes
) -> jax.Array:
    """The same, layer of bits by layer of bits.

    Multiples of a grid add up without rounding, in any order, as long as their sum has no more
    digits than a float. So the first layer is what is above a grid of eps, the next what is between
    that and a finer grid, until it is clear on which side of c the sum must end: what all finer
    layers hold is less than n times the grid.
    """
    eps = float(jnp.finfo(columns.c.dtype).eps)
    invisible = invisible_in_float64(jnp.finfo(columns.c.dtype))
    n = length(columns.entries, axes) * columns.rows.devices
    next_ratio = min(2.0 ** math.ceil(math.log2(max(n, 1))) * eps / 2, 0.5)  # n of them fit a float
    finest = min(eps**4, 2.0**-90)
    radius = columns.c * unit

    def undecided(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        known, grid, _ = carry  # the excess is above known - 2 grid and below known + n grid
        near = doubtful & (known - 2 * grid <= invisible) & (known + n * grid > invisible)
        return jnp.any(near) & (grid > finest)

    def next_layer(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        known, grid, ratio = carry
        next_grid = grid * ratio

        def layer(x: jax.Array) -> jax.Array:
            return jnp.floor((x - jnp.floor(x / grid) * grid) / next_grid) * next_grid

        entries, known = kept_in_the_loop((columns.entries, known))
        for x in entries:
            part = layer(jnp.minimum(columns.magnitude(x) * unit, 4))
            known = known + columns.rows.sum(part.sum(axes, keepdims=True))
        rest = (layer(x * unit) for x in columns.c_rest)
        known = functools.reduce(jnp.subtract, rest, known)
        return known, next_grid, jnp.full_like(ratio, next_ratio)

    # Nothing reaches 8, so the first layer, on a grid of eps, is all that is above it.
    start = -radius, jnp.asarray(8, radius.dtype), jnp.asarray(eps / 8, radius.dtype)
    known, _, _ = lax.while_loop(undecided, next_layer, start)
    return doubtful & (known <= invisible)
