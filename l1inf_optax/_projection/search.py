"""The search for the smallest feasible threshold: Newton's method, and when to trust it.

f(theta) = norm(theta) - c is convex, decreasing and piecewise linear. Newton's step from the left
of the root ends left of it, and from the right, too: one step from anywhere leads to where every
further one climbs. Nothing here knows an array's layout, its dtype or its device: a threshold is
measured, the measurement judged, the next threshold chosen.

Every pass of Newton's method divides excess times slope by four or more, and their product starts
below n^2 c. So in exact arithmetic log2(n) + 5 passes reach an excess of c / 1000, and with a
metric as many more as its largest ratio has factors of four; real data takes 3 to 8. Rounding has
no such theorem: past `USUAL_PASSES` the tolerance grows; past `Aim.newton_passes` any
feasible threshold will do, and steps double until there is one; after `_PASSES` the search ends,
whatever happens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.floats import Pair, choose, larger, moved
from l1inf_optax._projection.judge import (
    Aim,
    Known,
    State,
    Verdict,
    exponential_gain,
    judge,
    left_bound,
    newtons_gain,
)
from l1inf_optax._projection.measure import Measured

NEWTON_PASSES = 48
_PASSES = 160
_STEEP = 32  # above this many times c the largest entry of a column is worth a look


def newtons_thresholds(
    measured: Measured, verdict: Verdict, state: State, aim: Aim
) -> tuple[Pair, Pair]:
    """Newton's next threshold, and where the root is far one half way to an exponential tail's.

    Where nothing survives both are 0.
    """
    passes, zero = state.passes + 1, jnp.zeros_like(aim.c)
    gain = newtons_gain(measured, verdict, passes, aim)
    # In the end steps double, until one is sure to be long enough.
    doubling = jnp.exp2(jnp.maximum(passes - aim.newton_passes, 0).astype(gain.dtype))
    newton = moved(state.trial, jnp.where(measured.norm < jnp.inf, gain, 0) * doubling)
    newton = choose(measured.slope > 0, newton, (zero, zero))
    is_far = (jnp.abs(measured.excess) > aim.c / 4) & ~state.known.crossed
    halfway = moved(state.trial, (gain + exponential_gain(measured, aim.c)) / 2)
    return newton, choose(is_far & (measured.slope > 0), larger(halfway, newton), newton)


def answered(
    following: Pair, only_infinite: jax.Array, measured: Measured, verdict: Verdict, state: State
) -> Pair:
    """The threshold that follows, but the answer where there is one, as `search` returns it."""
    largest = jnp.full_like(measured.norm, jnp.finfo(measured.norm.dtype).max)
    last = state.passes + 1 == _PASSES
    following = choose(last, (largest, jnp.ones_like(largest)), following)
    undefined = jnp.isnan(measured.excess)
    following = choose(undefined, (measured.excess, measured.excess), following)
    following = choose(verdict.done & ~undefined, state.trial, following)
    return choose(only_infinite, (largest, measured.slope), following)


def search(
    measure: Callable[[Pair, jax.Array], Measured],
    leaving_c: Callable[[], Pair],
    aim: Aim,
    start: jax.Array,
    known: Known,
) -> State:
    """The smallest thresholds, but for rounding, whose results are inside the ball.

    Args:
        measure: Measures all columns at their thresholds; its second argument is true, in a way
            that the compiler cannot see.
        leaving_c: Returns the largest thresholds that leave some entry at c.
        aim: What the thresholds have to meet.
        start: Where the search starts, column by column.
        known: What is known of the columns.

    Returns:
        The last state. Where none but infinite entries survive, the threshold is the largest float
        and, as the second of the pair, their number.
    """
    zero = jnp.zeros_like(aim.c)
    largest = float(jnp.finfo(zero.dtype).max)

    def unfinished(state: State) -> jax.Array:
        return jnp.any(~state.known.done) & (state.passes < _PASSES)

    def step(state: State) -> State:
        measured = measure(state.trial, state.passes < _PASSES)
        verdict = judge(measured, state, aim)
        newton, following = newtons_thresholds(measured, verdict, state, aim)
        # Where most of the norm must go the largest entry says more: the threshold is less than c
        # below it. Reading the entries for it costs less than the passes it saves.
        steep = (measured.norm > _STEEP * aim.c) & ~verdict.done & ~state.known.topped
        at_least = lax.cond(jnp.any(steep), leaving_c, lambda: (zero, zero))
        following = choose(steep, larger(newton, at_least), following)

        left = left_bound(measured, verdict, state, aim)
        following = larger(following, (left, zero))
        # Ask 0 itself before shrinking a column that may be inside.
        late = state.passes + 1 > aim.newton_passes
        would_shrink = verdict.feasible & (verdict.near | ~(newton[0] + newton[1] > 0)) | late
        following = choose(~verdict.outside & would_shrink, (zero, zero), following)
        only_infinite = (measured.norm == jnp.inf) & (state.trial[0] == largest)
        following = answered(following, only_infinite, measured, verdict, state)
        known = Known(
            outside=state.known.outside | verdict.outside,
            inside=state.known.inside | verdict.inside,
            done=state.known.done | verdict.done | only_infinite,
            on_sphere=state.known.on_sphere | (measured.excess >= -aim.near),
            crossed=state.known.crossed | verdict.feasible,
            topped=state.known.topped | steep,
        )
        slope = jnp.where(state.known.done, state.slope, measured.slope)
        return State(following, left, slope, known.bits, state.passes + 1)

    start = jnp.where((start > 0) & (start < jnp.inf), start, 0)
    state = State((start, zero), zero, zero, known.bits, jnp.int32(0))
    return lax.while_loop(unfinished, step, state)
