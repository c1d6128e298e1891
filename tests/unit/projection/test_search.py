"""The stages of the search, one by one, on numbers: no array is laid out, nothing compiled."""

import jax.numpy as jnp
import numpy as np
import pytest

from l1inf_optax._projection.judge import (
    Known,
    State,
    Tolerances,
    exponential_gain,
    judge,
    left_bound,
    newtons_gain,
)
from l1inf_optax._projection.measure import Measured
from l1inf_optax._projection.search import NEWTON_PASSES, search

EPS = 2.0**-23
COLUMN = np.array([5.0, 3.0, 2.0, 1.0, 0.5])
NO = jnp.asarray(False)
UNKNOWN = Known(NO, NO, NO, NO, NO)


def tolerances(c=1.0, unseen=0.0):
    c = jnp.float32(c)
    return Tolerances(
        c=c,
        slack=3 * EPS * c,
        unseen=jnp.float32(unseen),
        eps=EPS,
        is_weighted=False,
        newton_passes=NEWTON_PASSES,
    )


def measured(theta, c=1.0, doubt=0.0):
    left = COLUMN[theta < COLUMN] - theta
    norm, slope = left.sum(), len(left)
    return Measured(*map(jnp.float32, (norm, norm - c, doubt, slope)))


def at(theta, known=UNKNOWN, left=0.0, passes=0):
    theta = jnp.float32(theta)
    return State((theta, jnp.float32(0)), jnp.float32(left), known.bits, jnp.int32(passes))


def judged(theta, c=1.0, doubt=0.0, state=None, unseen=0.0):
    return judge(measured(theta, c, doubt), state or at(theta), tolerances(c, unseen))


def root(c):
    """The threshold in exact steps: between which two entries does the norm pass c?"""
    order = np.sort(COLUMN)[::-1]
    for k in range(1, len(order) + 1):
        theta = (order[:k].sum() - c) / k
        if k == len(order) or theta >= order[k]:
            return theta
    raise AssertionError


@pytest.mark.parametrize(("c", "outside"), [(11.5, False), (11.4, True), (1.0, True)])
def test_a_column_is_outside_if_its_norm_is_above_c(c, outside):
    verdict = judged(0.0, c)
    assert bool(verdict.outside) is outside
    assert bool(verdict.inside) is not outside
    assert bool(verdict.done) is not outside


def test_a_column_within_rounding_of_its_sphere_counts_as_outside():
    assert judged(0.0, c=11.5001, doubt=0.001).outside
    assert judged(0.0, c=11.5001).inside


def test_a_column_that_may_hold_more_than_is_seen_is_left_without_it():
    verdict = judged(0.0, c=12.0, unseen=1.0)
    assert verdict.outside  # so what cannot be read is set to zero
    assert verdict.done  # and nothing else is taken off
    assert judged(0.0, c=12.0, unseen=0.1).inside


def test_a_column_can_be_known_to_be_outside_from_any_threshold():
    # norm(0) - c >= excess(theta) + survivors theta: 3.5 - 3 + 2 * 2.25 at 2.25, say
    assert judged(2.25, c=3.0).outside


def test_what_rounding_may_hide_decides_nothing():
    assert judged(0.25, c=11.4999).outside
    assert not judged(0.25, c=11.4999, doubt=0.001).outside


def test_a_feasible_threshold_is_the_answer_only_near_c():
    known = UNKNOWN._replace(outside=jnp.asarray(True))
    near, far = root(3.0), root(3.0) + 0.1
    assert judged(near, 3.0, state=at(near, known)).done
    verdict = judged(far, 3.0, state=at(far, known))
    assert verdict.feasible
    assert not verdict.done
    assert judged(far, 3.0, state=at(far, known, passes=NEWTON_PASSES)).done  # late: any will do


def test_a_column_that_is_not_a_number_is_done():
    broken = Measured(*map(jnp.float32, (np.nan, np.nan, 0, 1)))
    assert judge(broken, at(0.0), tolerances()).done


@pytest.mark.parametrize("theta", [0.0, 0.7, 1.5, 2.5, 4.9])
@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
def test_newtons_step_lands_left_of_the_root_from_either_side(theta, c):
    gain = newtons_gain(measured(theta, c), judged(theta, c), jnp.int32(1), tolerances(c))
    assert theta + float(gain) <= root(c) + 4 * EPS * max(c, 5)
    if theta < root(c):
        assert gain > 0


def test_where_nothing_survives_there_is_no_step():
    gain = newtons_gain(measured(6.0), judged(6.0), jnp.int32(1), tolerances())
    assert gain == 0
    assert exponential_gain(measured(6.0), jnp.float32(1)) == 0


def test_an_exponential_tail_is_crossed_in_one_step():
    # norm(theta) = c e^2 falls by e^-theta: the root is 2 away, and Newton's step less.
    m = Measured(*map(jnp.float32, (np.e**2, np.e**2 - 1, 0, np.e**2)))
    assert float(exponential_gain(m, jnp.float32(1))) == pytest.approx(2)
    assert float(m.excess / m.slope) < 2


@pytest.mark.parametrize("theta", [0.0, 0.7, 1.5, 2.5, 4.0, 4.9, 6.0])
def test_the_left_bound_is_left_of_the_root(theta):
    m, verdict = measured(theta, doubt=1e-4), judged(theta, doubt=1e-4)
    left = left_bound(m, verdict, at(theta), tolerances())
    assert 0 <= left <= root(1.0)


@pytest.mark.parametrize("start", [0.0, 3.9, 4.2, 100.0])
def test_the_search_finds_the_root_of_whatever_can_be_measured(start):
    """A norm that is no sum over an array: the search knows its value and its slope."""
    column = jnp.asarray(COLUMN, jnp.float32)

    def measure(theta, opaque_true):
        del opaque_true
        left = jnp.maximum((column - theta[0]) - theta[1], 0)
        norm, slope = left.sum(), (left > 0).sum().astype(jnp.float32)
        return Measured(norm, norm - 1, 4 * EPS * norm, slope)

    def leaving_c():
        return column.max() - 1, jnp.float32(0)

    found = search(measure, leaving_c, tolerances(), jnp.float32(start), UNKNOWN)
    assert found.known.done
    assert found.known.outside
    theta = float(found.trial[0]) + float(found.trial[1])
    assert root(1.0) <= theta <= root(1.0) + 16 * EPS
    assert found.passes <= 8
