"""From the thresholds to the projected columns, entry by entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.arguments import Arrays
from l1inf_optax._projection.columns import above_threshold, magnitude
from l1inf_optax._projection.floats import Pair, bits, round_down

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int


class Projected(NamedTuple):
    """Columns, projected.

    Attributes:
        parts: The projected parts, in the shapes and dtypes of what was projected.
        threshold: The thresholds, zero where a column was inside its ball; of the shape of the
            columns. The next projection of similar columns may start from them.
        inside: Which columns were inside; like the threshold, but ``axes`` are kept.
        slope: How fast the norm falls as the threshold rises: the number of survivors, or with a
            metric the sum of their slopes; ``axes`` are kept.
        on_sphere: Which columns have a norm of c, or as little less as was asked for; ``axes`` are
            kept.
        passes: int32 scalar, how many times the entries were read to find the thresholds.
    """

    parts: Arrays
    threshold: Float[Array, "*columns"]
    inside: Bool[Array, "*columns"]
    slope: Float[Array, "*columns"]
    on_sphere: Bool[Array, "*columns"]
    passes: Int[Array, ""]


class Found(NamedTuple):
    """What the search has found of each column; enough to project its entries one by one.

    Attributes:
        theta: The threshold of the column's magnitudes on their scale.
        inside: Whether the column is inside its ball.
        largest_share: The largest value an entry may keep on its scale.
        scale: The power of two that magnitudes are multiplied by, as in `Columns`.
        threshold: The threshold of the parts themselves.
        slope: As in `Projected`.
        on_sphere: As in `Projected`.
        passes: How many thresholds were tried.
    """

    theta: Pair
    inside: Bool[Array, "*columns"]
    largest_share: Float[Array, "*columns"]
    scale: Float[Array, "*columns"] | None
    threshold: Float[Array, "*columns"]
    slope: Float[Array, "*columns"]
    on_sphere: Bool[Array, "*columns"]
    passes: Int[Array, ""]


def shrink(parts: Arrays, slope: Arrays | None, found: Found) -> Projected:
    """The parts, projected."""
    slopes = (None,) * len(parts) if slope is None else slope
    results = tuple(_shrunk(x, g, found) for x, g in zip(parts, slopes, strict=True))
    return Projected(
        results, found.threshold, found.inside, found.slope, found.on_sphere, found.passes
    )


def _shrunk(part: jax.Array, slope: jax.Array | None, found: Found) -> jax.Array:
    wide = part.astype(found.threshold.dtype)
    a = magnitude(wide, found.scale, is_weighted=slope is not None)
    w = jnp.minimum(jnp.maximum(above_threshold(a, found.theta, slope), 0), found.largest_share)
    if found.scale is not None:
        w = w / found.scale
    # Rounded towards zero, so that what is stored fits into the ball that the search has met.
    w = round_down(w, part.dtype)
    # Inside its ball a column has threshold 0 and survives as it is, but for what computers take
    # for zero: negative zeros and subnormal numbers. In bits, as no CPU selects 16-bit floats.
    stored = bits(part)
    sign = stored & bits(jnp.asarray(-0.0, part.dtype))
    projected = jnp.where(w <= 0, 0, bits(w.astype(part.dtype)) | sign)
    return lax.bitcast_convert_type(jnp.where(found.inside, stored, projected), part.dtype)
