"""The columns of whole layers: on one device or many, one layer or several of one kind.

Layers of one kind share one compiled search: they take turns in one loop, one computation for all,
and memory for one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.arguments import Arrays, Axes
from l1inf_optax._projection.columns import columns_of
from l1inf_optax._projection.shrink import Found, Projected, shrink
from l1inf_optax._projection.threshold import find_thresholds
from l1inf_optax._sharding import Rows, columns_where_they_are

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float


class Problem(NamedTuple):
    """A layer to project: what is known of its columns when the program runs.

    Attributes:
        operands: What its parts are made of.
        slope: ``None`` or how fast each entry shrinks, one array for each part.
        start: Where the search for the thresholds starts, column by column.
        c: The radius, column by column.
        near: By how much of c a column may be inside and still count as on its sphere.
    """

    operands: Any
    slope: Arrays | None
    start: Float[Array, "*columns"]
    c: Float[Array, "*columns"]
    near: Float[Array, "*columns"]


class Kind(NamedTuple):
    """What layers that share a search have in common, known when it is compiled.

    Attributes:
        make: Function from a layer's operands to its parts.
        axes: The axes a column runs along.
        method: ``"newton"`` or ``"sort"``.
        is_ordinary: Whether the radius needs no scale of its own.
    """

    make: Callable[..., Arrays]
    axes: Axes
    method: str
    is_ordinary: bool


@functools.partial(jax.jit, static_argnums=1)
def solve(problems: tuple[Problem, ...], kind: Kind) -> tuple[Projected, ...]:
    """The layers projected, on the devices that hold them; ``axes`` of the thresholds are kept."""
    parts = jax.eval_shape(kind.make, *problems[0].operands)
    matrix = max(parts, key=lambda part: part.size)

    def on_device(problems: tuple[Problem, ...], rows: Rows) -> tuple[Projected, ...]:
        if len(problems) == 1 and not rows.names:
            solutions = [_solve_one(problems[0], kind)]
        else:
            is_split = [part.shape == matrix.shape for part in parts]
            solutions = _solve_in_turn(problems, kind, rows, is_split)
        return tuple(
            solved._replace(passes=jnp.broadcast_to(solved.passes, solved.threshold.shape))
            for solved in solutions
        )

    solutions = columns_where_they_are(
        on_device, problems, matrix.shape, kind.axes, split_rows=kind.method != "sort"
    )
    return tuple(solved._replace(passes=jnp.max(solved.passes, initial=0)) for solved in solutions)


def _solve_one(problem: Problem, kind: Kind) -> Projected:
    parts = kind.make(*problem.operands)
    columns = columns_of(
        parts, problem.c, problem.slope, kind.axes, is_ordinary=kind.is_ordinary, rows=Rows()
    )
    found = find_thresholds(columns, problem.start, kind.axes, kind.method, problem.near)
    return shrink(parts, columns.slope, found)


def _solve_in_turn(
    problems: tuple[Problem, ...], kind: Kind, rows: Rows, is_split: Sequence[bool]
) -> list[Projected]:
    """Layers of one kind; ``is_split`` says of which parts a device holds only some rows."""
    by_column = jax.tree.map(lambda *x: jnp.stack(x), *((x.start, x.c, x.near) for x in problems))

    def made(operands: Any, slope: Arrays | None) -> tuple[Arrays, Arrays | None]:
        return kind.make(*operands), slope

    choices = [functools.partial(made, x.operands, x.slope) for x in problems]

    @jax.jit  # traced once, for its form and for the loop
    def find(i: jax.Array) -> Found:
        start, c, near = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), by_column
        )
        parts, slope = lax.switch(i, choices)
        if rows.names:  # parts that all devices hold count once
            mine = rows.is_first()
            parts = tuple(
                x if own else jnp.where(mine, x, 0) for x, own in zip(parts, is_split, strict=True)
            )
        columns = columns_of(parts, c, slope, kind.axes, is_ordinary=kind.is_ordinary, rows=rows)
        return find_thresholds(columns, start, kind.axes, kind.method, near)

    # The entries are made again: only one layer's need memory in the loop.
    return [
        shrink(*make(), found)
        for make, found in zip(choices, _in_turn(find, len(problems)), strict=True)
    ]


def _in_turn(find: Callable[[jax.Array], Found], n: int) -> list[Found]:
    """What ``find`` gives for 0 to n - 1, from one loop.

    Each result leaves the loop in an array of its own, pushed through a queue. Cut out of one
    array, at a place of its own, it would make each layer's next loops a kernel to compile, where
    layers of one shape can share them.
    """
    form = jax.eval_shape(find, jax.ShapeDtypeStruct((), jnp.int32))
    shape, dtype = form.threshold.shape, form.threshold.dtype
    forms = jax.tree.leaves(form)

    def turn(i: jax.Array, queue: Arrays) -> Arrays:
        values = [jnp.broadcast_to(x, shape) for x in jax.tree.leaves(find(i.astype(jnp.int32)))]
        return *queue[1:], jnp.stack([x.astype(dtype) for x in values])

    queue = lax.fori_loop(0, n, turn, (jnp.zeros((len(forms), *shape), dtype),) * n)
    results = []
    for values in queue:
        leaves = [x.astype(like.dtype) for x, like in zip(values, forms, strict=True)]
        found = jax.tree.unflatten(jax.tree.structure(form), leaves)
        results.append(found._replace(passes=jnp.max(found.passes, initial=0)))
    return results
