"""What soft-thresholding at some threshold leaves of every column, in one pass over the entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from l1inf_optax._projection.arguments import Arrays, Axes
from l1inf_optax._projection.columns import Columns, above_threshold
from l1inf_optax._projection.floats import Pair
from l1inf_optax._projection.sums import (
    FOLDS,
    add,
    device_rounding_bound,
    doubled_column_sums,
    fold,
    over_devices,
)
from l1inf_optax._projection.xla_cpu import kept_in_the_loop

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float


class Measured(NamedTuple):
    """The norm of what soft-thresholding leaves of a column.

    Attributes:
        norm: The norm.
        excess: How far it is above c.
        doubt: How far rounding may have taken both from the truth.
        slope: How fast the norm falls as the threshold rises: the number of survivors, or with a
            metric the sum of their slopes.
    """

    norm: Float[Array, "*columns"]
    excess: Float[Array, "*columns"]
    doubt: Float[Array, "*columns"]
    slope: Float[Array, "*columns"]

    @property
    def most_excess(self) -> jax.Array:
        """The largest excess that rounding allows."""
        return self.excess + self.doubt

    @property
    def least_excess(self) -> jax.Array:
        """The least excess that rounding allows."""
        return self.excess - self.doubt


def measure(columns: Columns, theta: Pair, axes: Axes, opaque_true: jax.Array) -> Measured:
    """The norm at a threshold; ``opaque_true`` as in :func:`in_stages`."""
    eps = float(jnp.finfo(columns.c.dtype).eps)
    sums = doubled_column_sums(
        lambda: _survivors(columns, theta, axes),
        axes,
        opaque_true,
        first=lambda norm, slope: (norm, jnp.zeros_like(norm), slope),
    )
    norm, error, slope = over_devices(sums, columns.c, columns.rows)
    # What rounds is the first fold; adding up k numbers rounds k - 1 times, by eps / 2 at most. The
    # 2^-8 covers the second order, and the rounding of this line.
    steps = FOLDS if columns.slope is not None else jnp.clip(slope - 1, 0, FOLDS)
    doubt = norm * steps * (eps / 2 * (1 + 2.0**-8))
    doubt += device_rounding_bound(norm, columns.c, columns.rows)
    return Measured(norm, (norm - columns.c) + error, doubt, slope)


def _survivors(columns: Columns, theta: Pair, axes: Axes) -> list[Arrays]:
    """What soft-thresholding leaves, and how fast it shrinks, folded."""
    entries, theta = kept_in_the_loop((columns.entries, theta))
    pairs: list[Arrays] = []

    def values(x: jax.Array, *slope: jax.Array) -> Arrays:
        over = above_threshold(columns.magnitude(x), theta, *(slope or (None,)))
        dropped = over <= 0  # a NaN is not
        # -0.0 is what addition leaves alone: the compiler can skip instead of add.
        kept = slope[0] if slope else jnp.ones_like(over)
        return jnp.where(dropped, -0.0, over), jnp.where(dropped, -0.0, kept)

    for i, x in enumerate(entries):
        slope = () if columns.slope is None else (columns.slope[i],)
        pairs += fold(values, (x, *slope), axes, add)
    return pairs
