"""The threshold of every column: columns and tolerances in, what the search has found out."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.arguments import Axes
from l1inf_optax._projection.columns import LARGEST_WEIGHT, Columns, threshold_leaving_c
from l1inf_optax._projection.floats import Pair, choose, reciprocal, scaled
from l1inf_optax._projection.measure import Measured, largest_share, measure
from l1inf_optax._projection.search import NEWTON_PASSES, Known, Tolerances, search
from l1inf_optax._projection.shrink import Found
from l1inf_optax._projection.sort import sorted_thresholds
from l1inf_optax._projection.sphere import inside, invisible_in_float64
from l1inf_optax._projection.sums import length


def find_thresholds(columns: Columns, start: jax.Array, axes: Axes, method: str) -> Found:
    """Searches from ``start``, or sorts first and searches from there: rounding is left to it."""
    scaling = columns.scaling
    if scaling is not None:
        lowered = scaled(scaling.lowered_by[0], reciprocal(scaling.unit))
        lowered = jnp.where(scaling.is_lowered, lowered, 0)
        start = scaled(start - lowered, scaling.up)
    if method == "sort":
        start = sorted_thresholds(columns, axes)
    theta, is_inside, passes = _searched(columns, start, axes)
    threshold = theta[0] + theta[1]
    if scaling is not None:
        threshold = lowered + scaled(threshold, scaling.down)
    return Found(
        theta=theta,
        inside=is_inside,
        largest_share=largest_share(columns, theta[0], axes),
        scaling=scaling,
        threshold=jnp.where(is_inside, 0, threshold),
        passes=passes,
    )


def _searched(columns: Columns, start: jax.Array, axes: Axes) -> tuple[Pair, jax.Array, jax.Array]:
    """Thresholds, which columns are inside, and passes: the search, and its doubts decided."""

    def measured(theta: Pair, opaque_true: jax.Array) -> Measured:
        return measure(columns, theta, axes, opaque_true)

    def leaving_c() -> Pair:
        magnitudes = tuple(map(columns.magnitude, columns.entries))
        return threshold_leaving_c(magnitudes, columns.slope, columns.c, axes, columns.rows)

    no = jnp.zeros(columns.floor.shape, bool)
    known = Known(columns.outside, no, columns.free, columns.free, no, no)
    tolerances = _tolerances(columns, axes)
    state = search(measured, leaving_c, tolerances, start, columns.floor, known)
    doubtful = state.known.doubtful
    floor = columns.floor, jnp.zeros_like(columns.floor)

    def decided() -> tuple[Pair, jax.Array, jax.Array]:
        is_inside = inside(columns, doubtful, axes)
        trial = choose(is_inside, floor, state.trial)
        return trial, state.known.inside | is_inside, state.passes

    def undoubted() -> tuple[Pair, jax.Array, jax.Array]:
        return state.trial, state.known.inside, state.passes

    return lax.cond(jnp.any(doubtful), decided, undoubted)


def _tolerances(columns: Columns, axes: Axes) -> Tolerances:
    info = jnp.finfo(columns.c.dtype)
    eps = float(info.eps)
    coarsest = max((jnp.finfo(dtype) for dtype in columns.dtypes), key=lambda f: f.eps)
    is_short = coarsest.eps > info.eps
    slack = (2 if is_short else 3) * float(coarsest.eps) * columns.c
    underflow = jnp.zeros_like(columns.floor)
    if is_short:
        n = length(columns.entries, axes) * columns.rows.devices
        is_float16 = coarsest.dtype == jnp.float16  # bfloat16 may flush subnormal numbers to zero
        least = coarsest.smallest_subnormal if is_float16 else coarsest.tiny
        underflow = jnp.full_like(slack, float(least) * n)
        if columns.scaling is not None:
            underflow = scaled(underflow, columns.scaling.up)
        slack += underflow
    # With a metric Newton's method needs passes for every factor of the largest ratio of weights.
    more = 0 if columns.slope is None else round(math.log2(LARGEST_WEIGHT))
    return Tolerances(
        c=columns.c,
        invisible=sum(columns.c_rest) * (1 + 4 * eps) + columns.c * invisible_in_float64(info),
        slack=slack,
        underflow=underflow,
        eps=eps,
        storage_eps=float(coarsest.eps),
        is_weighted=columns.slope is not None,
        newton_passes=NEWTON_PASSES + more,
    )
