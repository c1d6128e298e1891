"""What one measurement says, on numbers: no array is laid out, nothing compiled."""

import jax.numpy as jnp
import numpy as np
import pytest

from l1inf_optax._projection.judge import (
    exponential_gain,
    judge,
    left_bound,
    newtons_gain,
)
from l1inf_optax._projection.measure import Measured
from l1inf_optax._projection.search import NEWTON_PASSES
from tests.support.column import EPS, UNKNOWN, an_aim, at, judged, measured, root


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
    assert judge(broken, at(0.0), an_aim()).done


@pytest.mark.parametrize("theta", [0.0, 0.7, 1.5, 2.5, 4.9])
@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
def test_newtons_step_lands_left_of_the_root_from_either_side(theta, c):
    gain = newtons_gain(measured(theta, c), judged(theta, c), jnp.int32(1), an_aim(c))
    assert theta + float(gain) <= root(c) + 4 * EPS * max(c, 5)
    if theta < root(c):
        assert gain > 0


def test_where_nothing_survives_there_is_no_step():
    gain = newtons_gain(measured(6.0), judged(6.0), jnp.int32(1), an_aim())
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
    left = left_bound(m, verdict, at(theta), an_aim())
    assert 0 <= left <= root(1.0)
