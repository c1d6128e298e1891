"""The threshold of every column: what an answer has to meet, and the search for it."""

import math

import jax
import jax.numpy as jnp

from l1inf_optax._projection.arguments import LARGEST_WEIGHT, Axes
from l1inf_optax._projection.columns import Columns, threshold_leaving_c
from l1inf_optax._projection.floats import Pair, exponent_of, power_of_two
from l1inf_optax._projection.judge import Aim, Known
from l1inf_optax._projection.measure import Measured, measure
from l1inf_optax._projection.search import NEWTON_PASSES, search
from l1inf_optax._projection.shrink import Found
from l1inf_optax._projection.sort import sorted_thresholds


def find_thresholds(
    columns: Columns, start: jax.Array, axes: Axes, method: str, near: jax.Array
) -> Found:
    """Searches from ``start``, or sorts first and searches from there: rounding is left to it."""
    if columns.scale is not None:
        start = start * columns.scale
    if method == "sort":
        start = sorted_thresholds(columns, axes)

    def measured(theta: Pair, opaque_true: jax.Array) -> Measured:
        return measure(columns, theta, axes, opaque_true)

    no = jnp.zeros(columns.c.shape, bool)
    state = search(
        measure=measured,
        leaving_c=lambda: threshold_leaving_c(columns, axes),
        aim=_aim(columns, near),
        start=start,
        known=Known(
            outside=no,
            inside=columns.free,
            done=columns.free,
            on_sphere=no,
            crossed=no,
            topped=no,
        ),
    )
    theta, inside = state.trial, state.known.inside
    threshold = theta[0] + theta[1]
    if columns.scale is not None:
        threshold = threshold / columns.scale
    return Found(
        theta=theta,
        inside=inside,
        largest_share=_largest_share(columns, theta),
        scale=columns.scale,
        threshold=jnp.where(inside, 0, threshold),
        slope=state.slope,
        on_sphere=state.known.on_sphere,
        passes=state.passes,
    )


def _largest_share(columns: Columns, theta: Pair) -> jax.Array:
    """The largest value an entry may keep: of k infinite ones, an equal share of c."""
    info = jnp.finfo(columns.c.dtype)
    # Where none but infinite entries survive. Elsewhere the second float would be negative: a
    # threshold is less than the largest entry.
    only_infinite = (theta[0] == info.max) & (theta[1] > 0)
    k = jnp.where(only_infinite, theta[1], 1)
    # c / k rounded down, so that k of them fit into c; a power of two divides without rounding.
    rounding = jnp.where(k == power_of_two(exponent_of(k)), 1, 1 - info.eps)
    return jnp.where(only_infinite, columns.c / k * rounding, jnp.inf)


def _aim(columns: Columns, near: jax.Array) -> Aim:
    eps = float(jnp.finfo(columns.c.dtype).eps)
    # With a metric Newton's method needs passes for every factor of the largest ratio of weights.
    more = 0 if columns.slope is None else round(math.log2(LARGEST_WEIGHT))
    return Aim(
        c=columns.c,
        shortfall=3 * eps * columns.c,
        near=near * columns.c,
        unseen=columns.unseen,
        eps=eps,
        is_weighted=columns.slope is not None,
        newton_passes=NEWTON_PASSES + more,
    )
