"""From the thresholds to the projected columns, entry by entry."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.arguments import Arrays
from l1inf_optax._projection.columns import Scaling, above_threshold
from l1inf_optax._projection.floats import Pair, bits, round_down, round_to, scaled


class Projected(NamedTuple):
    """Columns, projected.

    Attributes:
        parts: The projected parts, in the shapes and dtypes of what was projected.
        threshold: The thresholds, zero where a column was inside its ball; of the shape of the
            columns. The next projection of similar columns may start from them.
        inside: Which columns were inside; like the threshold, but ``axes`` are kept.
        passes: int32 scalar, how many times the entries were read to find the thresholds.
    """

    parts: Arrays
    threshold: jax.Array
    inside: jax.Array
    passes: jax.Array


class Found(NamedTuple):
    """What the search has found of each column; enough to project its entries one by one.

    Attributes:
        theta: The threshold of the column's entries on their scale.
        inside: Whether the column is inside its ball.
        largest_share: The largest value an entry may keep.
        scaling: The entries' scale, as in `Columns`.
        threshold: The threshold of the parts themselves.
        passes: How many thresholds were tried.
    """

    theta: Pair
    inside: jax.Array
    largest_share: jax.Array
    scaling: Scaling | None
    threshold: jax.Array
    passes: jax.Array


def shrink(parts: Arrays, entries: Arrays, slope: Arrays | None, found: Found) -> Projected:
    """The parts, projected, from their entries as the search has compared them."""
    slopes = (None,) * len(parts) if slope is None else slope
    results = tuple(
        _shrunk(part, entry, g, found)
        for part, entry, g in zip(parts, entries, slopes, strict=True)
    )
    return Projected(results, found.threshold, found.inside, found.passes)


def _shrunk(part: jax.Array, entry: jax.Array, slope: jax.Array | None, found: Found) -> jax.Array:
    w = above_threshold(entry, found.theta, slope)
    if found.scaling is None:
        share = round_down(found.largest_share, part.dtype)
        w = jnp.where(w > share, share, w)
    else:
        w = jnp.where(found.inside, 0, scaled(w, found.scaling.down))
    w = round_to(w, part.dtype)
    # Inside its ball a column has threshold 0 and survives as it is, but for what computers take
    # for zero: negative zeros and subnormal numbers. In bits, as no CPU selects 16-bit floats.
    stored = bits(part)
    sign = stored & bits(jnp.asarray(-0.0, part.dtype))
    rest = jnp.where(found.inside, stored, 0)
    return lax.bitcast_convert_type(
        jnp.where(w <= 0, rest, bits(w.astype(part.dtype)) | sign), part.dtype
    )
