"""Zeros by a count: the smallest weights become zero while a network trains, and stay zero.

A ball that shrinks chooses zeros and shrinks what is left. In small balls that cripples a deep
network while its zeros are chosen, and so they are badly chosen. Here nothing is shrunk: the next
weights to become zero are those that are nearest to it, in the metric the optimizer steps in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from l1inf_optax._projection.arguments import (
    Arrays,
    brief,
    check_count,
    check_radius,
    check_share,
    is_traced,
)
from l1inf_optax._schedules import Shrink

if TYPE_CHECKING:
    from l1inf_optax._layers import Layer

Operands = tuple[Arrays, Arrays]  # parameters and their updates

_MOST_WEIGHTS = 2**31 - 1  # int32, which counts them
_ABOVE_ALL = float(np.finfo(np.float32).max)
_ROUNDS = 100  # that the zeros come in, at most: a round ranks all weights


@dataclasses.dataclass(frozen=True, eq=False)
class Prune:
    """A radius, and how many zeros there are to be, as :func:`prune` describes them."""

    zeros: float | jax.Array
    over: int | jax.Array
    start: int | jax.Array
    c: Any

    @property
    def is_free(self) -> bool:
        """Whether there is no ball around it."""
        return isinstance(self.c, int | float) and math.isinf(self.c)

    def due(self, step: jax.Array, zeros: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """How many zeros this update is to reach, and whether it has to choose new ones.

        Args:
            step: How many updates there were before.
            zeros: How many zeros there are.
            size: How many weights there are.
        """
        share = jnp.clip((step + 1 - self.start) / self.over, 0, 1)
        # As an integer, exactly: float32 would round the count of a large network. A product that
        # is above a whole number by its own rounding alone counts as that number.
        exact = self.zeros * size
        in_the_end = (
            jnp.ceil(exact * (1 - 1e-6)).astype(jnp.int32)
            if is_traced(exact)
            else jnp.asarray(math.ceil(float(exact) * (1 - 1e-12)), jnp.int32)
        )
        so_far = jnp.floor(in_the_end * (1 - (1 - share) ** 3)).astype(jnp.int32)
        wanted = jnp.where(share < 1, jnp.minimum(so_far, in_the_end), in_the_end)
        missing = wanted - zeros
        is_a_round = (missing >= in_the_end / _ROUNDS) | (share == 1)
        return wanted, (missing > 0) & is_a_round


def prune(
    zeros: float | jax.Array,
    over: int | jax.Array,
    *,
    start: int | jax.Array = 0,
    c: Any = math.inf,
) -> Prune:
    r"""Makes the weights nearest to zero zero, more and more of them; then these stay zero.

    Use it wherever ``c`` is a number, as in
    ``constrain(optimizer, {"hidden_*": prune(0.95, over=2000)})``. It suits trained networks and
    those with several hidden layers, which a ball that shrinks (:func:`shrink`) would cripple while
    it chooses zeros: nothing but the zeros is changed.

    Which weights: those whose loss moves the parameters least, in the metric the optimizer steps
    in. With Adam's :math:`d = \sqrt{\hat\nu} + \epsilon` these are the ones with the smallest
    :math:`d_i w_i^2`, so that what is left is the nearest point to w, in that metric, with so many
    zeros. All layers that share one ``prune`` are ranked together, and each keeps one weight at
    least: in Adam's metric those that need their weights more keep more of them. In the Euclidean
    metric, of SGD and of :func:`keep_params_in_l1inf_ball`, it is pruning by magnitude, and a layer
    whose weights are small loses most of them; give each layer a ``prune`` of its own there.

    The share of zeros rises as a cubic, fast at first and slowly in the end, in at most a hundred
    rounds. Between them the network recovers. Biases are left alone.

    Args:
        zeros: The share of the weights of these layers, together, that are to be zero in the end.
            Between 0 and 1; may be traced.
        over: Number of updates in which it rises: a half to three quarters of all of them. The
            learning rate should fall to zero in the others.
        start: Number of updates before it rises. From then on zeros stay, also those that there
            were: a mask of any origin is kept. Only a layer that is all zero may start.
        c: Radius of the ball around it: a number or an optax schedule; none by default.

    Returns:
        What to give for ``c``. It needs no state.

    Raises:
        ValueError: ``zeros`` is not between 0 and 1, ``over`` no positive whole number, ``start``
            no whole number or negative, ``c`` no radius; and, from ``update``, more than 2^31
            weights are to be ranked together.

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
    if isinstance(c, Shrink | Prune):
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
        updates = _with_zeros(own, chosen, held, [slopes[i] for i in members], step)
        for i, (params, _), own_updates in zip(members, held, updates, strict=True):
            result[i] = params, own_updates
    return result


def _held(layer: Layer, operands: Operands, is_on: jax.Array) -> Operands:
    """The operands, zeros of the parameters unmoved.

    A matrix that is all zero has yet to start: pruning leaves at least one weight to each.
    """
    zeros = layer.zero_weights(operands[0])
    stays = layer.for_entries(is_on & (layer.share_of_zeros(zeros) < 1))
    return unmoved(operands, tuple(zero & stays for zero in zeros))


def unmoved(operands: Operands, where: Arrays) -> Operands:
    """The operands, updates zero at some entries."""
    params, updates = operands
    stays = zip(where, updates, strict=True)
    return params, tuple(jnp.where(stay, 0, u) for stay, u in stays)


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


def _with_zeros(
    own: Prune,
    layers: Sequence[Layer],
    operands: Sequence[Operands],
    slopes: Sequence[Arrays | None],
    step: jax.Array,
) -> list[Arrays]:
    """The updates of the layers, those of weights that become zero in this one leading there."""
    size = sum(
        layer.weights_of_a_unit(params[-len(layer.kernels) :]) * math.prod(layer.columns_shape)
        for layer, (params, _) in zip(layers, operands, strict=True)
    )
    if size > _MOST_WEIGHTS:
        raise ValueError(
            f"zeros={brief(own.zeros)} is asked of {size:,} weights together, more than can be "
            "counted: give groups of layers a prune(...) of their own"
        )
    zeros = _count(layers, [tuple(p == 0 for p in params) for params, _ in operands])
    wanted, is_due = own.due(step, zeros, size)
    matrices = sum(math.prod(layer.matrices_shape) for layer in layers)
    stay = size - jnp.minimum(wanted, size - matrices)
    # In the dtypes that can lead to zero, whatever that of the updates.
    updates = [
        tuple(u.astype(jnp.result_type(p, u)) for p, u in zip(*both, strict=True))
        for both in operands
    ]

    def in_a_round() -> list[Arrays]:
        distances = [_distances(*x, y) for x, y in zip(operands, slopes, strict=True)]
        falls = _falling(layers, distances, stay)
        return [
            tuple(
                jnp.where(fall, -p.astype(u.dtype), u)
                for fall, p, u in zip(marked, params, steps, strict=True)
            )
            for marked, (params, _), steps in zip(falls, operands, updates, strict=True)
        ]

    return jax.lax.cond(is_due, in_a_round, lambda: updates)


def _falling(layers: Sequence[Layer], distances: Sequence[Arrays], stay: jax.Array) -> list[Arrays]:
    """All but so many weights, those that are farthest from zero; none where that is not known."""
    numbers = _shuffled(distances)
    scores = [_with_one_left(*x) for x in zip(layers, distances, numbers, strict=True)]

    def at_least(score: jax.Array) -> jax.Array:
        return _count(layers, [tuple(x >= score for x in parts) for parts in scores])

    least = _as_float(_largest_bits(31, lambda bits: at_least(_as_float(bits)) >= stay))
    # Of those that are as far as the last that stays, those with the largest numbers stay.
    ties = [tuple(x == least for x in parts) for parts in scores]
    of_ties = stay - (at_least(least) - _count(layers, ties))
    number = _largest_bits(32, lambda bits: _count(layers, _both(ties, numbers, bits)) >= of_ties)
    is_known = least < jnp.inf
    return [
        layer.of_weights(
            tuple(
                is_known & ((x < least) | ((x == least) & (n < number)))
                for x, n in zip(parts, own_numbers, strict=True)
            )
        )
        for layer, parts, own_numbers in zip(layers, scores, numbers, strict=True)
    ]


def _with_one_left(layer: Layer, distances: Arrays, numbers: Arrays) -> Arrays:
    """The same, but that a largest one of each matrix is above all that are known: it stays."""

    def largest(parts: Arrays) -> jax.Array:
        weights = layer.of_weights(tuple(jnp.ones_like(x, bool) for x in parts))
        tops = (
            jnp.max(jnp.where(weight, x, 0), layer.reduction_axes)
            for weight, x in zip(weights, parts, strict=True)
        )
        top = layer.of_each_matrix(jnp.max, functools.reduce(jnp.maximum, tops))
        return layer.for_entries(top)

    top = largest(distances)
    ties = [(x == top) & (x > 0) for x in distances]
    first = largest(tuple(jnp.where(tie, n, 0) for tie, n in zip(ties, numbers, strict=True)))
    return tuple(
        jnp.where(tie & (n == first), _ABOVE_ALL, x)
        for tie, n, x in zip(ties, numbers, distances, strict=True)
    )


def _both(ties: Sequence[Arrays], numbers: Sequence[Arrays], least: jax.Array) -> list[Arrays]:
    return [
        tuple(tie & (n >= least) for tie, n in zip(*both, strict=True))
        for both in zip(ties, numbers, strict=True)
    ]


def _shuffled(scores: Sequence[Arrays]) -> list[Arrays]:
    """A number for each entry, uint32, no two alike and in no order: the factor is odd."""
    offset, result = 0, []
    for parts in scores:
        own = []
        for x in parts:
            place, stride = jnp.full(x.shape, offset, jnp.uint32), 1
            for axis in reversed(range(x.ndim)):
                place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
                stride *= x.shape[axis]
            own.append(place * np.uint32(2_654_435_769))
            offset += x.size
        result.append(tuple(own))
    return result


def _count(layers: Sequence[Layer], masks: Sequence[Arrays]) -> jax.Array:
    """How many weights of the layers the masks mark."""
    marked = (
        jnp.sum(x, dtype=jnp.int32)
        for layer, mask in zip(layers, masks, strict=True)
        for x in layer.of_weights(mask)
    )
    return functools.reduce(jnp.add, marked)


def _as_float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _largest_bits(length: int, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest number of so many bits for which something holds that holds for smaller ones.

    It asks once for each bit. Floats from 0 on are in the order of their bits, so that a k-th
    largest takes a pass over the weights for each, and no memory: a sort would bring all layers
    into one array, and all its shards onto one device.
    """

    def with_bit(i: jax.Array, bits: jax.Array) -> jax.Array:
        more = bits | (jnp.uint32(1 << (length - 1)) >> i.astype(jnp.uint32))
        return jnp.where(holds(more), more, bits)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(length), with_bit, jnp.uint32(0))
