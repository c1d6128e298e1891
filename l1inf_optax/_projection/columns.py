"""Columns as the search sees them: magnitudes, their scale, and how fast they shrink.

A radius of ordinary size needs no scale: entries are compared as they are. Any other radius is
brought to 1 <= c < 2 by a power of two, and the entries with it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from l1inf_optax._projection.arguments import Arrays, Axes
from l1inf_optax._projection.floats import (
    Pair,
    choose,
    exponent_of,
    moved,
    rescaled,
    round_to,
    scale_of,
    scaled,
    terms_rounded_down,
    wide_dtype,
)
from l1inf_optax._projection.sums import largest
from l1inf_optax._projection.xla_cpu import not_fused
from l1inf_optax._sharding import Rows

LARGEST_WEIGHT = 2.0**60


class Scaling(NamedTuple):
    """Magnitudes scaled by a power of two to 1 <= c < 2, or lowered first and then scaled.

    Magnitudes that the scale would take out of range, those of a column far larger than c, are
    lowered by what a threshold near the root takes off them. What then underflows is nothing beside
    the largest.

    Attributes:
        up: Two powers of two that take a value to this scale; their product could overflow.
        down: Their reciprocals.
        is_lowered: Columns that are lowered.
        unit: Two powers of two that take the largest magnitude to [1, 2).
        back: Two that take this to the scale.
        lowered_by: What lowers magnitudes times ``unit``: the largest threshold there is or, in a
            weighted search, one next to the least there may be, and its rounding errors.
        infinite: Columns that hold an infinity, beside which every finite entry is nothing.
        stand_in: The magnitude that stands for infinity, the radius or the largest that can be
            stored: it leaves k of them an equal share.
    """

    up: Pair
    down: Pair
    is_lowered: jax.Array
    unit: Pair
    back: Pair
    lowered_by: Arrays
    infinite: jax.Array
    stand_in: jax.Array

    def finite(self, part: jax.Array) -> jax.Array:
        """Magnitudes, on their own scale, of which none is infinite."""
        a = jnp.abs(part.astype(self.unit[0].dtype))
        return jnp.where(self.infinite, jnp.where(a == jnp.inf, self.stand_in, 0 * a), a)

    def magnitude(self, part: jax.Array, slope: jax.Array | None) -> jax.Array:
        """Magnitudes on the scale."""
        a = self.finite(part)
        lowered = rescaled(a, self.unit)
        for theta in self.lowered_by:
            lowered = above_threshold(lowered, (theta, 0), slope)
        lowered = scaled(lowered, self.back)
        if slope is not None:  # beside so large an entry rounding hides the ball; still it must end
            lowered = jnp.minimum(lowered, LARGEST_WEIGHT)
        return jnp.where(self.is_lowered, lowered, rescaled(a, self.up))


class Columns(NamedTuple):
    """What the search for the thresholds compares, adds up and aims at.

    Attributes:
        entries: What thresholds are compared with, one array for each part: the parts themselves,
            of which only the magnitudes count, or, on a scale of their own, magnitudes.
        slope: How fast a survivor shrinks as the threshold rises, one array for each part; None
            where every slope is 1.
        dtypes: The dtype of each part.
        c: The radius.
        c_rest: What the float ``c`` leaves out of the radius, in terms of falling size.
        floor: The least threshold there is: 0, which leaves a column as it is.
        outside: Columns known to be outside their ball.
        free: Columns without a constraint, c = inf.
        scaling: How the entries were scaled; None where they are the parts.
        rows: The devices that hold the rest of the columns.
    """

    entries: Arrays
    slope: Arrays | None
    dtypes: tuple[jnp.dtype, ...]
    c: jax.Array
    c_rest: Arrays
    floor: jax.Array
    outside: jax.Array
    free: jax.Array
    scaling: Scaling | None
    rows: Rows

    def magnitude(self, x: jax.Array) -> jax.Array:
        """The magnitudes of entries."""
        if self.scaling is not None:
            return x
        return magnitude(x.astype(self.c.dtype), is_weighted=self.slope is not None)

    def as_stored(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Survivors, rounded as they will be in ``dtype``, on the scale of the entries."""
        if dtype == x.dtype:
            return x
        if self.scaling is None or jnp.finfo(dtype).nexp == jnp.finfo(x.dtype).nexp:
            return round_to(x, dtype)  # a format of the same range: the scale changes no bit
        return scaled(round_to(scaled(x, self.scaling.down), dtype), self.scaling.up)


def magnitude(x: jax.Array, *, is_weighted: bool) -> jax.Array:
    """Magnitudes as they are; in a weighted search none so large that a threshold overflows."""
    a = jnp.abs(x)
    return jnp.minimum(a, LARGEST_WEIGHT) if is_weighted else a


def above_threshold(
    a: jax.Array, theta: tuple[ArrayLike, ArrayLike], slope: jax.Array | None
) -> jax.Array:
    """How far magnitudes are above a threshold, to their own last bits."""
    if slope is None:
        return (a - theta[0]) - theta[1]
    first, second = (not_fused(slope * x) for x in theta)
    return (a - first) - second


def threshold_leaving_c(
    a: Arrays, slope: Arrays | None, c: jax.Array, axes: Axes, rows: Rows
) -> Pair:
    """The largest threshold that leaves some magnitude at c: left of the root."""
    info = jnp.finfo(c.dtype)
    most = jnp.full_like(c, info.max)
    if slope is None:
        top = rows.max(largest(a, axes))
        threshold = moved((top, jnp.zeros_like(top)), -c)
    else:
        keys = tuple((x - c) / g for x, g in zip(a, slope, strict=True))
        top = rows.max(largest(keys, axes, initial=-float(info.max)))
        threshold = top - jnp.abs(top) * (4 * float(info.eps)), jnp.zeros_like(top)
    return choose(top < jnp.inf, threshold, (most, jnp.zeros_like(most)))


def slopes_of(parts: Arrays, metric: Arrays, axes: Axes) -> Arrays:
    """The reciprocals of a metric's weights, those of a column from 2^-60 to 1."""
    dtype = wide_dtype(*(part.dtype for part in parts))
    info = jnp.finfo(dtype)
    d = tuple(weights.astype(dtype) for weights in metric)
    least = -largest(tuple(-x for x in d), axes, initial=-float(info.max))
    unit = scale_of(-exponent_of(jnp.maximum(lax.stop_gradient(least), info.tiny)))
    infinite = largest(tuple(jnp.abs(part).astype(dtype) for part in parts), axes) == jnp.inf
    slopes = (jnp.clip(1 / rescaled(x, unit), 1 / LARGEST_WEIGHT, 1) for x in d)
    return tuple(jnp.where(infinite, 1, slope) for slope in slopes)  # which share c equally


def columns_of(
    parts: Arrays, c: Arrays, slope: Arrays | None, axes: Axes, *, is_ordinary: bool, rows: Rows
) -> Columns:
    """The columns of some parts, on a scale of their own unless their radius is ordinary."""
    if is_ordinary:
        dtypes = tuple(part.dtype for part in parts)
        nothing, no = jnp.zeros_like(c[0]), jnp.zeros(c[0].shape, bool)
        return Columns(parts, slope, dtypes, c[0], c[1:], nothing, no, no, None, rows)
    return _on_a_scale(parts, c, slope, axes, rows)


def _on_a_scale(parts: Arrays, c: Arrays, slope: Arrays | None, axes: Axes, rows: Rows) -> Columns:
    dtype = wide_dtype(*(part.dtype for part in parts))
    info = jnp.finfo(dtype)
    head, *rest = [*terms_rounded_down(c[0], dtype, jnp), *c[1:]] if c[0].dtype != dtype else c
    radius = jnp.clip(head, 0, info.max)  # a NaN stays one
    exponent = exponent_of(jnp.maximum(radius, info.tiny))
    up = scale_of(-exponent)
    top = rows.max(largest(tuple(jnp.abs(part.astype(dtype)) for part in parts), axes))
    infinite = top == jnp.inf
    top = jnp.where(infinite, radius, top)
    # A threshold's share of a weighted entry rounds with the entry: where the ball is small beside
    # it, better once than at every threshold.
    is_lowered = top * (2.0**-40 if slope is None else 2.0**-4) > radius
    own = exponent_of(jnp.maximum(top, info.tiny))
    scaling = Scaling(
        up=up,
        down=scale_of(exponent),
        is_lowered=is_lowered,
        unit=scale_of(-own),
        back=scale_of(own - exponent),
        lowered_by=(),
        infinite=infinite,
        stand_in=jnp.minimum(radius, min(float(jnp.finfo(x.dtype).max) for x in parts)),
    )
    scaling = scaling._replace(
        lowered_by=_lowered_by(scaling, parts, slope, top, radius, axes, rows)
    )
    slopes = (None,) * len(parts) if slope is None else slope
    entries = tuple(map(scaling.magnitude, parts, slopes))
    c_scaled = rescaled(radius, up)
    if slope is None:
        floor = -c_scaled
    else:
        floor = threshold_leaving_c(entries, slope, c_scaled, axes, rows)[0]
    return Columns(
        entries=entries,
        slope=slope,
        dtypes=tuple(part.dtype for part in parts),
        c=c_scaled,
        c_rest=tuple(rescaled(x, up) for x in rest),
        floor=jnp.where(is_lowered, floor, 0),
        outside=infinite | is_lowered,
        free=jnp.isposinf(head),
        scaling=scaling,
        rows=rows,
    )


def _lowered_by(
    scaling: Scaling,
    parts: Arrays,
    slope: Arrays | None,
    top: jax.Array,
    radius: jax.Array,
    axes: Axes,
    rows: Rows,
) -> Arrays:
    """Thresholds that take large columns to about c, one after the other."""
    if slope is None:
        return (scaled(top, scaling.unit),)
    a = tuple(rescaled(scaling.finite(x), scaling.unit) for x in parts)
    thresholds: Arrays = ()
    for _ in range(3):  # each leaves an error of eps times what was lowered
        theta, _ = threshold_leaving_c(a, slope, scaled(radius, scaling.unit), axes, rows)
        a = tuple(above_threshold(x, (theta, 0), g) for x, g in zip(a, slope, strict=True))
        thresholds = *thresholds, theta
    return thresholds
