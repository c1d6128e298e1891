"""The search for the smallest feasible threshold: Newton's method, and when to trust it.

f(theta) = norm(theta) - c is convex, decreasing and piecewise linear. Newton's step from the left
of the root ends left of it, and from the right, too: one step from anywhere leads to where every
further one climbs. Nothing here knows an array's layout, its dtype or its device: a threshold is
measured, the measurement judged, the next threshold chosen.

1. `judge`: is the column known to be outside its ball? Is this threshold the answer?
2. `newtons_gain`: how far Newton's step goes.
3. `exponential_gain`: how far it would be if the tail fell exponentially; half of that is safe.
4. `left_bound`: a threshold sure to be left of the root.

Every pass of Newton's method divides excess times slope by four or more, and their product starts
below n^2 c. So in exact arithmetic log2(n) + 5 passes reach an excess of c / 1000, and with a
metric as many more as its largest ratio has factors of four; real data takes 3 to 8. Rounding has
no such theorem: past `_USUAL_PASSES` the tolerance grows; past `Tolerances.newton_passes` any
feasible threshold will do, and steps double until there is one; after `_PASSES` the search ends,
whatever happens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.floats import Pair, choose, gap, larger, moved
from l1inf_optax._projection.measure import Measured

NEWTON_PASSES = 48
_USUAL_PASSES = 12
_PASSES = 160
_STEEP = 32  # above this many times c the largest entry of a column is worth a look
_FAR = 2.0**-8  # an excess of this share of c is far from the root: rounding plays no part


class Tolerances(NamedTuple):
    """How exact an answer has to be, column by column where it is an array.

    Attributes:
        c: The radius.
        invisible: How far above c a norm may be and still read as c in float64.
        slack: How far below c a result may end: a few units in the last place of its format.
        underflow: What survivors may lose where a 16-bit format runs out of exponents.
        eps: Rounding of the search itself.
        storage_eps: Rounding of the coarsest format that results are stored in.
        is_weighted: Whether survivors shrink at slopes of their own.
        newton_passes: The pass after which any feasible threshold will do.
    """

    c: jax.Array
    invisible: jax.Array
    slack: jax.Array
    underflow: jax.Array
    eps: float
    storage_eps: float
    is_weighted: bool
    newton_passes: int

    @property
    def is_short(self) -> bool:
        """Whether results are stored in a coarser format than the search computes in."""
        return self.storage_eps > self.eps


class Known(NamedTuple):
    """What is known of a column.

    Attributes:
        outside: It is outside its ball.
        doubtful: Its norm is c to rounding: it may be inside after all.
        inside: It is inside.
        done: It has its answer.
        crossed: A threshold was right of the root.
        topped: Its largest entry was read.
    """

    outside: jax.Array
    doubtful: jax.Array
    inside: jax.Array
    done: jax.Array
    crossed: jax.Array
    topped: jax.Array

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
        bits: What is known of the columns, as `Known` packs it.
        passes: How many thresholds were tried.
    """

    trial: Pair
    left: jax.Array
    bits: jax.Array
    passes: jax.Array

    @property
    def known(self) -> Known:
        """What is known of the columns."""
        return Known(*(self.bits & (1 << i) > 0 for i in range(len(Known._fields))))


class Verdict(NamedTuple):
    """What a measurement says of a column and of the threshold tried.

    Attributes:
        feasible: The norm is at most c, whatever rounding hides.
        outside: The column is outside its ball.
        asked: The floor itself was tried, which leaves a column as it is.
        inside: The column is inside its ball.
        near: The norm is so little below c that no better threshold is looked for.
        done: The threshold tried is the answer.
        blur: By how much the norm jumps as the threshold moves by its last bit.
        storage_rounding: How far survivors, rounded to their format, may be from the truth.
    """

    feasible: jax.Array
    outside: jax.Array
    asked: jax.Array
    inside: jax.Array
    near: jax.Array
    done: jax.Array
    blur: jax.Array
    storage_rounding: jax.Array


def judge(
    measured: Measured, state: State, floor: jax.Array, tolerances: Tolerances, largest: float
) -> Verdict:
    """Where the column and the threshold tried are known to be.

    Args:
        measured: The norm at ``state.trial``.
        state: The search so far.
        floor: The least threshold there is.
        tolerances: How exact an answer has to be.
        largest: The largest finite float, the threshold of columns that hold infinities.
    """
    norm, excess, doubt, slope = measured
    passes, trial = state.passes + 1, state.trial
    above, below = excess + doubt, excess - doubt  # the true excess lies between them
    feasible = above <= 0
    late = passes > tolerances.newton_passes

    # Is the column outside its ball? The norm is convex in the threshold with slope -survivors, so
    #   norm(floor) - c >= excess(trial) + survivors * (trial - floor).
    # Every term is taken low: `below` is the least excess that rounding allows, `height` loses
    # 2^-20, and above the floor `storage_rounding` covers survivors that were rounded to their
    # format. At the floor itself entries are added up as they are.
    height = gap(trial, (floor, jnp.zeros_like(floor))) * (1 - 2.0**-20)
    shrunk = norm + slope * height if tolerances.is_weighted else norm
    storage_rounding = 2 * tolerances.storage_eps * shrunk + tolerances.underflow
    storage_rounding = jnp.where(height > 0, storage_rounding, 0)
    least_excess = below - storage_rounding + slope * height
    outside = state.known.outside | (least_excess > tolerances.invisible)
    asked = ~outside & (height <= 0)
    inside = asked & feasible

    # With a metric the threshold's share of each entry rounds, and no step is finer than that. A
    # column that is not done after the usual passes has sums that jump over c and back.
    blur = doubt + tolerances.eps * slope * height if tolerances.is_weighted else doubt
    blur *= jnp.where(passes > _USUAL_PASSES, 2, 0.5 if tolerances.is_weighted else 0)
    near = (above >= -(tolerances.slack + blur)) | late
    if tolerances.is_weighted:
        near |= trial[0] - state.left <= 8 * tolerances.eps * jnp.abs(trial[0])
    only_infinite = (norm == jnp.inf) & (trial[0] == largest)
    done = state.known.done | (feasible & near & outside) | inside | only_infinite
    done |= jnp.isnan(excess)
    return Verdict(feasible, outside, asked, inside, near, done, blur, storage_rounding)


def newtons_gain(
    measured: Measured, verdict: Verdict, passes: jax.Array, tolerances: Tolerances
) -> jax.Array:
    """How far Newton's step goes: excess over slope, aimed a little right of the root.

    Where nothing survives there is no slope, and no step.

    Args:
        measured: The norm at the threshold tried.
        verdict: What it says.
        passes: How many thresholds were tried, this one included.
        tolerances: How exact an answer has to be.
    """
    norm, excess, doubt, slope = measured
    above, below = excess + doubt, excess - doubt
    if tolerances.is_short:
        aim = tolerances.slack / 16
    else:
        aim = jnp.minimum(doubt, 1.5 * tolerances.eps * tolerances.c)
    aim += verdict.blur / 4
    # Entries that tie round alike, so that a step may change nothing: try longer ones.
    patience = 4 if tolerances.is_short else _USUAL_PASSES
    stretch = jnp.exp2(jnp.clip(passes - patience, 0, 3).astype(norm.dtype))
    close = jnp.minimum(
        (above + aim) * jnp.where(verdict.feasible, 1, stretch),
        above + (tolerances.slack + verdict.blur) / 2,
    )
    far = below > _FAR * tolerances.c
    goal = jnp.where(far, below * (1 - 4 * tolerances.eps), close)  # a quotient rounds, too
    return jnp.where(slope > 0, goal, 0) / jnp.where(slope > 0, slope, 1)


def exponential_gain(measured: Measured, c: jax.Array) -> jax.Array:
    """How far away the root is if the tail falls exponentially: log(norm / c) times norm / slope.

    Newton's step falls short of that from the left, and far short of it from the right.
    """
    survives = measured.slope > 0
    norm, slope = (jnp.where(survives, x, 1) for x in (measured.norm, measured.slope))
    return jnp.where(survives, norm / slope * jnp.log(norm / c), 0)


def left_bound(
    measured: Measured, verdict: Verdict, state: State, floor: jax.Array, tolerances: Tolerances
) -> jax.Array:
    """The largest threshold known to be left of the root: Newton's step, every term taken low."""
    _, excess, doubt, slope = measured
    trial = state.trial[0]
    least = jnp.maximum(excess - doubt - verdict.storage_rounding - tolerances.slack, 0)
    left = trial + least / jnp.where(slope > 0, slope, 1)
    left = left - jnp.abs(left) * (4 * tolerances.eps)
    before = jnp.where(trial > state.left, state.left, floor)
    return jnp.where(verdict.feasible | ~(left > before), before, left)


def search(
    measure: Callable[[Pair, jax.Array], Measured],
    leaving_c: Callable[[], Pair],
    tolerances: Tolerances,
    start: jax.Array,
    floor: jax.Array,
    known: Known,
) -> State:
    """The smallest thresholds, but for rounding, whose rounded results are inside the ball.

    Args:
        measure: Measures all columns at their thresholds; its second argument is true, in a way
            that the compiler cannot see.
        leaving_c: Returns the largest thresholds that leave some entry at c.
        tolerances: How exact the thresholds have to be.
        start: Where the search starts, column by column.
        floor: The least threshold there is, which leaves a column as it is.
        known: What is known of the columns.

    Returns:
        The last state. Columns in doubt have the threshold they have if they are outside.
    """
    zero = jnp.zeros_like(floor)
    largest = float(jnp.finfo(floor.dtype).max)

    def unfinished(state: State) -> jax.Array:
        return jnp.any(~state.known.done) & (state.passes < _PASSES)

    def step(state: State) -> State:
        passes = state.passes + 1
        measured = measure(state.trial, state.passes < _PASSES)
        verdict = judge(measured, state, floor, tolerances, largest)
        gain = newtons_gain(measured, verdict, passes, tolerances)
        # In the end steps double, until one is sure to be long enough.
        doubling = jnp.exp2(jnp.maximum(passes - tolerances.newton_passes, 0).astype(gain.dtype))
        newton = moved(state.trial, jnp.where(measured.norm < jnp.inf, gain, 0) * doubling)
        newton = choose(measured.slope > 0, newton, (floor, zero))

        is_far = (jnp.abs(measured.excess) > tolerances.c / 4) & ~state.known.crossed
        halfway = moved(state.trial, (gain + exponential_gain(measured, tolerances.c)) / 2)
        following = choose(is_far & (measured.slope > 0), larger(halfway, newton), newton)

        # Where most of the norm must go the largest entry says more: the threshold is less than c
        # below it. Reading the entries for it costs less than the passes it saves.
        steep = (measured.norm > _STEEP * tolerances.c) & ~verdict.done & ~state.known.topped
        at_least = lax.cond(jnp.any(steep), leaving_c, lambda: (floor, zero))
        following = choose(steep, larger(newton, at_least), following)

        left = left_bound(measured, verdict, state, floor, tolerances)
        following = larger(following, (left, zero))
        # Ask the floor itself before shrinking a column that may be inside.
        near_the_floor = verdict.near | ~(gap(newton, (floor, zero)) > 0)
        late = passes > tolerances.newton_passes
        ask = ~verdict.outside & ~verdict.asked & (verdict.feasible & near_the_floor | late)
        following = choose(ask, (floor, zero), following)
        following = choose(passes == _PASSES, (jnp.full_like(zero, largest), zero), following)
        undefined = jnp.isnan(measured.excess)
        following = choose(undefined, (measured.excess, measured.excess), following)
        following = choose(verdict.done & ~undefined, state.trial, following)
        known = Known(
            outside=state.known.outside | verdict.outside | verdict.asked,
            doubtful=state.known.doubtful | (verdict.asked & ~verdict.inside),
            inside=state.known.inside | verdict.inside,
            done=state.known.done | verdict.done,
            crossed=state.known.crossed | verdict.feasible,
            topped=state.known.topped | steep,
        )
        return State(following, left, known.bits, passes)

    start = jnp.where((start > floor) & (start < jnp.inf), start, floor)
    state = State((start, zero), floor, known.bits, jnp.int32(0))
    return lax.while_loop(unfinished, step, state)
