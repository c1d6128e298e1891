"""The columns of many layers, each with its radius; what is wrong with them is said first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from l1inf_optax._projection.arguments import (
    Arrays,
    Axes,
    check_floating,
    check_method,
    is_ordinary_radius,
    radius,
)
from l1inf_optax._projection.batch import Kind, Problem
from l1inf_optax._projection.columns import weighted
from l1inf_optax._projection.derivative import project
from l1inf_optax._projection.floats import wide_dtype
from l1inf_optax._projection.shrink import Projected

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float


class Request(NamedTuple):
    """Columns to project.

    Attributes:
        operands: What they are made of.
        c: Radius, positive; a scalar or one value for each column.
        axes: The axes a column runs along, non-negative and sorted.
        start: ``None`` or a guess of the thresholds.
        slope: ``None`` or how fast each entry shrinks as the threshold rises, in the shapes of the
            parts, from 2^-60 to 1: the reciprocals of a metric's weights.
        near: By how much of c a column may be inside and still count as on its sphere.
    """

    operands: Any
    c: ArrayLike
    axes: Axes
    start: Float[Array, "*columns"] | None = None
    slope: Arrays | None = None
    near: ArrayLike = 0.0


def project_columns(
    parts: Arrays,
    c: ArrayLike,
    axes: Axes,
    *,
    metric: Arrays | None = None,
    method: str = "newton",
    start: jax.Array | None = None,
) -> Projected:
    """Projects columns that are split over several arrays, such as a kernel and its bias.

    Args:
        parts: Floating-point arrays of one rank that agree in every axis but ``axes``; a column is
            what they hold at one column index, all parts together.
        c: Radius, positive; a scalar or one value for each column.
        axes: The axes a column runs along, non-negative and sorted.
        metric: ``None`` or weights in the shapes of ``parts``.
        method: ``"newton"`` or ``"sort"``.
        start: ``None`` or a guess of the thresholds, such as those of similar columns. It changes
            how many passes the search takes and the last bits of the result, nothing else.

    Returns:
        The projected parts, their thresholds and the number of passes.

    Raises:
        ValueError: as :func:`projection_l1inf_ball`.
    """
    if metric is not None:
        for part, weights in zip(parts, metric, strict=True):
            if weights.shape != part.shape:
                raise ValueError(
                    f"metric has shape {weights.shape}, but x has shape {part.shape}: "
                    "give one weight for each entry"
                )
    slope = None
    if metric is not None:
        parts, slope = weighted(parts, metric, _by_column(c, parts, axes), axes)
    request = Request(parts, c, axes, start, slope)
    return project_all(_as_they_are, [request], method=method)[0]


def project_all(
    make: Callable[..., Arrays],
    requests: Sequence[Request],
    *,
    method: str = "newton",
) -> list[Projected]:
    """Projects the columns of many layers; those of one kind share one compiled search.

    Args:
        make: Function from a request's operands to the parts to project, entry by entry. It is
            called again wherever they are read, so that only one layer's parts need memory of
            their own at a time.
        requests: What to project.
        method: ``"newton"`` or ``"sort"``.

    Returns:
        For each request the projected parts, their thresholds and the number of passes.

    Raises:
        ValueError: as :func:`projection_l1inf_ball`.
    """
    check_method(method)
    prepared = [_prepared(make, request, method) for request in requests]
    groups: dict[Any, list[int]] = {}
    for i, (layer, kind) in enumerate(prepared):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), layer)
        same = jax.tree.structure(shapes), tuple(jax.tree.leaves(shapes)), kind
        groups.setdefault(same, []).append(i)
    results: dict[int, Projected] = {}
    for (*_, kind), members in groups.items():
        projected = project(tuple(prepared[i][0] for i in members), kind)
        for i, found in zip(members, projected, strict=True):
            results[i] = found._replace(threshold=jnp.squeeze(found.threshold, kind.axes))
    return [results[i] for i in range(len(requests))]


def _prepared(make: Callable[..., Arrays], request: Request, method: str) -> tuple[Problem, Kind]:
    operands, c, axes, start, slope, near = request
    parts = jax.eval_shape(make, *operands)
    for part in parts:
        check_floating(part.dtype, "the array")
    by_column = _by_column(c, parts, axes)
    if start is None:
        guess = jnp.zeros_like(by_column)
    else:
        guess = jnp.expand_dims(start.astype(by_column.dtype), axes)
    near = jnp.full_like(by_column, near)
    is_ordinary = is_ordinary_radius(c, is_weighted=slope is not None)
    return Problem(operands, slope, guess, by_column, near), Kind(make, axes, method, is_ordinary)


def _by_column(c: ArrayLike, parts: Any, axes: Axes) -> jax.Array:
    """The radius of every column, of the shape of the columns; ``axes`` are kept."""
    columns = tuple(n for i, n in enumerate(parts[0].shape) if i not in axes)
    found = radius(c, wide_dtype(*(part.dtype for part in parts)), columns)
    return jnp.expand_dims(jnp.broadcast_to(found, columns), axes)


def _as_they_are(*parts: jax.Array) -> Arrays:
    return parts
