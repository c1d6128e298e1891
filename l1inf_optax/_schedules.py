"""A radius that falls while a layer trains, and holds the zeros that this has made.

A schedule knows nothing but the number of updates. This knows its layer, too: it starts at the
layer's own norm, and may stop when enough of its weights are zero. So it has a state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from l1inf_optax._projection.arguments import (
    brief,
    check_count,
    check_radius,
    check_share,
)
from l1inf_optax._projection.arguments import radius as rounded_down

if TYPE_CHECKING:
    from l1inf_optax._layers import Layer

Number = float | jax.Array

STILL_FALLING = int(np.iinfo(np.int32).max)
_DEEPEST = 1e-3  # of its start: where a radius ends that was only told how many zeros to make


class ShrinkState(NamedTuple):
    """How far the radii have come that :func:`shrink` made.

    Each field is like the thresholds of :class:`KeepParamsInL1InfBallState`: nested dicts with the
    keys of the layers' kernels, for those layers alone. Under them are scalars; a stack of layers
    has one for each of its members.

    Attributes:
        start: float32, the radius at the first update.
        held_from: int32, the number of updates after which the radius had fallen; 2^31 - 1 before.
    """

    start: Any
    held_from: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Shrink:
    """A radius, as :func:`shrink` describes it; its attributes are the arguments."""

    to: Number | None
    over: int | jax.Array
    start: Number | None
    zeros: Number | None
    release: Number | None
    hold: bool

    def begin(self, layer: Layer, leaves: Sequence[Any]) -> ShrinkState:
        """The state of a layer whose parameters are these leaves."""
        if self.start is not None:
            start = jnp.full(layer.matrices_shape, self.start, jnp.float32)
        elif any(isinstance(leaves[i], jax.ShapeDtypeStruct) for i in layer.leaves):
            raise ValueError(
                f"params has the shape of {layer.path!r} alone, and shrink starts at its norm: "
                "give init the parameters, inside jax.eval_shape if need be, or say start="
            )
        else:
            start = layer.norm(leaves)
            start = jnp.where(start == 0, 1, start)
        return ShrinkState(start, jnp.full_like(start, STILL_FALLING, jnp.int32))

    def advance(self, state: ShrinkState, step: jax.Array, share_of_zeros: Any) -> ShrinkState:
        """The state at an update, given the share of the layer's weights that are zero."""
        has_fallen = step >= self.over
        if self.zeros is not None:  # but not at once: what starts at zero has yet to learn
            has_fallen |= (step > 0) & (share_of_zeros >= self.zeros)
        return state._replace(
            held_from=jnp.where(has_fallen, jnp.minimum(state.held_from, step), state.held_from)
        )

    def radius(self, state: ShrinkState, step: ArrayLike) -> jax.Array:
        """The radius at the update before which there were so many."""
        start, held_from = (jnp.asarray(x) for x in state)
        end = _DEEPEST * start if self.to is None else rounded_down(self.to, start.dtype, ())
        start = jnp.maximum(start, end)
        share = jnp.minimum(step, held_from) / self.over
        # Powers are rounded: the end is reached exactly, and never passed. There may be no ball.
        is_falling = (share < 1) & (end < jnp.inf)
        radius = jnp.where(is_falling, jnp.maximum(start * (end / start) ** share, end), end)
        if self.release is None:
            return radius
        released = rounded_down(self.release, start.dtype, ())
        return jnp.where(step < held_from, radius, released)


def shrink(
    to: Number | None = None,
    over: int | jax.Array | None = None,
    *,
    start: Number | None = None,
    zeros: Number | None = None,
    release: Number | None = None,
    hold: bool = True,
) -> Shrink:
    """A radius that falls while a layer trains; then zeros are held.

    Use it wherever ``c`` is a number: ``constrain(optimizer, shrink(0.1, over=2000))``, or in a
    mapping, ``{"hidden_*": shrink(zeros=0.9, over=2000)}``. The radius falls geometrically in the
    first ``over`` updates, by the same factor in each. Meanwhile every column stays on its sphere,
    and the ball chooses which weights are zero. From then on these stay zero, and the rest of
    training fits the others. Biases are not held.

    Each layer that it is given to has its own start and stops by itself; of stacked layers, each
    member does.

    Args:
        to: Radius at the end, positive; ``jnp.inf`` for no ball at all. May be traced, as when
            several are trained at once.
        over: Number of updates in which it falls: a half to three quarters of all of them. The
            learning rate should fall to zero in the others.
        start: First radius. ``None`` for the largest norm of the layer's own columns at ``init``,
            or 1 if these are zero. A radius that would start below ``to`` stays there.
        zeros: In place of ``to``: the share of the layer's weights, between 0 and 1, that are to
            be zero. The radius stops falling when they are; it falls by a factor of 1000 at most.
        release: Radius from then on, ``jnp.inf`` for none: what is left is fitted without
            shrinkage, as in the relaxed lasso.
        hold: False lets zeros go again.

    Returns:
        What to give for ``c``. Its state is kept by the transformation, so it is saved and restored
        with the rest.

    Raises:
        ValueError: There is neither ``to`` nor ``zeros``, or both; a radius is not positive,
            ``start`` not finite or below ``to``; ``over`` is no positive whole number;
            ``release`` without ``hold``.

    References:
        Meinshausen (2007), *Relaxed lasso*.

    Example:
        >>> import jax, jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> params = {"hidden": {"kernel": jax.random.normal(jax.random.key(0), (50, 4))}}
        >>> tx = l1inf.constrain(optax.adam(1e-2), l1inf.shrink(zeros=0.9, over=100))
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool((params["hidden"]["kernel"] == 0).mean() >= 0.9)
        True
    """
    if (to is None) == (zeros is None):
        raise ValueError(
            f"to={brief(to)} and zeros={brief(zeros)}: give one of them, the radius at the end or "
            "the share of weights that are to be zero"
        )
    check_count("over", over, "the number of updates in which the radius falls", least=1)
    assert over is not None
    for name, radius in (("to", to), ("start", start), ("release", release)):
        if radius is not None:
            check_radius(radius, columns=(), name=name)
    if zeros is not None:
        what = "the share of the weights that are to be zero, such as 0.9"
        check_share("zeros", zeros, what, may_be_zero=False)
    end = 0.0 if to is None else to
    if start is not None and _is_known(start - end):
        if start < end:
            raise ValueError(
                f"start={brief(start)} is less than to={brief(to)}: a radius falls from start to to"
            )
        if start == jnp.inf > end:
            raise ValueError(f"start={brief(start)} is not finite: give the first radius, or None")
    if release is not None and not hold:
        raise ValueError(
            f"release={brief(release)} with hold=False: in a larger ball zeros would be lost. Hold "
            "them, or leave release away"
        )
    return Shrink(to, over, start, zeros, release, hold)


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)
