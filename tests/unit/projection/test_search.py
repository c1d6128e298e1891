"""The search for the threshold of whatever can be measured."""

import jax.numpy as jnp
import pytest

from l1inf_optax._projection.measure import Measured
from l1inf_optax._projection.search import search
from tests.support.column import COLUMN, EPS, UNKNOWN, an_aim, root


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

    found = search(measure, leaving_c, an_aim(), jnp.float32(start), UNKNOWN)
    assert found.known.done
    assert found.known.outside
    theta = float(found.trial[0]) + float(found.trial[1])
    assert root(1.0) <= theta <= root(1.0) + 16 * EPS
    assert found.passes <= 8


@pytest.mark.parametrize(
    ("c", "on_sphere"), [(3.0, True), (11.6, True), (12.0, True), (13.5, False)]
)
def test_a_column_is_on_its_sphere_if_no_more_than_a_share_is_missing(c, on_sphere):
    """The share is an eighth, the norm 11.5."""
    column = jnp.asarray(COLUMN, jnp.float32)

    def measure(theta, opaque_true):
        del opaque_true
        left = jnp.maximum((column - theta[0]) - theta[1], 0)
        norm, slope = left.sum(), (left > 0).sum().astype(jnp.float32)
        return Measured(norm, norm - c, 4 * EPS * norm, slope)

    def leaving_c():
        return column.max() - c, jnp.float32(0)

    found = search(measure, leaving_c, an_aim(c), jnp.float32(0), UNKNOWN)
    assert bool(found.known.on_sphere) is on_sphere
    assert found.slope == (column > found.trial[0]).sum()
