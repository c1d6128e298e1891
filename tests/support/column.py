"""A column of five numbers, and what the search measures and knows of it."""

import jax.numpy as jnp
import numpy as np

from l1inf_optax._projection.judge import Aim, Known, State, judge
from l1inf_optax._projection.measure import Measured
from l1inf_optax._projection.search import NEWTON_PASSES

EPS = 2.0**-23
COLUMN = np.array([5.0, 3.0, 2.0, 1.0, 0.5])
NO = jnp.asarray(False)
UNKNOWN = Known(NO, NO, NO, NO, NO, NO)


def an_aim(c=1.0, unseen=0.0):
    c = jnp.float32(c)
    return Aim(
        c=c,
        shortfall=3 * EPS * c,
        near=0.125 * c,
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
    zero = jnp.float32(0)
    return State((theta, zero), jnp.float32(left), zero, known.bits, jnp.int32(passes))


def judged(theta, c=1.0, doubt=0.0, state=None, unseen=0.0):
    return judge(measured(theta, c, doubt), state or at(theta), an_aim(c, unseen))


def root(c):
    """The threshold in exact steps: between which two entries does the norm pass c?"""
    order = np.sort(COLUMN)[::-1]
    for k in range(1, len(order) + 1):
        theta = (order[:k].sum() - c) / k
        if k == len(order) or theta >= order[k]:
            return theta
    raise AssertionError
