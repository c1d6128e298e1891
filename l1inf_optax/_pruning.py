"""Zeros by a count: the smallest weights become zero while a network trains, and stay zero.

A ball that shrinks chooses zeros and shrinks what is left. In small balls that cripples a deep
network while its zeros are chosen, and so they are badly chosen. Here nothing is shrunk: the next
weights to become zero are those that are nearest to it, in the metric the optimizer steps in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from l1inf_optax._projection.arguments import (
    Arrays,
    brief,
    check_count,
    check_radius,
    check_share,
    is_traced,
)

if TYPE_CHECKING:
    from l1inf_optax._layers import Layer

Operands = tuple[Arrays, Arrays]  # parameters and their updates

_MOST_WEIGHTS = 2**31 - 1  # int32, which counts them
_ROUNDS = 100  # that the zeros come in, at most: a round ranks all weights


@dataclasses.dataclass(frozen=True, eq=False)
class Prune:
    """A radius, and how many zeros there are to be, as :func:`prune` describes them."""

    zeros: float | jax.Array
    over: int | jax.Array
    start: int | jax.Array
    c: Any

    def due(self, step: jax.Array, zeros: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """How many zeros this update is to reach, and whether it has to choose new ones.

        Args:
            step: How many updates there were before.
            zeros: How many zeros there are.
            size: How many weights there are.
        """
        share = jnp.clip((step + 1 - self.start) / self.over, 0, 1)
        in_the_end = self.zeros * size
        # As an integer, exactly: float32 would round the count of a large network.
        in_the_end = (
            jnp.ceil(in_the_end).astype(jnp.int32)
            if is_traced(in_the_end)
            else jnp.asarray(math.ceil(in_the_end), jnp.int32)
        )
        so_far = jnp.floor(in_the_end * (1 - (1 - share) ** 3)).astype(jnp.int32)
        wanted = jnp.where(share < 1, jnp.minimum(so_far, in_the_end), in_the_end)
        missing = wanted - zeros
        is_a_round = (missing * _ROUNDS >= in_the_end) | (share == 1)
        return wanted, (missing > 0) & is_a_round


def prune(
    zeros: float | jax.Array,
    over: int | jax.Array,
    *,
    start: int | jax.Array = 0,
    c: Any = math.inf,
) -> Prune:
    r"""Makes the weights nearest to zero zero, more and more of them; then these stay zero.

    Use it wherever ``c`` is a number: ``constrain(optimizer, {"hidden_*": prune(0.95, over=2000)},
    )``. It suits trained networks and those with several hidden layers, which a ball that shrinks
    (:func:`shrink`) would cripple while it chooses zeros: nothing but the zeros is changed.

    Which weights: those whose loss moves the parameters least, in the metric the optimizer steps
    in. With Adam's :math:`d = \sqrt{\hat\nu} + \epsilon` these are the ones with the smallest
    :math:`d_i w_i^2`, so that what is left is the nearest point to w, in that metric, with so many
    zeros. All layers that share one ``prune`` are ranked together: those that need their weights
    more keep more of them. In the Euclidean metric, of SGD and of
    :func:`keep_params_in_l1inf_ball`, it is pruning by magnitude.

    The share of zeros rises as a cubic, fast at first and slowly in the end, in at most a hundred
    rounds. Between them the network recovers. Biases are left alone.

    Args:
        zeros: The share of the weights of these layers, together, that are to be zero in the end.
            Between 0 and 1; may be traced.
        over: Number of updates in which it rises: a half to three quarters of all of them. The
            learning rate should fall to zero in the others.
        start: Number of updates before it rises. From then on zeros stay, also those that there
            were: a mask of any origin is kept.
        c: Radius of the ball around it: a number or an optax schedule; none by default.

    Returns:
        What to give for ``c``. It needs no state.

    Raises:
        ValueError: ``zeros`` is not between 0 and 1, ``over`` no positive whole number, ``start``
            none or negative, ``c`` no radius; and, from ``update``, more than 2^31 weights are to
            be ranked together.

    References:
        LeCun, Denker and Solla (1990), *Optimal brain damage*, for the weighted squares. Zhu and
        Gupta (2017), *To prune, or not to prune*, for the cubic.

    Example:
        >>> import jax, optax, l1inf_optax as l1inf
        >>> params = {"hidden": {"kernel": jax.random.normal(jax.random.key(0), (50, 4))}}
        >>> tx = l1inf.constrain(optax.adam(1e-2), l1inf.prune(0.9, over=100))
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int((params["hidden"]["kernel"] == 0).sum())
        180
    """
    what = "the share of the weights that are to be zero, such as 0.9"
    check_share("zeros", zeros, what, may_be_zero=False)
    check_count("over", over, "the number of updates in which zeros are made", least=1)
    check_count("start", start, "the number of updates before zeros are made")
    if isinstance(c, Prune) or dataclasses.is_dataclass(c):
        raise ValueError(f"c={brief(c)} is no number: give the radius of the ball around it")
    if not callable(c):
        check_radius(c, columns=())
    return Prune(zeros, over, start, c)


def pruned(
    layers: Sequence[tuple[Layer, Any]],
    operands: Sequence[Operands],
    slopes: Sequence[Arrays | None],
    step: jax.Array,
) -> list[Operands]:
    """The operands of all layers, with updates that make zeros where the radius is a prune.

    Args:
        layers: With their radii.
        operands: Of each layer, as :meth:`Layer.columns` gives them.
        slopes: How far the step moves each entry for the same gradient, the factors between layers
            included; None where all move alike.
        step: How many updates there were before.
    """
    result = list(operands)
    for own in {id(radius): radius for _, radius in layers if isinstance(radius, Prune)}.values():
        members = [i for i, (_, radius) in enumerate(layers) if radius is own]
        chosen = [layers[i][0] for i in members]
        held = [_held(layers[i][0], operands[i], step >= own.start) for i in members]
        scores = [_distances(*x, slopes[i]) for x, i in zip(held, members, strict=True)]
        falls = _falling(own, chosen, scores, step)
        for i, (params, updates), marked in zip(members, held, falls, strict=True):
            taken = zip(marked, params, updates, strict=True)
            result[i] = params, tuple(jnp.where(falls, -p, u) for falls, p, u in taken)
    return result


def _falling(
    own: Prune, layers: Sequence[Layer], scores: Sequence[Arrays], step: jax.Array
) -> list[Arrays]:
    """Which weights become zero in this update."""
    size = sum(
        layer.weights_of_a_unit(score[-len(layer.kernels) :]) * math.prod(layer.columns_shape)
        for layer, score in zip(layers, scores, strict=True)
    )
    if size > _MOST_WEIGHTS:
        raise ValueError(
            f"zeros={brief(own.zeros)} is asked of {size:,} weights together, more than can be "
            "counted: give groups of layers a prune(...) of their own"
        )
    zeros = size - _count(layers, [tuple(x > 0 for x in score) for score in scores])
    wanted, is_due = own.due(step, zeros, size)
    # What is nearer to zero than the last that stays. Ties stay: no order among them is right.
    least = jax.lax.cond(
        is_due, lambda: _kth_largest(layers, scores, size - wanted), lambda: jnp.float32(0)
    )
    return [
        layer.of_weights(tuple(x < least for x in score))
        for layer, score in zip(layers, scores, strict=True)
    ]


def _held(layer: Layer, operands: Operands, is_on: jax.Array) -> Operands:
    """The operands, zeros of the parameters unmoved. A layer that is all zero has yet to start."""
    params, updates = operands
    zeros = layer.zero_weights(params)
    stays = layer.for_entries(is_on & (layer.share_of_zeros(zeros) < 1))
    return params, tuple(jnp.where(x & stays, 0, u) for x, u in zip(zeros, updates, strict=True))


def _distances(params: Arrays, updates: Arrays, slopes: Arrays | None) -> Arrays:
    """How far from zero the stepped entries are in the metric, float32; inf where it is unknown.

    The square root of ``d w^2``, as the square itself may underflow.
    """

    def distance(p: jax.Array, u: jax.Array, slope: jax.Array | None) -> jax.Array:
        w = jnp.abs(p.astype(jnp.float32) + u.astype(jnp.float32))
        if slope is not None:
            w = jnp.where(w > 0, w * jax.lax.rsqrt(jnp.abs(slope).astype(jnp.float32)), w)
        return jnp.where(jnp.isnan(w), jnp.inf, w)  # it is not hidden by a zero

    return tuple(map(distance, params, updates, slopes or (None,) * len(params)))


def _count(layers: Sequence[Layer], masks: Sequence[Arrays]) -> jax.Array:
    """How many weights of the layers the masks mark."""
    marked = (
        jnp.sum(x, dtype=jnp.int32)
        for layer, mask in zip(layers, masks, strict=True)
        for x in layer.of_weights(mask)
    )
    return functools.reduce(jnp.add, marked)


def _kth_largest(layers: Sequence[Layer], scores: Sequence[Arrays], k: jax.Array) -> jax.Array:
    """The k-th largest score of all weights, by its bits: those of floats from 0 on are in order.

    It takes a pass over the weights for each bit, and no memory: a sort would bring all layers into
    one array, and all its shards onto one device.
    """

    def of_bits(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def with_bit(i: jax.Array, bits: jax.Array) -> jax.Array:
        more = bits | (jnp.int32(1) << (30 - i))
        at_least = [tuple(x >= of_bits(more) for x in score) for score in scores]
        return jnp.where(_count(layers, at_least) >= k, more, bits)

    return of_bits(jax.lax.fori_loop(jnp.int32(0), jnp.int32(31), with_bit, jnp.int32(0)))
