"""Columns as the search sees them: magnitudes, their scale, and how fast they shrink.

A radius of ordinary size needs no scale: entries are compared as they are. Any other radius is
brought to an ordinary size by a power of two, and every entry with it whenever it is read. That
costs a product, and no copy of the entries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from l1inf_optax._projection.arguments import LARGEST_WEIGHT, Arrays, Axes, ordinary_radii
from l1inf_optax._projection.floats import (
    Pair,
    choose,
    exponent_of,
    moved,
    power_of_two,
    round_down,
    wide_dtype,
)
from l1inf_optax._projection.sums import largest, length
from l1inf_optax._projection.xla_cpu import not_fused
from l1inf_optax._sharding import Rows

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float


class Columns(NamedTuple):
    """What the search for the thresholds compares, adds up and aims at.

    Attributes:
        entries: The parts themselves, of which only the magnitudes count.
        slope: How fast a survivor shrinks as the threshold rises, one array for each part; None
            where every slope is 1.
        c: The radius, on the scale.
        scale: The power of two by which magnitudes are multiplied; None if it is known to be 1.
        unseen: What subnormal entries may add to a norm, on the scale: processors read them as 0.
        free: Columns without a constraint, c = inf.
        rows: The devices that hold the rest of the columns.
    """

    entries: Arrays
    slope: Arrays | None
    c: Float[Array, "*columns"]
    scale: Float[Array, "*columns"] | None
    unseen: Float[Array, "*columns"]
    free: Bool[Array, "*columns"]
    rows: Rows

    def magnitude(self, x: jax.Array) -> jax.Array:
        """The magnitudes of entries, on the scale."""
        return magnitude(x.astype(self.c.dtype), self.scale, is_weighted=self.slope is not None)


def magnitude(x: jax.Array, scale: jax.Array | None, *, is_weighted: bool) -> jax.Array:
    """Magnitudes on a scale; in a weighted search none so large that a threshold overflows.

    An entry that overflows counts as infinite: beside it c is nothing. With a metric an entry is
    known to eps times the largest of its column, and beside one above c / eps any result that is
    feasible is as right as any other.
    """
    a = jnp.abs(x)
    if scale is not None:
        a = a * scale
    return jnp.minimum(a, LARGEST_WEIGHT) if is_weighted else a


def above_threshold(
    a: jax.Array, theta: tuple[ArrayLike, ArrayLike], slope: jax.Array | None
) -> jax.Array:
    """How far magnitudes are above a threshold, to their own last bits."""
    if slope is None:
        return (a - theta[0]) - theta[1]
    first, second = (not_fused(slope * x) for x in theta)
    return (a - first) - second


def threshold_leaving_c(columns: Columns, axes: Axes) -> Pair:
    """The largest threshold that leaves some entry at c: left of the root."""
    c, info = columns.c, jnp.finfo(columns.c.dtype)
    a = tuple(map(columns.magnitude, columns.entries))
    most = jnp.full_like(c, info.max)
    if columns.slope is None:
        top = columns.rows.max(largest(a, axes))
        threshold = moved((top, jnp.zeros_like(top)), -c)
    else:
        keys = tuple((x - c) / g for x, g in zip(a, columns.slope, strict=True))
        top = columns.rows.max(largest(keys, axes, initial=-float(info.max)))
        threshold = top - jnp.abs(top) * (4 * float(info.eps)), jnp.zeros_like(top)
    return choose(top < jnp.inf, threshold, (most, jnp.zeros_like(most)))


def weighted(parts: Arrays, metric: Arrays, c: jax.Array, axes: Axes) -> tuple[Arrays, Arrays]:
    """Parts and slopes, the reciprocals of a metric's weights: those of a column from 2^-60 to 1.

    Infinite entries share c equally, whatever their weights. So in a column that holds some they
    become c, all others nothing, and the slopes 1.
    """
    dtype = wide_dtype(*(part.dtype for part in parts))
    info = jnp.finfo(dtype)
    d = tuple(jnp.maximum(weights.astype(dtype), info.tiny) for weights in metric)
    least = -largest(tuple(-x for x in d), axes, initial=-float(info.max))
    least = lax.stop_gradient(least)  # only ratios matter
    slopes = tuple(jnp.maximum(least / x, 1 / LARGEST_WEIGHT) for x in d)

    infinite = largest(tuple(jnp.abs(part).astype(dtype) for part in parts), axes) == jnp.inf

    def limit(part: jax.Array) -> jax.Array:
        share = round_down(jnp.minimum(c, info.max), part.dtype).astype(part.dtype)
        limits = jnp.where(jnp.isinf(part), jnp.sign(part) * share, 0 * part)  # a NaN stays one
        return jnp.where(infinite, limits, part)

    return tuple(map(limit, parts)), tuple(jnp.where(infinite, 1, g) for g in slopes)


def columns_of(
    parts: Arrays, c: jax.Array, slope: Arrays | None, axes: Axes, *, is_ordinary: bool, rows: Rows
) -> Columns:
    """The columns of some parts, on a scale of their own unless their radius is ordinary."""
    if is_ordinary:
        nothing, no = jnp.zeros_like(c), jnp.zeros(c.shape, bool)
        return Columns(parts, slope, c, None, nothing, no, rows)
    info = jnp.finfo(c.dtype)
    least, most = ordinary_radii(is_weighted=slope is not None)
    exponent = exponent_of(jnp.clip(c, info.tiny, info.max))
    ordinary = jnp.clip(exponent, round(math.log2(least)), round(math.log2(most)) - 1)
    scale = power_of_two(ordinary - exponent)
    # From an ordinary radius on not even the sum of all of them reaches its last bit.
    unseen = float(info.tiny) * length(parts, axes) * rows.devices
    return Columns(
        entries=parts,
        slope=slope,
        c=jnp.clip(c, 0, info.max) * scale,
        scale=scale,
        unseen=jnp.where(c < least, unseen * scale, 0),
        free=jnp.isposinf(c),
        rows=rows,
    )
