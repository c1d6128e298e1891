"""How networks start, what steps them, and how their radius and step size move.

The paper prints no recipe. In this one every unit of the simulated experiments starts on the
boundary of its ball with a share of it in a positive bias, so that it is alive, and as good as
linear for a while. The ball starts wider than asked and shrinks to c: columns stay on its boundary,
and it chooses the zeros. The networks for images start scaled down onto the boundary instead.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from l1inf_optax._lanes import Params

# What `--optimizer` may name: a function of the step size, itself a number or an Optax schedule.
OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam": optax.adam,
}


def start_on_boundary(
    params: Params, radius: ArrayLike, bias_share: ArrayLike, readout: ArrayLike
) -> Params:
    """Columns on the boundary of their ball, with a positive bias; a scaled readout.

    Args:
        params: freshly initialised parameters. Every ``augmented_kernel`` is ``(d_in + 1, d_out)``;
            the ``kernel`` is the readout's.
        radius: of the ball; ``inf`` leaves the columns as they are.
        bias_share: what the bias takes of the radius. Weights keep their ratios and get the rest.
        readout: factor of the readout's kernel.

    Returns:
        The parameters, with column norms of ``radius``, to rounding.
    """
    inside = jnp.isfinite(radius)
    budget = jnp.where(inside, radius, 1.0)

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            return leaf * readout
        if name != "augmented_kernel":
            return leaf
        bias = jnp.full_like(leaf[:1], bias_share * budget)
        weights = leaf[1:] * ((1 - bias_share) * budget / jnp.abs(leaf[1:]).sum(axis=0))
        return jnp.where(inside, jnp.concatenate([bias, weights]), leaf)

    return jax.tree_util.tree_map_with_path(start, params)


def shrink_into_ball(params: Params, c: jax.Array) -> Params:
    """Scale down each column of every ``augmented_kernel`` that is too long for the ball.

    A start on the boundary with all weights alive. A projection, in contrast, would zero most
    weights of a random start before any datum has been seen.

    Args:
        params: freshly initialised parameters; an ``augmented_kernel`` is ``(d_in + 1, d_out)``.
        c: the radius; ``inf`` scales nothing.

    Returns:
        The parameters, with column norms of at most c, to rounding.
    """

    def shrink(path: tuple, leaf: jax.Array) -> jax.Array:
        if getattr(path[-1], "key", None) != "augmented_kernel":
            return leaf
        return leaf * jnp.minimum(1.0, c / jnp.abs(leaf).sum(axis=0))

    return jax.tree_util.tree_map_with_path(shrink, params)


def falling_radius(c: ArrayLike, first: float, steps: int) -> optax.Schedule:
    """A radius that falls geometrically from ``first * c`` to c over ``steps`` steps."""
    return optax.exponential_decay(first * c, steps, 1 / first, end_value=c)


def warm_up_and_decay(rate: ArrayLike, rise: float, steps: int) -> optax.Schedule:
    """A step size that rises from 0 to ``rate`` over a share of the steps, then falls as a cosine.

    Args:
        rate: the highest step size.
        rise: the share of ``steps`` that it rises over.
        steps: after so many it is 0 again.
    """
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, round(rise * steps), steps)
    return lambda step: rate * shape(step)
