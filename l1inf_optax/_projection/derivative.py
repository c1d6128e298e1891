"""The derivative of the projection: the optimality conditions, differentiated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l1inf_optax._projection.arguments import Arrays, Axes
from l1inf_optax._projection.batch import Kind, Problem, solve
from l1inf_optax._projection.floats import wide_dtype
from l1inf_optax._projection.shrink import Projected


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def project(problems: tuple[Problem, ...], kind: Kind) -> tuple[Projected, ...]:
    """The layers projected; ``axes`` of the thresholds are kept."""
    return solve(problems, kind)


@project.defjvp
def _project_jvp(kind: Kind, primals: Any, tangents: Any) -> tuple[tuple[Projected, ...], Any]:
    (problems,), (tangents_of,) = primals, tangents
    solutions = project(problems, kind)
    dsolutions = []
    for problem, dproblem, solution in zip(problems, tangents_of, solutions, strict=True):
        parts, dparts = jax.jvp(kind.make, problem.operands, dproblem.operands)
        dresults = _tangents(
            parts, dparts, dproblem.c, problem.slope, dproblem.slope, solution, kind.axes
        )
        nothing: tuple[Any, ...] = (
            jnp.zeros_like(solution.threshold),
            np.zeros(solution.inside.shape, jax.dtypes.float0),
            jnp.zeros_like(solution.slope),
            np.zeros(solution.on_sphere.shape, jax.dtypes.float0),
            np.zeros(solution.passes.shape, jax.dtypes.float0),
        )
        dsolutions.append(Projected(dresults, *nothing))
    return solutions, tuple(dsolutions)


def _tangents(
    parts: Arrays,
    dparts: Arrays,
    dc: jax.Array,
    slope: Arrays | None,
    dslope: Arrays,
    solution: Projected,
    axes: Axes,
) -> Arrays:
    """Differentiates the optimality conditions on the support S, where they are linear.

    There ``|w| = |v| - theta g`` and ``sum_S |w| = c``. With ``e = d|v| - theta dg``, what the
    entry would do at a fixed threshold, ``dtheta = (sum_S e - dc) / sum_S g`` and
    ``d|w| = e - g dtheta``.
    """
    dtype = wide_dtype(*(part.dtype for part in parts))
    results, inside = solution.parts, solution.inside
    support = tuple(w != 0 for w in results)
    signs = tuple(jnp.sign(v).astype(dtype) for v in parts)
    free = tuple(s * dv.astype(dtype) for s, dv in zip(signs, dparts, strict=True))
    if slope is None:
        slopes: Arrays = tuple(jnp.ones_like(e) for e in free)
    else:
        slopes = slope
        free = tuple(
            e - (jnp.abs(v) - jnp.abs(w)).astype(dtype) * (dg / g)
            for e, v, w, g, dg in zip(free, parts, results, slope, dslope, strict=True)
        )

    def over_support(values: Arrays) -> jax.Array:
        kept = (jnp.where(s, x, 0) for s, x in zip(support, values, strict=True))
        return functools.reduce(jnp.add, (x.sum(axes, keepdims=True) for x in kept))

    weight = over_support(slopes)
    dtheta = (over_support(free) - dc) / jnp.where(weight > 0, weight, 1)
    return tuple(
        jnp.where(inside, dv, jnp.where(s, sign * (e - g * dtheta), 0).astype(dv.dtype))
        for dv, s, sign, e, g in zip(dparts, support, signs, free, slopes, strict=True)
    )
