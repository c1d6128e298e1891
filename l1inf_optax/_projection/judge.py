"""What one measurement says of a column, and where it leads: pure functions of a few numbers.

1. `judge`: is the column known to be outside its ball? Is this threshold the answer?
2. `newtons_gain`: how far Newton's step goes.
3. `exponential_gain`: how far it would be if the tail fell exponentially; half of that is safe.
4. `left_bound`: a threshold sure to be left of the root.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from l1inf_optax._projection.floats import Pair
from l1inf_optax._projection.measure import Measured

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

USUAL_PASSES = 12
_FAR = 2.0**-8  # an excess of this share of c is far from the root: rounding plays no part


class Aim(NamedTuple):
    """What an answer has to meet, column by column where it is an array.

    Attributes:
        c: The radius.
        shortfall: How far below c a result may end: a few units in the last place.
        near: How far below c a column that is inside still counts as on its sphere.
        unseen: What subnormal entries, which processors read as 0, may add to a norm.
        eps: Rounding of the search itself.
        is_weighted: Whether survivors shrink at slopes of their own.
        newton_passes: The pass after which any feasible threshold will do.
    """

    c: Float[Array, "*columns"]
    shortfall: Float[Array, "*columns"]
    near: Float[Array, "*columns"]
    unseen: Float[Array, "*columns"]
    eps: float
    is_weighted: bool
    newton_passes: int


class Known(NamedTuple):
    """What is known of a column. Where it is neither outside nor inside, 0 has to be asked.

    Attributes:
        outside: It counts as outside its ball.
        inside: It counts as inside: it is left as it is.
        done: It has its answer.
        on_sphere: Its norm is at least c, or little less.
        crossed: A threshold was right of the root.
        topped: Its largest entry was read.
    """

    outside: Bool[Array, "*columns"]
    inside: Bool[Array, "*columns"]
    done: Bool[Array, "*columns"]
    on_sphere: Bool[Array, "*columns"]
    crossed: Bool[Array, "*columns"]
    topped: Bool[Array, "*columns"]

    @property
    def bits(self) -> jax.Array:
        """All of it in one integer: a loop writes every array of its state by a kernel of its own.

        So it costs a kernel, not six.
        """
        bits = (jnp.where(fact, 1 << i, 0) for i, fact in enumerate(self))
        return functools.reduce(jnp.bitwise_or, bits)


class State(NamedTuple):
    """State of the search.

    Attributes:
        trial: The threshold to try next; where done, the answer.
        left: The largest known to be left of the root, but for rounding.
        slope: How fast the norm falls as the last threshold rises.
        bits: What is known of the columns, as `Known` packs it.
        passes: How many thresholds were tried.
    """

    trial: Pair
    left: Float[Array, "*columns"]
    slope: Float[Array, "*columns"]
    bits: Int[Array, "*columns"]
    passes: Int[Array, ""]

    @property
    def known(self) -> Known:
        """What is known of the columns."""
        return Known(*(self.bits & (1 << i) > 0 for i in range(len(Known._fields))))


class Verdict(NamedTuple):
    """What a measurement says of a column and of the threshold tried.

    Attributes:
        feasible: The norm is at most c, whatever rounding hides.
        outside: The column counts as outside its ball.
        inside: The column is inside its ball.
        near: No better threshold is looked for: the norm is hardly below c, the threshold is 0, or
            it is late.
        done: The threshold tried is the answer.
        blur: By how much the norm jumps as the threshold moves by its last bit.
    """

    feasible: Bool[Array, "*columns"]
    outside: Bool[Array, "*columns"]
    inside: Bool[Array, "*columns"]
    near: Bool[Array, "*columns"]
    done: Bool[Array, "*columns"]
    blur: Float[Array, "*columns"]


def judge(measured: Measured, state: State, aim: Aim) -> Verdict:
    """Where the column and the threshold tried are known to be.

    Args:
        measured: The norm at ``state.trial``.
        state: The search so far.
        aim: What the answer has to meet.
    """
    _, excess, doubt, slope = measured
    passes, trial = state.passes + 1, state.trial
    feasible = measured.most_excess <= 0
    late = passes > aim.newton_passes

    # Is the column outside its ball? The norm is convex in the threshold with slope -survivors, so
    #   norm(0) - c >= excess(trial) + survivors * trial.
    # Both terms are taken low: the excess is the least that rounding allows, `height` loses 2^-20.
    # At 0 itself a column that is not surely inside counts as outside.
    height = (trial[0] + trial[1]) * (1 - 2.0**-20)
    at_zero = height <= 0
    inside = at_zero & (measured.most_excess + aim.unseen <= 0) & ~state.known.outside
    surely_outside = measured.least_excess + slope * height > 0
    outside = state.known.outside | jnp.where(at_zero, ~inside, surely_outside)

    # With a metric the threshold's share of each entry rounds, and no step is finer than that. A
    # column that is not done after the usual passes has sums that jump over c and back.
    blur = doubt + aim.eps * slope * height if aim.is_weighted else doubt
    blur *= jnp.where(passes > USUAL_PASSES, 2, 0.5 if aim.is_weighted else 0)
    near = (measured.most_excess >= -(aim.shortfall + blur)) | at_zero | late
    if aim.is_weighted:
        near |= trial[0] - state.left <= 8 * aim.eps * jnp.abs(trial[0])
    done = state.known.done | (feasible & near & outside) | inside | jnp.isnan(excess)
    return Verdict(feasible, outside, inside, near, done, blur)


def newtons_gain(measured: Measured, verdict: Verdict, passes: jax.Array, aim: Aim) -> jax.Array:
    """How far Newton's step goes: excess over slope, aimed a little right of the root.

    Where nothing survives there is no slope, and no step.

    Args:
        measured: The norm at the threshold tried.
        verdict: What it says.
        passes: How many thresholds were tried, this one included.
        aim: What the answer has to meet.
    """
    most, least, slope = measured.most_excess, measured.least_excess, measured.slope
    beyond = jnp.minimum(measured.doubt, 1.5 * aim.eps * aim.c) + verdict.blur / 4
    # Entries that tie round alike, so that a step may change nothing: try longer ones.
    stretch = jnp.exp2(jnp.clip(passes - USUAL_PASSES, 0, 3).astype(most.dtype))
    close = jnp.minimum(
        (most + beyond) * jnp.where(verdict.feasible, 1, stretch),
        most + (aim.shortfall + verdict.blur) / 2,
    )
    far = least > _FAR * aim.c
    goal = jnp.where(far, least * (1 - 4 * aim.eps), close)  # a quotient rounds, too
    return jnp.where(slope > 0, goal, 0) / jnp.where(slope > 0, slope, 1)


def exponential_gain(measured: Measured, c: jax.Array) -> jax.Array:
    """How far away the root is if the tail falls exponentially: log(norm / c) times norm / slope.

    Newton's step falls short of that from the left, and far short of it from the right.
    """
    survives = measured.slope > 0
    norm, slope = (jnp.where(survives, x, 1) for x in (measured.norm, measured.slope))
    return jnp.where(survives, norm / slope * jnp.log(norm / c), 0)


def left_bound(measured: Measured, verdict: Verdict, state: State, aim: Aim) -> jax.Array:
    """The largest threshold known to be left of the root: Newton's step, every term taken low."""
    trial, slope = state.trial[0], measured.slope
    least = jnp.maximum(measured.least_excess - aim.shortfall, 0)
    left = trial + least / jnp.where(slope > 0, slope, 1)
    left = left - jnp.abs(left) * (4 * aim.eps)
    before = jnp.where(trial > state.left, state.left, 0)
    return jnp.where(verdict.feasible | ~(left > before), before, left)
