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
    is_traced,
)
from l1inf_optax._projection.arguments import radius as rounded_down

if TYPE_CHECKING:
    from l1inf_optax._layers import Layer

Number = float | jax.Array

# In the place of a number of updates: the radius falls; and the layer has had all the zeros that it
# is to have from the start. Those were not made: they do not tell when to stop.
STILL_FALLING = int(np.iinfo(np.int32).max) - 1
NOT_BEGUN = int(np.iinfo(np.int32).max)
_DEEPEST = 1e-3  # of its start: where a radius ends that was only told how many zeros to make


class ShrinkState(NamedTuple):
    """How far the radii have come that :func:`shrink` made.

    Each field is like the thresholds of :class:`KeepParamsInL1InfBallState`: nested dicts with the
    keys of the layers' kernels, for those layers alone. Under them are scalars; a stack of layers
    has one for each of its members.

    Attributes:
        start: float32, the radius at the first update.
        held_from: int32, the number of updates after which the radius had fallen. Before that it is
            2^31 - 2, or 2^31 - 1 if the layer had as many zeros as it is to have from the start.
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
            is_empty = layer.share_of_zeros(layer.zero_weights(layer.columns(leaves))) == 1
            start = jnp.where(is_empty, jnp.maximum(start, 1), start)
        if self.zeros is not None and not is_traced(self.zeros):
            rows = layer.weights_of_a_unit([leaves[i] for i in layer.kernels])
            _check_reachable(self.zeros, rows, layer.path)
        return ShrinkState(start, jnp.full_like(start, NOT_BEGUN, jnp.int32))

    def advance(self, state: ShrinkState, step: jax.Array, share_of_zeros: Any) -> ShrinkState:
        """The state at an update, given the share of the layer's weights that are zero."""
        held_from = state.held_from
        has_fallen = step >= self.over
        if self.zeros is None:
            held_from = jnp.minimum(held_from, STILL_FALLING)
        else:  # zeros of the initialisation, which has yet to learn, are none that were made
            is_sparse = share_of_zeros >= self.zeros
            has_fallen |= is_sparse & (held_from == STILL_FALLING)
            held_from = jnp.where(is_sparse, held_from, jnp.minimum(held_from, STILL_FALLING))
        return state._replace(
            held_from=jnp.where(has_fallen, jnp.minimum(held_from, step), held_from)
        )

    def radius(self, state: ShrinkState, step: ArrayLike) -> jax.Array:
        """The radius at the update before which there were so many."""
        held_from = jnp.asarray(state.held_from)
        start, end = self._span(state)
        share = jnp.minimum(jnp.asarray(step) + 1, held_from) / self.over
        # Powers are rounded: the end is reached exactly, and never passed. There may be no ball.
        is_falling = (share < 1) & (end < jnp.inf)
        radius = jnp.where(is_falling, jnp.maximum(start * (end / start) ** share, end), end)
        if self.release is None:
            return radius
        released = rounded_down(self.release, start.dtype, ())
        return jnp.where(step < held_from, radius, released)

    def first(self, state: ShrinkState) -> jax.Array:
        """The radius before any update."""
        return self._span(state)[0]

    def _span(self, state: ShrinkState) -> tuple[jax.Array, jax.Array]:
        """From where to where it falls."""
        start = jnp.asarray(state.start)
        end = _DEEPEST * start if self.to is None else rounded_down(self.to, start.dtype, ())
        return jnp.maximum(start, end), end


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
    first ``over`` updates, by the same factor in each. One column after the other reaches its
    sphere and stays there, and the ball chooses which weights are zero. From then on these stay
    zero, and the rest of training fits the others. Biases are not held.

    Each layer that it is given to has its own start and stops by itself; of stacked layers, each
    member does.

    Args:
        to: Radius at the end, positive; ``jnp.inf`` for no ball at all. May be traced, as when
            several are trained at once.
        over: Number of updates in which it falls: a half to three quarters of all of them. The
            learning rate should fall to zero in the others.
        start: First radius. ``None`` for the largest norm of the layer's own columns at ``init``,
            or at least 1 if all its weights are zero; such a layer is better given one. A radius
            that would start below ``to`` stays there.
        zeros: In place of ``to``: the share of the layer's weights, biases not counted, that are
            to be zero. The radius stops falling when they are. It falls by a factor of 1000 in
            ``over`` updates, so that a half of them may be enough. In small balls the network may
            need ``release`` to learn anything.
        release: Radius from then on, ``jnp.inf`` for none: what is left is fitted without
            shrinkage, as in the relaxed lasso.
        hold: False lets zeros go again.

    Returns:
        What to give for ``c``. Its state is kept by the transformation, so it is saved and restored
        with the rest.

    Raises:
        ValueError: There is neither ``to`` nor ``zeros``, or both; a radius is not positive,
            ``start`` not finite or below ``to``; ``over`` is no positive whole number;
            ``release`` without ``hold``; and, from ``init``, so many ``zeros`` leave less than one
            weight to a unit.

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
    if start is not None and not is_traced(start - end):
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


def _check_reachable(zeros: Number, rows: int, path: str) -> None:
    """A column in a small ball keeps its largest entry: more zeros are out of reach."""
    if zeros > 1 - 1 / rows:
        raise ValueError(
            f"zeros={brief(zeros)} leaves less than one of {rows} weights to a unit of "
            f"{path!r}: ask for at most {1 - 1 / rows:.4g}, or say a radius, shrink(to=...)"
        )
