"""Norms, thresholds and projections: arrays in, arrays out; nothing here knows a pytree.

The projection of a column v onto the L1 ball of radius c soft-thresholds it,
``w = sign(v) max(|v| - theta, 0)``. In six lines:

1. f(theta) = sum max(|v| - theta, 0) - c is convex, decreasing and piecewise linear.
2. One pass over the entries gives f and its slope; the first at an earlier threshold, or at 0.
3. f(0) <= 0 means inside the ball: left as it is. In doubt to the last bit? Decided exactly.
4. Newton's step, theta += f(theta) / #{|v| > theta}, lands left of the root from either side.
5. Far from the root it goes half as far again as an exponential tail would need.
6. Stop at the first theta near the root where f plus all that rounding can hide is f <= 0.

Theta is an unevaluated sum of two floats. One is too coarse: a million entries just above the
threshold would each be wrong by half a unit in its last place, their sum by some per cent.
``(|v| - theta_1) - theta_2`` keeps every entry right to its own last bits.

With a metric d the minimiser of ``sum d (w - v)^2`` is ``sign(v) max(|v| - theta g, 0)`` with
``g = 1 / d``: the same iteration, each entry with slope g.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from l1inf_optax._sharding import Rows, columns_where_they_are, explicit_mesh

Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]
Pair = tuple[jax.Array, jax.Array]

METHODS = ("newton", "sort")

# Every pass of Newton's method divides excess times slope by four or more, and their product
# starts below n^2 c. So in exact arithmetic log2(n) + 5 passes reach an excess of c / 1000, and
# with a metric as many more as its largest ratio has factors of four; real data takes 3 to 8.
# Rounding has no such theorem: past this number of passes any feasible threshold will do, steps
# double until there is one, and the search ends after `_PASSES`, whatever happens.
_USUAL_PASSES = 12
_NEWTON_PASSES = 48
_PASSES = 160
_LARGEST_WEIGHT = 2.0**60
# A fold adds up `_SLICES` slices, of which an entry meets `_FOLDS` additions; `_FEW` numbers are
# added up in any order. Above `_STEEP` times c the largest entry of a column is worth a look.
_SLICES = 16
_FOLDS = 6
_FEW = 64
_STEEP = 32
# Radii for which nothing needs a scale of its own: no sum that decides anything can overflow, no
# bit that decides anything can underflow, and what underflows is nothing beside c.
_PLAIN_RADII = 2.0**-30, 2.0**60
_SHOWN = 16  # numbers that a message shows


class Request(NamedTuple):
    """Columns to project.

    Attributes:
        operands: What they are made of.
        c: Radius, positive; a scalar or one value for each column.
        axes: The axes a column runs along, non-negative and sorted.
        start: ``None`` or a guess of the thresholds.
        slope: ``None`` or how fast each entry shrinks as the threshold rises, in the shapes of the
            parts, from 2^-60 to 1: the reciprocals of a metric's weights.
        bounded: Whether magnitudes above 2^60 may count as that, which saves a weighted projection
            a copy of the entries.
    """

    operands: Any
    c: ArrayLike
    axes: Axes
    start: jax.Array | None = None
    slope: Arrays | None = None
    bounded: bool = False


class Projected(NamedTuple):
    """Columns, projected.

    Attributes:
        parts: The projected parts, in the shapes and dtypes of what was projected.
        threshold: The thresholds, zero where a column was inside its ball; of the shape of the
            columns. The next projection of similar columns may start from them.
        inside: Which columns were inside; like the threshold, but ``axes`` are kept.
        passes: int32 scalar, how many times the entries were read to find the thresholds.
    """

    parts: Arrays
    threshold: jax.Array
    inside: jax.Array
    passes: jax.Array


def l1inf_norm(x: ArrayLike, *, axis: int | Sequence[int] = 0) -> jax.Array:
    r"""The L1,inf norm: the largest L1 norm of a column.

    .. math:: \|V\|_{1,\infty} = \max_j \sum_i |V_{ij}|

    This is the norm of Wen et al., Section 2.3. Part of the literature (Quattoni et al. 2009;
    Barlaud, Perez and Condat) writes :math:`\ell_{1,\infty}` for another norm, the *sum* of the
    columns' *maxima*.

    The sums are exact to the last bit of the result: the norm of what
    :func:`projection_l1inf_ball` returns never reads more than ``c``.

    Args:
        x: Array of any shape, floating-point.
        axis: The axis or axes a column runs along; every other axis is a column index.

    Returns:
        A scalar; float32 for 16-bit input, else of the dtype of ``x``. 0 if ``x`` has no entry.

    Raises:
        ValueError: ``x`` is not floating-point, or ``axis`` is out of range or repeated.

    Example:
        >>> import jax.numpy as jnp, l1inf_optax as l1inf
        >>> V = jnp.array([[1.0, -3.0], [2.0, 0.5]])
        >>> l1inf.l1inf_norm(V)
        Array(3.5, dtype=float32)
        >>> l1inf.l1inf_norm(V, axis=1)  # a row is a column of the transpose
        Array(4., dtype=float32)
    """
    array = _floating(x)
    axes = normalise_axes(axis, array.ndim)
    return jnp.max(_column_norms(array, axes), initial=0)


def projection_l1inf_ball(
    x: ArrayLike,
    c: ArrayLike,
    *,
    axis: int | Sequence[int] = 0,
    metric: ArrayLike | None = None,
    method: str = "newton",
) -> jax.Array:
    r"""Projects every column onto the L1 ball of radius ``c``.

    .. math::
        \operatorname*{argmin}_{W} \; \sum_{ij} d_{ij} (W_{ij} - V_{ij})^2
        \quad \text{subject to} \quad \|W\|_{1,\infty} \le c

    with :math:`d = 1` unless ``metric`` is given. The result is exact to rounding error: of ``c``;
    with a metric, that of a metric whose last bits differ. It is feasible without tolerance: the
    absolute values of a column, added up in float64, are at most ``c``. A column inside the ball is
    returned bit for bit. Infinite entries take the limit (``k`` of them share ``c`` equally); a NaN
    makes its own column NaN and no other.

    Differentiable in ``x``, ``c`` and ``metric``, forward and reverse, by differentiating the
    optimality conditions: on the support the tangent minus its mean along the signs.

    ``"newton"`` reads ``x`` five to ten times, whatever its size. ``"sort"`` is the paper's
    Algorithm 2 (Duchi et al. 2008), the readable reference; XLA's sort makes it ten to a hundred
    times slower. Both agree to rounding error.

    Args:
        x: Array of any shape, float16, bfloat16, float32 or float64.
        c: Radius, positive, ``inf`` for no constraint; a scalar or one value for each column
            (the shape of ``x`` without ``axis``).
        axis: The axis or axes a column runs along; every other axis is a column index.
        metric: ``None`` or the weights d, of the shape of ``x``, positive and finite. Only ratios
            within a column matter; a weight above 2^60 times the least of its column counts as
            that.
        method: ``"newton"`` or ``"sort"``.

    Returns:
        The projection, of the shape and dtype of ``x``.

    Raises:
        ValueError: ``x`` or ``metric`` is not floating-point, ``c`` is not positive or of another
            shape, ``axis`` is out of range or repeated, ``method`` is unknown.

    References:
        Wen et al., *Sparse deep neural networks using L1,inf-weight normalization*, Algorithms 1
        and 2. Duchi et al. (2008), *Efficient projections onto the l1-ball*. Condat (2016), *Fast
        projection onto the simplex and the l1 ball*.

    Example:
        >>> import jax.numpy as jnp, l1inf_optax as l1inf
        >>> V = jnp.array([[3.0, 0.5], [-1.0, 0.25], [0.5, 0.0]])
        >>> l1inf.projection_l1inf_ball(V, 2.0)
        Array([[2.  , 0.5 ],
               [0.  , 0.25],
               [0.  , 0.  ]], dtype=float32)
    """
    array = _floating(x)
    axes = normalise_axes(axis, array.ndim)
    weights = None if metric is None else (_floating(metric, "metric"),)
    return project_columns((array,), c, axes, metric=weights, method=method).parts[0]


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
    slope = None if metric is None else _slopes(parts, metric, axes)
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
    groups: dict[Any, list[int]] = {}
    prepared = []
    for i, (operands, c, axes, start, slope, bounded) in enumerate(requests):
        parts = jax.eval_shape(make, *operands)
        for part in parts:
            check_floating(part.dtype, "the array")
        dtype = jnp.result_type(jnp.float32, *(part.dtype for part in parts))
        columns = tuple(n for k, n in enumerate(parts[0].shape) if k not in axes)
        constant = _constant(c, dtype, columns)
        guess = jnp.zeros((), dtype) if start is None else start.astype(dtype)
        by_column = tuple(
            jnp.expand_dims(jnp.broadcast_to(x, columns), axes) for x in (guess, *constant)
        )
        plain = (slope is None or bounded) and _is_plain(c)
        layer = operands, slope, by_column
        prepared.append(layer)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), layer)
        kind = jax.tree.structure(shapes), tuple(jax.tree.leaves(shapes)), axes, plain
        groups.setdefault(kind, []).append(i)
    results: dict[int, Projected] = {}
    for (*_, axes, plain), members in groups.items():
        layers = tuple(prepared[i] for i in members)
        projected = _project(layers, make, axes, method, plain)
        for i, found in zip(members, projected, strict=True):
            results[i] = found._replace(threshold=jnp.squeeze(found.threshold, axes))
    return [results[i] for i in range(len(requests))]


def _as_they_are(*parts: jax.Array) -> Arrays:
    return parts


# --- what is wrong is said before anything is compiled --------------------------------------------


def _floating(x: ArrayLike, name: str = "x") -> jax.Array:
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is a {type(x).__name__}, not an array: to project a pytree of parameters, say "
            "l1inf.project_params(params, c)"
        ) from None
    check_floating(array.dtype, name)
    return array


def check_floating(dtype: jnp.dtype, name: str) -> None:
    """Raises a ValueError if ``name`` has no dtype that can be projected."""
    if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(
            f"{name} has dtype {dtype}: convert it to float16, bfloat16, float32 or float64"
        )


def normalise_axes(axis: int | Sequence[int], ndim: int, name: str = "axis") -> Axes:
    """Axes as sorted non-negative ints; a ValueError names what is wrong with ``name``."""
    try:
        given = (operator.index(axis),) if not isinstance(axis, Sequence) else tuple(axis)
    except TypeError:
        raise ValueError(
            f"{name}={axis!r} is not an int or a sequence of ints: name axes"
        ) from None
    if any(not -ndim <= a < ndim for a in given):
        raise ValueError(f"{name}={axis} is out of range for an array with {ndim} axes")
    axes = tuple(sorted(int(a) % ndim for a in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"{name}={axis} names an axis twice: name each once")
    return axes


def check_method(method: str) -> None:
    """Raises a ValueError if there is no such method."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")


def check_radius(c: ArrayLike, columns: tuple[int, ...] | None = None) -> None:
    """Raises a ValueError if ``c`` is not positive or, where these are given, does not fit columns.

    What is traced is not known yet, and passes for positive.
    """
    try:
        radii = np.asarray(1 if isinstance(c, jax.core.Tracer) else c)
    except (TypeError, ValueError):  # no array can be made of it
        radii = np.asarray(None)
    if not any(jnp.issubdtype(radii.dtype, kind) for kind in (np.floating, np.integer, np.bool_)):
        raise ValueError(
            f"c={brief(c)} is a {type(c).__name__}, not a number: give the largest L1 norm a "
            "column may have"
        )
    if not np.all(radii > 0):
        raise ValueError(
            f"c={brief(c)} is not positive: give the largest L1 norm a column may have"
        )
    if columns is not None and jnp.shape(c) not in ((), columns):
        raise ValueError(
            f"c has shape {jnp.shape(c)}: give a scalar, or one value for each column, {columns}"
        )


def brief(x: Any) -> str:
    """How a message shows a value: as Python does, but never a page of it."""
    leaves = jax.tree.leaves(x)
    if sum(getattr(leaf, "size", 1) for leaf in leaves) > _SHOWN:  # do not fetch them from a device
        if leaves[0] is x:
            return f"{x.dtype}[{','.join(map(str, x.shape))}]"
        return f"<{type(x).__name__} with {len(leaves)} leaves>"
    text = " ".join(repr(x).split())
    return text if len(text) <= _SHOWN * 10 else f"{text[: _SHOWN * 10]}..."


def _is_plain(c: ArrayLike) -> bool:
    """Whether ``c`` is known now (not traced) and of ordinary size."""
    least, most = _PLAIN_RADII
    try:
        radii = np.asarray(c).astype(np.float64)
    except jax.errors.TracerArrayConversionError:
        return False
    return bool(np.all((radii >= least) & (radii <= most)))


def _constant(c: ArrayLike, dtype: jnp.dtype, columns: tuple[int, ...]) -> Arrays:
    """``c`` in terms that ``dtype`` can hold; a JAX array stays whole, for its tangent's sake."""
    check_radius(c, columns)
    if not isinstance(c, jax.Array):
        return tuple(map(jnp.asarray, _terms(np.asarray(c, np.float64), dtype, np)))
    if jnp.issubdtype(c.dtype, jnp.floating):  # a wider float is taken apart later
        return (c if c.dtype.itemsize > dtype.itemsize else c.astype(dtype),)
    nearest = c.astype(dtype)
    return (jnp.where(nearest.astype(c.dtype) > c, jnp.nextafter(nearest, 0 * nearest), nearest),)


def _terms(c: Any, dtype: jnp.dtype, xp: Any) -> list[Any]:
    """Three floats of ``dtype``, rounded down, that add up to ``c``: 72 bits hold float64's 53."""
    terms: list[Any] = []
    for _ in range(3):
        with np.errstate(over="ignore"):
            nearest = c.astype(dtype)
        terms.append(xp.where(nearest > c, xp.nextafter(nearest, xp.zeros_like(nearest)), nearest))
        finite = xp.isfinite(terms[-1])
        c = xp.where(finite, c - xp.where(finite, terms[-1], 0), 0)
    return terms


# --- sums -----------------------------------------------------------------------------------------


def _fold(
    values: Callable[..., Arrays], arrays: Arrays, axes: Axes, add: Callable[..., Arrays]
) -> list[Arrays]:
    """What ``values`` makes of the entries of ``arrays``, slices of them added up entry by entry.

    One vectorised loop reads the entries once, however many results it writes; XLA's own reduction
    is slower on the CPU with one result, and with two ten times slower. What the slices of the
    longest of ``axes`` leave over comes second. An entry meets `_FOLDS` additions.
    """
    shape = arrays[0].shape
    axis = max(axes, key=lambda a: shape[a], default=None)
    if axis is None or shape[axis] < 2:
        return [values(*arrays)]
    pieces = min(_SLICES, shape[axis])
    size = shape[axis] // pieces

    def part(start: int, end: int) -> Arrays:
        return values(*(_cut(x, start, end, axis) for x in arrays))

    slices = [part(i * size, (i + 1) * size) for i in range(pieces)]
    while len(slices) > 1:  # in chains of four: compilers skip the zeros of a chain, not of a tree
        chains = [slices[i : i + 4] for i in range(0, len(slices), 4)]
        slices = [functools.reduce(add, chain) for chain in chains]
    rest = shape[axis] % pieces
    return [*slices, part(shape[axis] - rest, shape[axis])] if rest else slices


def _cut(x: jax.Array, start: int, end: int, axis: int) -> jax.Array:
    """A slice. XLA's CPU compiler has none of 16-bit floats: it converts all of x first."""
    if x.dtype.itemsize > 2:
        return lax.slice_in_dim(x, start, end, axis=axis)
    bits = lax.slice_in_dim(_bits(x), start, end, axis=axis)
    return lax.bitcast_convert_type(bits, x.dtype)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _plain(a: Arrays, b: Arrays) -> Arrays:
    return tuple(map(jnp.add, a, b))


def _doubled(a: Arrays, b: Arrays) -> Arrays:
    """Adds unevaluated sums of two floats (Knuth); whatever else comes with them as usual."""
    head = a[0] + b[0]
    moved = head - a[0]
    error = (a[0] - (head - moved)) + (b[0] - moved)
    return head, error + (a[1] + b[1]), *_plain(a[2:], b[2:])


def _total(
    read: Callable[[], list[Arrays]],
    axes: Axes,
    go: jax.Array,
    first: Callable[..., Arrays] = lambda *x: x,
) -> Arrays:
    """Column sums, along ``axes``, which are kept, in doubled precision.

    An entry meets D additions, at most 6 for every factor of 16 and `_FEW`, each of which rounds
    the sum by eps / 2 at most; what it rounds is added up again, and lost is D^2 eps^2 of the sum.

    Args:
        read: Returns pairs of arrays, entries folded.
        axes: The axes a column runs along.
        go: True, but not to the compiler.
        first: From such a pair to what is added up: an unevaluated sum of two floats, and what
            comes with it.

    Returns:
        The sum of two floats, and the ordinary sums of what came with it.
    """

    def fold(rows: list[Arrays]) -> list[Arrays]:
        return [y for x in rows for y in _fold(lambda *x: x, x, axes, _doubled)]

    def few(rows: list[Arrays]) -> list[Arrays]:
        columns = tuple(1 if i in axes else n for i, n in enumerate(rows[0][0].shape))
        nothing = tuple(jnp.zeros(columns, x.dtype) for x in rows[0])
        return [functools.reduce(_doubled, (y for x in rows for y in _single(x, axes)), nothing)]

    rows = jax.eval_shape(lambda: [first(*x) for x in read()])
    later = []
    while sum(_length(x[:1], axes) for x in rows) > _FEW:
        rows = jax.eval_shape(fold, rows)
        later.append(fold)
    second, *others = [*later, few]
    ((total, error, *rest),) = _in_stages(
        read, [lambda rows: second([first(*x) for x in rows]), *others], go
    )
    # A sum that has overflown has no rounding error.
    return total, jnp.where(jnp.abs(total) < jnp.inf, error, 0), *rest


def _over_rows(sums: Arrays, c: jax.Array, rows: Rows) -> Arrays:
    """What `_total` has found, added up over the devices that share a column.

    In any order, and yet in doubled precision: what devices add up are multiples of a grid so
    coarse that sums up to 4 c do not round, and, apart, what the grid leaves over. Larger sums
    round; that far from c it does not matter.
    """
    if not rows.names:
        return sums
    total, error, *rest = sums
    info = jnp.finfo(c.dtype)
    near = total < 4 * c
    grid = _power_of_two(_exponent(jnp.maximum(c, info.tiny)) + (2 - info.nmant))
    coarse = jnp.where(near, jnp.floor(total / grid) * grid, total)
    error = jnp.where(near, total - coarse, 0) + error
    total, error, *rest = rows.sum((coarse, error, *rest))
    total, error = _shift((total, jnp.zeros_like(total)), error)
    return total, jnp.where(jnp.abs(total) < jnp.inf, error, 0), *rest


def _unsure(total: jax.Array, c: jax.Array, rows: Rows) -> jax.Array:
    """How far rounding may have taken what `_over_rows` adds up from the truth."""
    if not rows.names:
        return jnp.zeros_like(total)
    rounding = rows.devices * float(jnp.finfo(c.dtype).eps)
    return jnp.where(total > 2 * c, rounding * total, 2 * rounding**2 * c)


def _in_stages(
    read: Callable[[], list[Arrays]],
    later: Sequence[Callable[[list[Arrays]], list[Arrays]]],
    go: jax.Array,
) -> list[Arrays]:
    """What the stages make of each other's results, each computed once; ``go`` is true.

    On the CPU the compiler makes a loop of its own for every result, one that reads all entries,
    and repeats it for everything that uses the result. Not for what a branch returns, and not for
    two results that are one complex number.
    """

    def pack(rows: list[Arrays]) -> list[Arrays]:
        return [(lax.complex(*x[:2]), *x[2:]) for x in rows]

    def unpack(rows: list[Arrays]) -> list[Arrays]:
        return [(x.real, x.imag, *rest) for x, *rest in rows]

    def once(compute: Callable[[], list[Arrays]]) -> list[Arrays]:
        shapes = jax.eval_shape(compute)
        nothing = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return lax.cond(go, compute, nothing)

    def then(stage: Callable[..., list[Arrays]], rows: list[Arrays]) -> list[Arrays]:
        return pack(stage(unpack(rows)))

    def on_cpu() -> list[Arrays]:
        rows = once(lambda: pack(read()))
        for stage in later:
            rows = once(functools.partial(then, stage, rows))
        return unpack(rows)

    def elsewhere() -> list[Arrays]:
        return functools.reduce(lambda rows, stage: stage(rows), later, read())

    return lax.platform_dependent(cpu=on_cpu, default=elsewhere)


def _single(arrays: Arrays, axes: Axes) -> list[Arrays]:
    """The arrays, cut into one entry a column."""
    if not axes:
        return [arrays]
    n = range(arrays[0].shape[axes[0]])
    cut = [tuple(lax.slice_in_dim(x, i, i + 1, axis=axes[0]) for x in arrays) for i in n]
    return [y for x in cut for y in _single(x, axes[1:])]


def _length(parts: Arrays, axes: Axes) -> int:
    return sum(math.prod(part.shape[axis] for axis in axes) for part in parts)


def _max(parts: Arrays, axes: Axes, initial: float = 0) -> jax.Array:
    return functools.reduce(
        jnp.maximum, (jnp.max(x, axis=axes, keepdims=True, initial=initial) for x in parts)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)  # else its branches are compiled at every call
def _column_norms(x: jax.Array, axes: Axes) -> jax.Array:
    """L1 norms of the columns, correctly rounded but for the last bit's last doubt."""

    def norms(x: jax.Array, _: Rows) -> jax.Array:
        a = jnp.abs(x.astype(jnp.result_type(x, jnp.float32)))
        go = jnp.asarray(True)  # here the compiler may compute twice: nobody waits for a norm
        total, error = _total(
            lambda: _fold(lambda x: (x, jnp.zeros_like(x)), (a,), axes, _doubled), axes, go
        )
        return total + error

    if explicit_mesh((x,)) is None:  # the compiler knows how to share the work
        whole = norms(x, Rows())
    else:
        whole = columns_where_they_are(norms, x, x.shape, axes, split_rows=False)
    return jnp.squeeze(whole, axes)


@_column_norms.defjvp
def _column_norms_jvp(axes: Axes, primals: Arrays, tangents: Arrays) -> Pair:
    (x,), (dx,) = primals, tangents
    norms = _column_norms(x, axes)
    return norms, (jnp.sign(x) * dx).astype(norms.dtype).sum(axes)


# --- powers of two --------------------------------------------------------------------------------


def _exponent(x: jax.Array) -> jax.Array:
    """The e with 2^e <= x < 2^(e + 1), for positive normal x."""
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{info.bits}"))
    return (bits >> info.nmant) - (info.maxexp - 1)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, exactly, for exponents of normal numbers."""
    info = jnp.finfo(f"float{jnp.iinfo(exponent.dtype).bits}")
    return lax.bitcast_convert_type((exponent + (info.maxexp - 1)) << info.nmant, info.dtype)


def _scale(exponent: jax.Array) -> Pair:
    """Two powers of two whose product is 2^exponent; as one float it could overflow."""
    half = exponent // 2
    return _power_of_two(half), _power_of_two(exponent - half)


def _times(x: jax.Array, scale: Pair) -> jax.Array:
    return x * scale[0] * scale[1]


# --- columns --------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """What the search for the thresholds compares, adds up and aims at.

    Attributes:
        entries: What thresholds are compared with, one array for each part: the parts themselves,
            of which only the magnitudes count, or, on a scale of their own, magnitudes.
        slope: How fast a survivor shrinks as the threshold rises, one array for each part; None
            where every slope is 1.
        dtypes: The dtype of each part.
        c: The radius.
        c_rest: What the float ``c`` leaves out of the radius, in terms of falling size.
        floor: The least threshold there is: 0, which leaves a column as it is.
        outside: Columns known to be outside their ball.
        free: Columns without a constraint, c = inf.
        scaling: How the entries were scaled; None where they are the parts.
        rows: The devices that hold the rest of the columns.
    """

    entries: Arrays
    slope: Arrays | None
    dtypes: tuple[jnp.dtype, ...]
    c: jax.Array
    c_rest: Arrays
    floor: jax.Array
    outside: jax.Array
    free: jax.Array
    scaling: "_Scaling | None"
    rows: Rows

    def magnitude(self, x: jax.Array) -> jax.Array:
        """The magnitudes of entries."""
        if self.scaling is not None:
            return x
        return _magnitude(x.astype(self.c.dtype), self.slope is not None)


def _magnitude(x: jax.Array, weighted: bool) -> jax.Array:
    """Magnitudes as they are; in a weighted search none so large that a threshold overflows."""
    a = jnp.abs(x)
    return jnp.minimum(a, _LARGEST_WEIGHT) if weighted else a


class _Scaling(NamedTuple):
    """Magnitudes scaled by a power of two to 1 <= c < 2, or lowered first and then scaled.

    Magnitudes that the scale would take out of range, those of a column far larger than c, are
    lowered by what a threshold near the root takes off them. What then underflows is nothing beside
    the largest.

    Attributes:
        up: Two powers of two that take a value to this scale; their product could overflow.
        down: Their reciprocals.
        far: Columns that are lowered.
        unit: Two powers of two that take the largest magnitude to [1, 2).
        back: Two that take this to the scale.
        tops: What lowers magnitudes times ``unit``: the largest threshold there is or, in a
            weighted search, one next to the least there may be, and its rounding errors.
        infinite: Columns that hold an infinity, beside which every finite entry is nothing.
        most: The magnitude that stands for infinity, the radius or the largest that can be stored:
            it leaves k of them an equal share.
    """

    up: Pair
    down: Pair
    far: jax.Array
    unit: Pair
    back: Pair
    tops: Arrays
    infinite: jax.Array
    most: jax.Array

    def finite(self, part: jax.Array) -> jax.Array:
        """Magnitudes, on their own scale, of which none is infinite."""
        a = jnp.abs(part.astype(self.unit[0].dtype))
        return jnp.where(self.infinite, jnp.where(a == jnp.inf, self.most, 0 * a), a)

    def magnitude(self, part: jax.Array, slope: jax.Array | None) -> jax.Array:
        """Magnitudes on the scale."""
        a = self.finite(part)
        lowered = _rescale(a, self.unit)
        for top in self.tops:
            lowered = _over(lowered, (top, 0), slope)
        lowered = _times(lowered, self.back)
        if slope is not None:  # beside so large an entry rounding hides the ball; still it must end
            lowered = jnp.minimum(lowered, _LARGEST_WEIGHT)
        return jnp.where(self.far, lowered, _rescale(a, self.up))


def _over(a: jax.Array, theta: tuple[ArrayLike, ArrayLike], slope: jax.Array | None) -> jax.Array:
    """How far magnitudes are above a threshold, to their own last bits."""
    if slope is None:
        return (a - theta[0]) - theta[1]
    # The minima keep the compiler from fusing products into the differences: it would round once
    # where another copy of the same product rounds twice.
    first, second = (jnp.minimum(x * slope, jnp.finfo(a.dtype).max) for x in theta)
    return (a - first) - second


def _slopes(parts: Arrays, metric: Arrays, axes: Axes) -> Arrays:
    """The reciprocals of a metric's weights, those of a column from 2^-60 to 1."""
    dtype = jnp.result_type(jnp.float32, *parts)
    info = jnp.finfo(dtype)
    d = tuple(weights.astype(dtype) for weights in metric)
    least = -_max(tuple(-x for x in d), axes, initial=-float(info.max))
    unit = _scale(-_exponent(jnp.maximum(lax.stop_gradient(least), info.tiny)))
    infinite = _max(tuple(jnp.abs(part).astype(dtype) for part in parts), axes) == jnp.inf
    slopes = (jnp.clip(1 / _rescale(x, unit), 1 / _LARGEST_WEIGHT, 1) for x in d)
    return tuple(jnp.where(infinite, 1, slope) for slope in slopes)  # which share c equally


def _columns(
    parts: Arrays, c: Arrays, slope: Arrays | None, axes: Axes, plain: bool, rows: Rows
) -> _Columns:
    dtypes = tuple(part.dtype for part in parts)
    if plain:
        nothing, no = jnp.zeros_like(c[0]), jnp.zeros(c[0].shape, bool)
        return _Columns(parts, slope, dtypes, c[0], c[1:], nothing, no, no, None, rows)
    dtype = jnp.result_type(jnp.float32, *parts)
    info = jnp.finfo(dtype)
    head, *rest = [*_terms(c[0], dtype, jnp), *c[1:]] if c[0].dtype != dtype else c
    radius = jnp.clip(head, 0, info.max)  # a NaN stays one
    exponent = _exponent(jnp.maximum(radius, info.tiny))
    up = _scale(-exponent)
    largest = rows.max(_max(tuple(jnp.abs(part.astype(dtype)) for part in parts), axes))
    infinite = largest == jnp.inf
    largest = jnp.where(infinite, radius, largest)
    # A threshold's share of a weighted entry rounds with the entry: where the ball is small beside
    # it, better once than at every threshold.
    far = largest * (2.0**-40 if slope is None else 2.0**-4) > radius
    own = _exponent(jnp.maximum(largest, info.tiny))
    unit = _scale(-own)
    scaled = _rescale(radius, up)
    back = _scale(own - exponent)
    most = jnp.minimum(radius, min(float(jnp.finfo(x).max) for x in dtypes))
    scaling = _Scaling(up, _scale(exponent), far, unit, back, (), infinite, most)
    if slope is None:
        slopes: tuple[jax.Array | None, ...] = (None,) * len(parts)
        tops: Arrays = (_times(largest, unit),)
    else:
        slopes, tops = slope, ()
        a = tuple(_rescale(scaling.finite(x), unit) for x in parts)
        for _ in range(3):  # each leaves an error of eps times what was lowered
            top, _ = _beside(a, slope, _times(radius, unit), axes, rows)
            a = tuple(_over(x, (top, 0), g) for x, g in zip(a, slope, strict=True))
            tops = *tops, top
    scaling = scaling._replace(tops=tops)
    entries = tuple(map(scaling.magnitude, parts, slopes))
    floor = -scaled if slope is None else _beside(entries, slope, scaled, axes, rows)[0]
    return _Columns(
        entries=entries,
        slope=slope,
        dtypes=dtypes,
        c=scaled,
        c_rest=tuple(_rescale(x, up) for x in rest),
        floor=jnp.where(far, floor, 0),
        outside=infinite | far,
        free=jnp.isposinf(head),
        scaling=scaling,
        rows=rows,
    )


def _reciprocal(scale: Pair) -> Pair:
    return 1 / scale[0], 1 / scale[1]


def _rescale(a: jax.Array, scale: Pair) -> jax.Array:
    """``a`` times the scale, subnormal numbers included, which CPUs and TPUs read as zero."""
    info = jnp.finfo(a.dtype)
    lowest = info.minexp - info.nmant  # a subnormal number is an integer times 2^lowest
    integer = lax.bitcast_convert_type(a, jnp.dtype(f"int{info.bits}")).astype(a.dtype)
    tiny = integer * (scale[0] * 2.0 ** (lowest // 2)) * (scale[1] * 2.0 ** (lowest - lowest // 2))
    return jnp.where(a < info.tiny, tiny, _times(a, scale))


# --- the threshold --------------------------------------------------------------------------------


# What is known of a column, in bits: it is outside its ball, it may be inside after all, it is
# inside, it has its answer, a threshold was too large, its largest entry was read.
_OUTSIDE, _DOUBTFUL, _INSIDE, _DONE, _CROSSED, _TOPPED = (1 << i for i in range(6))


class _Search(NamedTuple):
    """State of the search for the thresholds.

    Attributes:
        trial: The threshold to try next; where done, the answer.
        left: The largest known to be left of the root, but for rounding.
        known: Bits of what is known.
        passes: How many thresholds were tried.
    """

    trial: Pair
    left: jax.Array
    known: jax.Array
    passes: jax.Array


def _search(columns: _Columns, start: jax.Array, axes: Axes) -> _Search:
    """The smallest thresholds, but for rounding, whose rounded results are inside the ball."""
    info = jnp.finfo(columns.c.dtype)
    eps = float(info.eps)
    coarsest = max((jnp.finfo(dtype) for dtype in columns.dtypes), key=lambda f: f.eps)
    most = _NEWTON_PASSES + (0 if columns.slope is None else round(math.log2(_LARGEST_WEIGHT)))
    zero = jnp.zeros_like(columns.floor)
    floor = columns.floor, zero
    unseen = sum(columns.c_rest) * (1 + 4 * eps) + columns.c * _unseen(info)
    # How far below c a result may end: a few units in the last place, and what is lost where
    # a 16-bit format runs out of exponents.
    short = coarsest.eps > info.eps
    slack = (2 if short else 3) * float(coarsest.eps) * columns.c
    lost = zero
    if short:
        n = _length(columns.entries, axes) * columns.rows.devices
        least = coarsest.smallest_subnormal if coarsest.dtype == jnp.float16 else coarsest.tiny
        lost = jnp.full_like(slack, float(least) * n)
        lost = lost if columns.scaling is None else _times(lost, columns.scaling.up)
        slack += lost

    def beside() -> Pair:
        magnitudes = tuple(map(columns.magnitude, columns.entries))
        return _beside(magnitudes, columns.slope, columns.c, axes, columns.rows)

    def unfinished(search: _Search) -> jax.Array:
        return jnp.any(search.known & _DONE == 0) & (search.passes < _PASSES)

    def step(search: _Search) -> _Search:
        trial, known, passes = search.trial, search.known, search.passes + 1
        total, excess, doubt, slope = _survivors(columns, trial, axes, search.passes < _PASSES)
        above, below = excess + doubt, excess - doubt  # the true excess lies between them
        feasible, late = above <= 0, passes > most

        # The norm itself exceeds c by this much and more: the slope is steepest at the floor. Only
        # there are entries added up that were not rounded before.
        height = _gap(trial, floor) * (1 - 2.0**-20)
        rounded = total if columns.slope is None else total + slope * height
        rounded = 2 * float(coarsest.eps) * rounded + lost
        rounded = jnp.where(height > 0, rounded, 0)
        outside = (known & _OUTSIDE > 0) | (below - rounded + slope * height > unseen)
        asked = ~outside & (height <= 0)
        inside = asked & feasible
        # With a metric the threshold's share of each entry rounds, and no step is finer than that.
        # A column that is not done after so many passes has sums that round to and fro.
        blur = doubt if columns.slope is None else doubt + eps * slope * height
        blur *= jnp.where(passes > _USUAL_PASSES, 2, 0 if columns.slope is None else 0.5)
        near = (above >= -(slack + blur)) | late
        if columns.slope is not None:
            near |= trial[0] - search.left <= 8 * eps * jnp.abs(trial[0])
        infinite = (total == jnp.inf) & (trial[0] == info.max)  # none but infinite entries survive
        done = (known & _DONE > 0) | (feasible & near & outside) | inside | infinite
        done |= jnp.isnan(excess)

        aim = slack / 16 if short else jnp.minimum(doubt, 1.5 * eps * columns.c)
        aim += blur / 4
        # Entries that tie round alike, so that a step may change nothing: try longer ones, and in
        # the end ones that are sure to be long enough.
        stretch = jnp.exp2(
            jnp.clip(passes - (4 if short else _USUAL_PASSES), 0, 3).astype(info.dtype)
        )
        last = jnp.exp2(jnp.maximum(passes - most, 0).astype(info.dtype))
        far = below > 2.0**-8 * columns.c
        close = jnp.minimum(
            (above + aim) * jnp.where(feasible, 1, stretch), above + (slack + blur) / 2
        )
        gain = jnp.where(far, below * (1 - 4 * eps), close) / slope  # a quotient rounds, too
        newton = _shift(trial, jnp.where(total < jnp.inf, gain, 0) * last)
        # If the tail falls exponentially the root is log(norm / c) times norm / slope away.
        # Newton falls short of that from the left and far short of it from the right.
        tail = total / slope * jnp.log(total / columns.c)
        ahead = (jnp.abs(excess) > columns.c / 4) & (known & _CROSSED == 0)
        halfway = _shift(trial, jnp.where(ahead, (gain + tail) / 2, jnp.nan))
        following = _larger(halfway, newton)

        # Where most of the norm must go the largest entry says more: the threshold is less than c
        # below it. Reading the entries for it costs less than the passes it saves.
        steep = (total > _STEEP * columns.c) & ~done & (known & _TOPPED == 0)
        at_least = lax.cond(jnp.any(steep), beside, lambda: floor)
        following = _choose(steep, _larger(newton, at_least), following)

        left = trial[0] + jnp.maximum(below - rounded - slack, 0) / slope
        left = left - jnp.abs(left) * (4 * eps)
        lower = jnp.where(trial[0] > search.left, search.left, columns.floor)
        left = jnp.where(feasible | ~(left > lower), lower, left)
        following = _larger(following, (left, zero))
        # Ask the norm itself before shrinking a column that may be inside.
        ask = ~outside & ~asked & (feasible & (near | ~(_gap(newton, floor) > 0)) | late)
        following = _choose(ask, floor, following)
        following = _choose(passes == _PASSES, (jnp.full_like(zero, info.max), zero), following)
        following = _choose(jnp.isnan(excess), (excess, excess), following)
        bits = (
            (_OUTSIDE, outside | asked),
            (_INSIDE, inside),
            (_DOUBTFUL, asked & ~inside),
            (_DONE, done),
            (_CROSSED, feasible),
            (_TOPPED, steep),
        )
        for bit, holds in bits:
            known |= jnp.where(holds, bit, 0)
        following = _choose(done & ~jnp.isnan(excess), trial, following)
        return _Search(following, left, known, passes)

    start = jnp.where((start > columns.floor) & (start < jnp.inf), start, columns.floor)
    known = jnp.where(columns.outside, _OUTSIDE, 0) | jnp.where(columns.free, _INSIDE | _DONE, 0)
    search = _Search((start, zero), columns.floor, known, jnp.int32(0))
    search = lax.while_loop(unfinished, step, search)
    doubtful = search.known & _DOUBTFUL > 0

    def decided() -> tuple[Pair, jax.Array]:
        inside = _inside(columns, doubtful, axes)
        return _choose(inside, floor, search.trial), jnp.where(inside, _INSIDE, 0) | search.known

    trial, known = lax.cond(jnp.any(doubtful), decided, lambda: (search.trial, search.known))
    return search._replace(trial=trial, known=known)


def _beside(a: Arrays, slope: Arrays | None, c: jax.Array, axes: Axes, rows: Rows) -> Pair:
    """The largest threshold that leaves some magnitude at c: left of the root."""
    most = jnp.full_like(c, jnp.finfo(c.dtype).max)
    if slope is None:
        top = rows.max(_max(a, axes))
        beside = _shift((top, jnp.zeros_like(top)), -c)
    else:
        keys = ((x - c) / g for x, g in zip(a, slope, strict=True))
        top = rows.max(_max(tuple(keys), axes, initial=-float(jnp.finfo(c.dtype).max)))
        beside = top - jnp.abs(top) * (4 * float(jnp.finfo(c.dtype).eps)), jnp.zeros_like(top)
    return _choose(top < jnp.inf, beside, (most, jnp.zeros_like(most)))


class _Norm(NamedTuple):
    """The norm of what soft-thresholding leaves of a column, as it will be stored.

    Attributes:
        total: The norm.
        excess: How far it is above c.
        doubt: How far rounding may have taken both from the truth.
        slope: How fast the norm falls as the threshold rises: the number of survivors.
    """

    total: jax.Array
    excess: jax.Array
    doubt: jax.Array
    slope: jax.Array


def _read(columns: _Columns, theta: Pair, axes: Axes) -> list[Arrays]:
    """What soft-thresholding leaves, and how fast it shrinks, folded."""
    # Without the barrier the compiler takes what does not depend on the threshold, a copy of all
    # entries cut into slices, out of the loop.
    entries, theta = lax.optimization_barrier((columns.entries, theta))
    pairs: list[Arrays] = []
    for i, (x, dtype) in enumerate(zip(entries, columns.dtypes, strict=True)):
        slope = () if columns.slope is None else (columns.slope[i],)

        def values(x: jax.Array, *slope: jax.Array, dtype: jnp.dtype = dtype) -> Arrays:
            over = _over(columns.magnitude(x), theta, *(slope or (None,)))
            dropped = over <= 0  # a NaN is not
            stored = _as_stored(over, dtype, columns)
            # -0.0 is what addition leaves alone: the compiler can skip instead of add.
            kept = slope[0] if slope else jnp.ones_like(over)
            return jnp.where(dropped, -0.0, stored), jnp.where(dropped, -0.0, kept)

        pairs += _fold(values, (x, *slope), axes, _plain)
    return pairs


def _survivors(columns: _Columns, theta: Pair, axes: Axes, go: jax.Array) -> _Norm:
    """The norm at a threshold, in one pass over the entries; ``go`` is true."""
    eps = float(jnp.finfo(columns.c.dtype).eps)
    sums = _total(
        lambda: _read(columns, theta, axes),
        axes,
        go,
        first=lambda norm, slope: (norm, jnp.zeros_like(norm), slope),
    )
    total, error, slope = _over_rows(sums, columns.c, columns.rows)
    # What rounds is the first fold; adding up k numbers rounds k - 1 times.
    steps = _FOLDS if columns.slope is not None else jnp.clip(slope - 1, 0, _FOLDS)
    doubt = total * steps * (eps / 2 * (1 + 2.0**-8)) + _unsure(total, columns.c, columns.rows)
    return _Norm(total, (total - columns.c) + error, doubt, slope)


def _share(columns: _Columns, theta: jax.Array, axes: Axes) -> jax.Array:
    """The largest value an entry may keep: of k infinite ones, an equal share of c."""
    info = jnp.finfo(theta.dtype)
    infinite = theta == info.max

    def share() -> jax.Array:
        ks = ((jnp.abs(x) == jnp.inf).sum(axes, keepdims=True) for x in columns.entries)
        mine: jax.Array = functools.reduce(jnp.add, ks)
        k = jnp.maximum(columns.rows.sum(mine), 1).astype(theta.dtype)
        whole = k == _power_of_two(_exponent(k))
        # Rounded down, so that k of them fit into c.
        return jnp.where(infinite, columns.c / k * jnp.where(whole, 1, 1 - info.eps), jnp.inf)

    return lax.cond(jnp.any(infinite), share, lambda: jnp.full_like(theta, jnp.inf))


def _unseen(info: jnp.finfo) -> float:
    """By how much of c a norm may be above c and still, rounded to float64, be c."""
    return 0.0 if info.bits == 64 else 2.0**-53 * (1 - 2.0**-10)


def _inside(columns: _Columns, doubtful: jax.Array, axes: Axes) -> jax.Array:
    """Which doubtful columns are in their ball, decided exactly.

    One pass in doubled precision decides nearly all. Columns still in doubt are decided layer of
    bits by layer of bits: multiples of a grid add up without rounding, in any order. A float32
    column whose norm, rounded to float64, is c counts as inside.
    """
    eps = float(jnp.finfo(columns.c.dtype).eps)
    unseen = _unseen(jnp.finfo(columns.c.dtype))
    n = _length(columns.entries, axes) * columns.rows.devices
    finer = min(2.0 ** math.ceil(math.log2(max(n, 1))) * eps / 2, 0.5)  # a grid to the last one
    last = min(eps**4, 2.0**-90)
    unit = _power_of_two(-_exponent(jnp.where(columns.c > 0, columns.c, 1)))
    radius = columns.c * unit

    def scaled(x: jax.Array) -> Arrays:  # an entry of 4 > c is outside alone
        return jnp.minimum(columns.magnitude(x) * unit, 4), jnp.zeros(x.shape, radius.dtype)

    def read() -> list[Arrays]:
        return [y for x in columns.entries for y in _fold(scaled, (x,), axes, _doubled)]

    go = jnp.any(doubtful)
    total, error = _over_rows(_total(read, axes, go), radius, columns.rows)
    c_rest = functools.reduce(jnp.add, (x * unit for x in columns.c_rest), jnp.zeros_like(error))
    depth = _FOLDS * math.log(max(n, _SLICES), _SLICES) + _FEW
    excess, doubt = (total - radius) + (error - c_rest), (depth * eps) ** 2 * total
    doubt += _unsure(total, radius, columns.rows)
    inside = doubtful & (excess + doubt <= unseen)
    doubtful &= ~inside & (excess - doubt <= unseen)

    def undecided(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        known, grid, _ = carry  # the excess is above known - 2 grid and below known + n grid
        near = doubtful & (known - 2 * grid <= unseen) & (known + n * grid > unseen)
        return jnp.any(near) & (grid > last)

    def next_layer(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        known, grid, ratio = carry
        next_grid = grid * ratio

        def layer(x: jax.Array) -> jax.Array:
            return jnp.floor((x - jnp.floor(x / grid) * grid) / next_grid) * next_grid

        entries, known = lax.optimization_barrier((columns.entries, known))
        for x in entries:
            bits = layer(jnp.minimum(columns.magnitude(x) * unit, 4))
            known = known + columns.rows.sum(bits.sum(axes, keepdims=True))
        rest = (layer(x * unit) for x in columns.c_rest)
        return functools.reduce(jnp.subtract, rest, known), next_grid, jnp.full_like(ratio, finer)

    # Nothing reaches 8, so the first layer, on a grid of eps, is all that is above it.
    start = -radius, jnp.asarray(8, radius.dtype), jnp.asarray(eps / 8, radius.dtype)
    known, _, _ = lax.while_loop(undecided, next_layer, start)
    return inside | doubtful & (known <= unseen)


def _sort(columns: _Columns, axes: Axes) -> jax.Array:
    """Algorithm 2 of the paper (Duchi et al. 2008), vmapped over columns."""

    def threshold(key: jax.Array, slope: jax.Array, c: jax.Array) -> jax.Array:
        order = jnp.argsort(-key)
        mu, g = key[order], slope[order]
        theta = (jnp.cumsum(g * mu) - c) / jnp.cumsum(g)
        p = jnp.cumprod(mu > theta).sum()
        return theta[p - 1]

    def rows(parts: Arrays) -> jax.Array:
        last = tuple(range(-len(axes), 0))
        moved = (jnp.moveaxis(x, axes, last) for x in parts)
        return jnp.concatenate(
            [x.reshape(columns.c.size, math.prod(x.shape[x.ndim - len(axes) :])) for x in moved],
            axis=1,
        )

    keys = rows(tuple(map(columns.magnitude, columns.entries)))
    if keys.size == 0:
        return columns.floor
    slopes = jnp.ones_like(keys) if columns.slope is None else rows(columns.slope)
    keys = keys / slopes
    return jax.vmap(threshold)(keys, slopes, columns.c.reshape(-1)).reshape(columns.c.shape)


def _as_stored(x: jax.Array, dtype: jnp.dtype, columns: _Columns) -> jax.Array:
    """Survivors, rounded as they will be in ``dtype``, on the scale of ``columns``."""
    if dtype == x.dtype:
        return x
    if columns.scaling is None or jnp.finfo(dtype).nexp == jnp.finfo(x.dtype).nexp:
        return round_to(x, dtype)  # a format of the same range: the scale changes no bit
    return _times(round_to(_times(x, columns.scaling.down), dtype), columns.scaling.up)


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x``, float32 or float64, rounded to nearest in ``dtype`` but still in its own.

    Not by a cast there and back, which compilers remove as an excess of precision.
    """
    if jnp.promote_types(x.dtype, dtype) == dtype:
        return x
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype != jnp.float16:
        return rounded
    # Below its normal numbers float16 is a fixed-point format, which reduce_precision leaves out.
    quantum = float(info.smallest_subnormal)
    fixed = lax.round(x / quantum, lax.RoundingMethod.TO_NEAREST_EVEN) * quantum
    return jnp.where(jnp.abs(x) < info.tiny, fixed, rounded)


def _round_down(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x``, positive, rounded towards zero in ``dtype`` but still in its own."""
    info = jnp.finfo(dtype)
    if x.dtype == dtype:
        return x
    quantum = jnp.maximum(_power_of_two(_exponent(x) - info.nmant), float(info.smallest_subnormal))
    return jnp.minimum(jnp.floor(x / quantum) * quantum, float(info.max))


# --- thresholds as unevaluated sums of two floats -------------------------------------------------


def _shift(theta: Pair, step: jax.Array) -> Pair:
    """``theta + step``, its first float the sum rounded, its second the rounding error (Knuth)."""
    small = theta[1] + step
    head = theta[0] + small
    moved = head - theta[0]
    return head, (theta[0] - (head - moved)) + (small - moved)


def _gap(a: Pair, b: Pair) -> jax.Array:
    return (a[0] - b[0]) + (a[1] - b[1])


def _larger(a: Pair, b: Pair) -> Pair:
    """The larger of two; ``b`` if ``a`` is not a number."""
    return _choose(_gap(a, b) > 0, a, b)


def _smaller(a: Pair, b: Pair) -> Pair:
    """The smaller of two; ``b`` if ``a`` is not a number."""
    return _choose(_gap(a, b) < 0, a, b)


def _choose(condition: jax.Array, a: Pair, b: Pair) -> Pair:
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


# --- the projection and its derivative ------------------------------------------------------------


class _Found(NamedTuple):
    """What the search has found of each column; enough to project its entries one by one.

    Attributes:
        theta: The threshold of the column's entries on their scale.
        inside: Whether the column is inside its ball.
        share: The largest value an entry may keep.
        scaling: The entries' scale, as in `_Columns`.
        threshold: The threshold of the parts themselves.
        passes: How many thresholds were tried.
    """

    theta: Pair
    inside: jax.Array
    share: jax.Array
    scaling: _Scaling | None
    threshold: jax.Array
    passes: jax.Array


def _find(columns: _Columns, start: jax.Array, axes: Axes, method: str) -> _Found:
    scaling = columns.scaling
    if scaling is not None:
        lowered = jnp.where(scaling.far, _times(scaling.tops[0], _reciprocal(scaling.unit)), 0)
        start = _times(start - lowered, scaling.up)
    if method == "sort":
        start = _sort(columns, axes)
    search = _search(columns, start, axes)
    theta = search.trial
    threshold = theta[0] + theta[1]
    if scaling is not None:
        threshold = lowered + _times(threshold, scaling.down)
    inside = search.known & _INSIDE > 0
    threshold = jnp.where(inside, 0, threshold)
    share = _share(columns, theta[0], axes)
    return _Found(theta, inside, share, scaling, threshold, search.passes)


def _shrunk(part: jax.Array, entry: jax.Array, slope: jax.Array | None, found: _Found) -> jax.Array:
    """A part, projected, from its entries as the search has compared them with the threshold."""
    w = _over(entry, found.theta, slope)
    if found.scaling is None:
        share = _round_down(found.share, part.dtype)
        w = jnp.where(w > share, share, w)
    else:
        w = jnp.where(found.inside, 0, _times(w, found.scaling.down))
    w = round_to(w, part.dtype)
    # Inside its ball a column has threshold 0 and survives as it is, but for what computers take
    # for zero: negative zeros and subnormal numbers. In bits, as no CPU selects 16-bit floats.
    bits = _bits(part)
    sign = bits & _bits(jnp.asarray(-0.0, part.dtype))
    rest = jnp.where(found.inside, bits, 0)
    return lax.bitcast_convert_type(
        jnp.where(w <= 0, rest, _bits(w.astype(part.dtype)) | sign), part.dtype
    )


# Operands, slope, and by column the start and the terms of the radius.
Layer = tuple[Any, Arrays | None, Arrays]
Solution = tuple[Projected, ...]  # thresholds with ``axes`` kept


@functools.partial(jax.jit, static_argnames=("make", "axes", "method", "plain"))
def _solve(
    layers: tuple[Layer, ...], make: Callable[..., Arrays], axes: Axes, method: str, plain: bool
) -> Solution:
    def on_device(layers: tuple[Layer, ...], rows: Rows) -> Solution:
        split = [part.shape == matrix.shape for part in parts]
        solutions = _solve_on_device(layers, make, axes, method, plain, rows, split)
        return tuple(
            solved._replace(passes=jnp.broadcast_to(solved.passes, solved.threshold.shape))
            for solved in solutions
        )

    parts = jax.eval_shape(make, *layers[0][0])
    matrix = max(parts, key=lambda part: part.size)
    solutions = columns_where_they_are(
        on_device, layers, matrix.shape, axes, split_rows=method != "sort"
    )
    return tuple(solved._replace(passes=jnp.max(solved.passes, initial=0)) for solved in solutions)


def _solve_on_device(
    layers: tuple[Layer, ...],
    make: Callable[..., Arrays],
    axes: Axes,
    method: str,
    plain: bool,
    rows: Rows,
    split: Sequence[bool],
) -> Solution:
    """What one device has to do; ``split`` says of which parts it holds only some rows."""
    if len(layers) == 1 and not rows.names:
        ((operands, slope, (start, *c)),) = layers
        parts = make(*operands)
        columns = _columns(parts, tuple(c), slope, axes, plain, rows)
        entries = tuple(map(columns.magnitude, columns.entries))
        return (_solution(parts, entries, columns.slope, _find(columns, start, axes, method)),)

    # The layers take turns in one loop: one computation for all, and memory for one. What the loop
    # finds of each leaves it in an array of its own, pushed through a queue: cut out of one array,
    # at a place of its own, it would make each layer's next loops a kernel to compile, where
    # layers of one shape can share them.
    by_column = jax.tree.map(lambda *x: jnp.stack(x), *(x for *_, x in layers))

    def made(operands: Any, slope: Arrays | None, _: Arrays) -> tuple[Arrays, Arrays | None]:
        return make(*operands), slope

    @jax.jit  # traced once, for its form and for the loop
    def find(i: jax.Array) -> _Found:
        start, *c = (lax.dynamic_index_in_dim(x, i, keepdims=False) for x in by_column)
        parts, slope = lax.switch(i, [functools.partial(made, *layer) for layer in layers])
        if rows.names:  # parts that all devices hold count once
            mine = rows.is_first()
            parts = tuple(
                x if own else jnp.where(mine, x, 0) for x, own in zip(parts, split, strict=True)
            )
        return _find(_columns(parts, tuple(c), slope, axes, plain, rows), start, axes, method)

    form = jax.eval_shape(find, jax.ShapeDtypeStruct((), jnp.int32))

    def turn(i: jax.Array, queue: Arrays) -> Arrays:
        leaves = jax.tree.leaves(find(i.astype(jnp.int32)))
        values = [jnp.broadcast_to(x, form.threshold.shape) for x in leaves]
        return *queue[1:], jnp.stack([x.astype(form.threshold.dtype) for x in values])

    empty = jnp.zeros((len(jax.tree.leaves(form)), *form.threshold.shape), form.threshold.dtype)
    queue = lax.fori_loop(0, len(layers), turn, (empty,) * len(layers))
    solutions = []
    for layer, values in zip(layers, queue, strict=True):
        leaves = (
            x.astype(like.dtype) for x, like in zip(values, jax.tree.leaves(form), strict=True)
        )
        found = jax.tree.unflatten(jax.tree.structure(form), leaves)
        found = found._replace(passes=jnp.max(found.passes, initial=0))
        parts, slope = made(*layer)
        wide = tuple(x.astype(found.threshold.dtype) for x in parts)
        slopes = slope or (None,) * len(parts)
        if found.scaling is None:
            entries = tuple(_magnitude(x, slope is not None) for x in wide)
        else:
            entries = tuple(map(found.scaling.magnitude, wide, slopes))
        solutions.append(_solution(parts, entries, slope, found))
    return tuple(solutions)


def _solution(parts: Arrays, entries: Arrays, slope: Arrays | None, found: _Found) -> Projected:
    slopes = slope or (None,) * len(parts)
    results = tuple(map(functools.partial(_shrunk, found=found), parts, entries, slopes))
    return Projected(results, found.threshold, found.inside, found.passes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _project(
    layers: tuple[Layer, ...], make: Callable[..., Arrays], axes: Axes, method: str, plain: bool
) -> Solution:
    return _solve(layers, make, axes, method, plain)


@_project.defjvp
def _project_jvp(
    make: Callable[..., Arrays], axes: Axes, method: str, plain: bool, primals: Any, tangents: Any
) -> tuple[Solution, Any]:
    (layers,), (dlayers,) = primals, tangents
    solutions = _project(layers, make, axes, method, plain)
    dsolutions = []
    for (operands, slope, _), (doperands, dslope, (_, *dc)), solution in zip(
        layers, dlayers, solutions, strict=True
    ):
        parts, dparts = jax.jvp(make, operands, doperands)
        dresults = _tangents(parts, dparts, dc, slope, dslope, solution, axes)
        nothing: tuple[Any, ...] = (
            jnp.zeros_like(solution.threshold),
            np.zeros(solution.inside.shape, jax.dtypes.float0),
            np.zeros(solution.passes.shape, jax.dtypes.float0),
        )
        dsolutions.append(Projected(dresults, *nothing))
    return solutions, tuple(dsolutions)


def _tangents(
    parts: Arrays,
    dparts: Arrays,
    dc: Sequence[jax.Array],
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
    dtype = jnp.result_type(jnp.float32, *parts)
    results, _, inside, _ = solution
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

    radius = functools.reduce(jnp.add, (t.astype(dtype) for t in dc))
    weight = over_support(slopes)
    dtheta = (over_support(free) - radius) / jnp.where(weight > 0, weight, 1)
    return tuple(
        jnp.where(inside, dv, jnp.where(s, sign * (e - g * dtheta), 0).astype(dv.dtype))
        for dv, s, sign, e, g in zip(dparts, support, signs, free, slopes, strict=True)
    )
