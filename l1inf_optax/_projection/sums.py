"""Column sums that are right to the last bit: folded first, then in doubled precision.

A fold adds up slices of a column entry by entry, in one vectorised loop. What a fold leaves is
added up as unevaluated sums of two floats. An entry meets D additions, at most 6 for every factor
of 16 in the column's length and 64 more; each rounds the sum by at most eps / 2, what it rounds is
added up again, and what is lost is at most D^2 eps^2 of the sum.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.arguments import Arrays, Axes
from l1inf_optax._projection.floats import Pair, exponent_of, moved, power_of_two, wide_dtype
from l1inf_optax._projection.xla_cpu import cut, in_stages
from l1inf_optax._sharding import Rows, columns_where_they_are, explicit_mesh

# A fold adds up `_SLICES` slices, of which an entry meets `FOLDS` additions: 16 slices make four
# chains of four, three additions each, and the chains one of four. `_FEW` numbers are added up in
# any order.
_SLICES = 16
FOLDS = 6
_FEW = 64


def additions(n: int) -> float:
    """How many additions an entry of a column of ``n`` entries meets at most, `_FEW` included."""
    return FOLDS * math.log(max(n, _SLICES), _SLICES) + _FEW


def length(parts: Arrays, axes: Axes) -> int:
    """How many entries a column has, over all parts."""
    return sum(math.prod(part.shape[axis] for axis in axes) for part in parts)


def largest(parts: Arrays, axes: Axes, initial: float = 0) -> jax.Array:
    """The largest entry of every column, over all parts; ``axes`` are kept."""
    return functools.reduce(
        jnp.maximum, (jnp.max(x, axis=axes, keepdims=True, initial=initial) for x in parts)
    )


def add(a: Arrays, b: Arrays) -> Arrays:
    """Adds arrays one by one."""
    return tuple(map(jnp.add, a, b))


def add_doubled(a: Arrays, b: Arrays) -> Arrays:
    """Adds unevaluated sums of two floats (Knuth); whatever else comes with them as usual."""
    head = a[0] + b[0]
    virtual = head - a[0]
    error = (a[0] - (head - virtual)) + (b[0] - virtual)
    return head, error + (a[1] + b[1]), *add(a[2:], b[2:])


def fold(
    values: Callable[..., Arrays], arrays: Arrays, axes: Axes, add: Callable[..., Arrays]
) -> list[Arrays]:
    """What ``values`` makes of the entries of ``arrays``, slices of them added up entry by entry.

    One vectorised loop reads the entries once, however many results it writes; XLA's own reduction
    is slower on the CPU with one result, and with two ten times slower. What the slices of the
    longest of ``axes`` leave over comes second. An entry meets `FOLDS` additions.
    """
    shape = arrays[0].shape
    axis = max(axes, key=lambda a: shape[a], default=None)
    if axis is None or shape[axis] < 2:
        return [values(*arrays)]
    pieces = min(_SLICES, shape[axis])
    size = shape[axis] // pieces

    def part(start: int, end: int) -> Arrays:
        return values(*(cut(x, start, end, axis) for x in arrays))

    slices = [part(i * size, (i + 1) * size) for i in range(pieces)]
    while len(slices) > 1:  # in chains of four: compilers skip the zeros of a chain, not of a tree
        chains = [slices[i : i + 4] for i in range(0, len(slices), 4)]
        slices = [functools.reduce(add, chain) for chain in chains]
    rest = shape[axis] % pieces
    return [*slices, part(shape[axis] - rest, shape[axis])] if rest else slices


def doubled_column_sums(
    read: Callable[[], list[Arrays]],
    axes: Axes,
    opaque_true: jax.Array,
    first: Callable[..., Arrays] = lambda *x: x,
) -> Arrays:
    """Column sums, along ``axes``, which are kept, in doubled precision.

    Args:
        read: Returns pairs of arrays, entries folded.
        axes: The axes a column runs along.
        opaque_true: As in :func:`in_stages`.
        first: From such a pair to what is added up: an unevaluated sum of two floats, and what
            comes with it.

    Returns:
        The sum of two floats, and the ordinary sums of what came with it.
    """

    def folded(rows: list[Arrays]) -> list[Arrays]:
        return [y for x in rows for y in fold(lambda *x: x, x, axes, add_doubled)]

    def few(rows: list[Arrays]) -> list[Arrays]:
        columns = tuple(1 if i in axes else n for i, n in enumerate(rows[0][0].shape))
        nothing = tuple(jnp.zeros(columns, x.dtype) for x in rows[0])
        single = (y for x in rows for y in _single(x, axes))
        return [functools.reduce(add_doubled, single, nothing)]

    rows = jax.eval_shape(lambda: [first(*x) for x in read()])
    later = []
    while sum(length(x[:1], axes) for x in rows) > _FEW:
        rows = jax.eval_shape(folded, rows)
        later.append(folded)
    second, *others = [*later, few]
    ((total, error, *rest),) = in_stages(
        read, [lambda rows: second([first(*x) for x in rows]), *others], opaque_true
    )
    # A sum that has overflown has no rounding error.
    return total, jnp.where(jnp.abs(total) < jnp.inf, error, 0), *rest


def _single(arrays: Arrays, axes: Axes) -> list[Arrays]:
    """The arrays, cut into one entry a column."""
    if not axes:
        return [arrays]
    n = range(arrays[0].shape[axes[0]])
    single = [tuple(lax.slice_in_dim(x, i, i + 1, axis=axes[0]) for x in arrays) for i in n]
    return [y for x in single for y in _single(x, axes[1:])]


# --- over devices that share a column -------------------------------------------------------------


def over_devices(sums: Arrays, c: jax.Array, rows: Rows) -> Arrays:
    """What `doubled_column_sums` has found, added up over the devices that share a column.

    In any order, and yet in doubled precision: what devices add up are multiples of a grid so
    coarse that sums up to 4 c do not round, and, apart, what the grid leaves over. Larger sums
    round; that far from c it does not matter.
    """
    if not rows.names:
        return sums
    total, error, *rest = sums
    info = jnp.finfo(c.dtype)
    near = total < 4 * c
    grid = power_of_two(exponent_of(jnp.maximum(c, info.tiny)) + (2 - info.nmant))
    coarse = jnp.where(near, jnp.floor(total / grid) * grid, total)
    error = jnp.where(near, total - coarse, 0) + error
    total, error, *rest = rows.sum((coarse, error, *rest))
    total, error = moved((total, jnp.zeros_like(total)), error)
    return total, jnp.where(jnp.abs(total) < jnp.inf, error, 0), *rest


def device_rounding_bound(total: jax.Array, c: jax.Array, rows: Rows) -> jax.Array:
    """How far rounding may have taken what `over_devices` adds up from the truth."""
    if not rows.names:
        return jnp.zeros_like(total)
    rounding = rows.devices * float(jnp.finfo(c.dtype).eps)
    return jnp.where(total > 2 * c, rounding * total, 2 * rounding**2 * c)


# --- norms ----------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)  # else its branches are compiled at every call
def column_norms(x: jax.Array, axes: Axes) -> jax.Array:
    """L1 norms of the columns, within a unit in the last place of the exact sum."""

    def norms(x: jax.Array, _: Rows) -> jax.Array:
        a = jnp.abs(x.astype(wide_dtype(x.dtype)))
        visible_true = jnp.asarray(True)  # compute it twice if you will: nobody waits for a norm
        total, error = doubled_column_sums(
            lambda: fold(lambda x: (x, jnp.zeros_like(x)), (a,), axes, add_doubled),
            axes,
            visible_true,
        )
        return total + error

    if explicit_mesh((x,)) is None:  # the compiler knows how to share the work
        whole = norms(x, Rows())
    else:
        whole = columns_where_they_are(norms, x, x.shape, axes, split_rows=False)
    return jnp.squeeze(whole, axes)


@column_norms.defjvp
def _column_norms_jvp(axes: Axes, primals: Arrays, tangents: Arrays) -> Pair:
    (x,), (dx,) = primals, tangents
    norms = column_norms(x, axes)
    return norms, (jnp.sign(x) * dx).astype(norms.dtype).sum(axes)
