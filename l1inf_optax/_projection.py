"""Norms, thresholds and projections: arrays in, arrays out; nothing here knows a pytree.

The projection of a column v onto the L1 ball of radius c soft-thresholds it,
``w = sign(v) max(|v| - theta, 0)``. In six lines:

1. Scale the column by a power of two so that 1 <= c < 2. Inside the ball already? Then leave it.
2. f(theta) = sum max(|v| - theta, 0) - c is convex, decreasing and piecewise linear.
3. Start left of its root, at max(0, max|v| - c, (sum|v| - c) / n).
4. Newton's step, theta += f(theta) / #{|v| > theta}, climbs to the root and does not pass it.
5. Near the root evaluate f without rounding, by splitting every entry into bits that add exactly.
6. Stop at the first theta near the root whose result, as rounded, is inside: f(theta) <= 0.

Theta is an unevaluated sum of two floats. One is too coarse: a million entries just above the
threshold would each be wrong by half a unit in its last place, their sum by some per cent.
``(|v| - theta_1) - theta_2`` keeps every entry right to its own last bits.

With a metric d the minimiser of ``sum d (w - v)^2`` is ``sign(v) g max(|v| d - theta, 0)`` with
``g = 1 / d``: the same iteration, each entry with slope g.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]
Pair = tuple[jax.Array, jax.Array]

METHODS = ("newton", "sort")

# Every pass of Newton's method divides excess times slope by four or more, and their product
# starts below n^2 c. So in exact arithmetic log2(n) + 5 passes reach an excess of c / 1000, and
# with a metric as many more as its largest ratio has factors of four; real data takes 3 to 8.
# Rounding has no such theorem: past this number of passes every other one bisects, and the search
# ends after `_PASSES`, with a feasible column, whatever happens.
_NEWTON_PASSES = 24
_PASSES = 160
_LARGEST_WEIGHT = 2.0**60
_BLOCK = 32


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

    ``"newton"`` costs 10 to 20 passes over ``x``, linear in its size. ``"sort"`` is the paper's
    Algorithm 2 (Duchi et al. 2008), the readable reference; XLA's sort makes it ten to a hundred
    times slower. Both agree to rounding error.

    Args:
        x: Array of any shape, float16, bfloat16, float32 or float64.
        c: Radius, positive, ``inf`` for no constraint; a scalar or one value for each column
            (the shape of ``x`` without ``axis``).
        axis: The axis or axes a column runs along; every other axis is a column index.
        metric: ``None`` or the weights d, of the shape of ``x``, positive and finite. Only ratios
            within a column matter. A weight 2^60 times that of the entry with the largest
            ``d |v|`` counts as that, likewise one so much smaller.
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
    return project_columns((array,), c, axes, metric=weights, method=method)[0]


def project_columns(
    parts: Arrays,
    c: ArrayLike,
    axes: Axes,
    *,
    metric: Arrays | None = None,
    method: str = "newton",
) -> Arrays:
    """Projects columns that are split over several arrays, such as a kernel and its bias.

    Args:
        parts: Floating-point arrays of one rank that agree in every axis but ``axes``; a column is
            what they hold at one column index, all parts together.
        c: Radius, positive; a scalar or one value for each column.
        axes: The axes a column runs along, non-negative and sorted.
        metric: ``None`` or weights in the shapes of ``parts``.
        method: ``"newton"`` or ``"sort"``.

    Returns:
        The projected parts, in the shapes and dtypes of ``parts``.

    Raises:
        ValueError: as :func:`projection_l1inf_ball`.
    """
    check_method(method)
    for part in parts:
        _floating(part, "the array")
    if metric is not None:
        for part, weights in zip(parts, metric, strict=True):
            if weights.shape != part.shape:
                raise ValueError(
                    f"metric has shape {weights.shape}, but x has shape {part.shape}: "
                    "give one weight for each entry"
                )
    dtype = jnp.result_type(jnp.float32, *parts)
    columns = tuple(n for i, n in enumerate(parts[0].shape) if i not in axes)
    constant = _constant(c, dtype, columns)
    constant = tuple(jnp.expand_dims(jnp.broadcast_to(term, columns), axes) for term in constant)
    return _project(parts, constant, metric, axes, method)


# --- what is wrong is said before anything is compiled --------------------------------------------


def _floating(x: ArrayLike, name: str = "x") -> jax.Array:
    array = jnp.asarray(x)
    if array.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(
            f"{name} has dtype {array.dtype}: convert it to float16, bfloat16, float32 or float64"
        )
    return array


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


def check_radius(c: ArrayLike) -> None:
    """Raises a ValueError if ``c`` is known now (not traced) and not a positive number."""
    try:
        positive = bool(np.all(np.asarray(c) > 0))
    except jax.errors.TracerArrayConversionError:
        return
    except TypeError:
        positive = False
    if not positive:
        raise ValueError(f"c={c!r} is not positive: give the largest L1 norm a column may have")


def _constant(c: ArrayLike, dtype: jnp.dtype, columns: tuple[int, ...]) -> Arrays:
    """``c`` in terms that ``dtype`` can hold; a JAX array stays whole, for its tangent's sake."""
    check_radius(c)
    if jnp.shape(c) not in ((), columns):
        raise ValueError(
            f"c has shape {jnp.shape(c)}: give a scalar, or one value for each column, {columns}"
        )
    if not isinstance(c, jax.Array):
        return tuple(map(jnp.asarray, _terms(np.asarray(c, np.float64), dtype, np)))
    if not jnp.issubdtype(c.dtype, jnp.floating):
        nearest = c.astype(dtype)
        c = jnp.where(nearest.astype(c.dtype) > c, jnp.nextafter(nearest, 0 * nearest), nearest)
    return (c,)


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


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    """Sum along ``axes``, which are kept, in blocks: rounds like `_depth` additions, not like n."""
    for axis in axes:
        x = _block_sum(x, axis)
    return x


def _block_sum(x: jax.Array, axis: int) -> jax.Array:
    n = x.shape[axis]
    if n <= 2 * _BLOCK:
        return x.sum(axis, keepdims=True)
    whole = n // _BLOCK * _BLOCK
    shape = (*x.shape[:axis], n // _BLOCK, _BLOCK, *x.shape[axis + 1 :])
    blocks = lax.slice_in_dim(x, 0, whole, axis=axis).reshape(shape).sum(axis + 1)
    rest = lax.slice_in_dim(x, whole, n, axis=axis).sum(axis, keepdims=True)
    return _block_sum(blocks, axis) + rest


def _length(parts: Arrays, axes: Axes) -> int:
    return sum(math.prod(part.shape[axis] for axis in axes) for part in parts)


def _depth(parts: Arrays, axes: Axes) -> int:
    """How many roundings an entry may meet in `_total`."""

    def along(n: int) -> int:
        return n if n <= 2 * _BLOCK else _BLOCK + 1 + along(n // _BLOCK)

    return len(parts) + max(sum(along(part.shape[axis]) for axis in axes) for part in parts)


def _layer(parts: Arrays, grid: ArrayLike, axes: Axes) -> tuple[jax.Array, Arrays]:
    """The sum of non-negative entries rounded down to multiples of ``grid``, and what is left.

    Multiples of a power of two that add up to less than 2 / eps of it add without rounding, in any
    order: the sum has the same bits on every device and under every compiler.
    """
    coarse = tuple(jnp.floor(x / grid) * grid for x in parts)
    return _total(coarse, axes), tuple(x - y for x, y in zip(parts, coarse, strict=True))


def _total(parts: Arrays, axes: Axes) -> jax.Array:
    return functools.reduce(jnp.add, (_sum(x, axes) for x in parts))


def _max(parts: Arrays, axes: Axes, initial: float = 0) -> jax.Array:
    return functools.reduce(
        jnp.maximum, (jnp.max(x, axis=axes, keepdims=True, initial=initial) for x in parts)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _column_norms(x: jax.Array, axes: Axes) -> jax.Array:
    """L1 norms of the columns, correctly rounded but for the last bit's last doubt."""
    a = jnp.abs(x.astype(jnp.result_type(x, jnp.float32)))
    rough = _sum(a, axes)
    info = jnp.finfo(a.dtype)
    usable = (rough > info.tiny / info.eps) & (rough < jnp.inf)
    grid = _power_of_two(_exponent(jnp.where(usable, rough, 1))) * (2 * info.eps)
    coarse, rest = _layer((a,), grid, axes)
    return jnp.squeeze(jnp.where(usable, coarse + _total(rest, axes), rough), axes)


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


# --- columns on one scale -------------------------------------------------------------------------


class _Columns(NamedTuple):
    """Columns scaled so that 1 <= c < 2, and lowered by their maximum where that is far above c.

    Lowering keeps the bits that matter. Where |v| is a billion times c, every entry of the support
    lies within c of the maximum, and the difference of two such floats is exact. With a metric
    nothing is lowered, and the result is that of a metric whose last bits differ.

    Attributes:
        magnitude: |v|, one array for each part; scaled, not lowered.
        key: What is compared with the threshold: the magnitude, lowered, or |v| d on a scale of
            its own.
        slope: How fast a survivor shrinks as the threshold rises, one array for each part; None
            where every slope is 1.
        top: The largest key.
        lowered: Whether the keys were lowered.
        c: The radius, scaled.
        c_rest: What the float ``c`` leaves out of the radius, in terms of falling size.
        scale: Two powers of two that take a value to this scale; their product could overflow.
        unscale: Their reciprocals.
        outside: Columns that hold an infinity.
        free: Columns without a constraint, c = inf.
        dtypes: The dtype of each part.
    """

    magnitude: Arrays
    key: Arrays
    slope: Arrays | None
    top: jax.Array
    lowered: jax.Array
    c: jax.Array
    c_rest: Arrays
    scale: Pair
    unscale: Pair
    outside: jax.Array
    free: jax.Array
    dtypes: tuple[jnp.dtype, ...]


def _columns(parts: Arrays, c: Arrays, metric: Arrays | None, axes: Axes) -> _Columns:
    dtype = jnp.result_type(jnp.float32, *parts)
    info = jnp.finfo(dtype)
    head, *rest = [*_terms(c[0], dtype, jnp), *c[1:]] if c[0].dtype != dtype else c
    radius = jnp.clip(head, 0, info.max)  # a NaN stays one
    exponent = _exponent(jnp.maximum(radius, info.tiny))
    scale = _scale(-exponent)

    a = tuple(jnp.abs(part.astype(dtype)) for part in parts)
    infinite = _max(a, axes) == jnp.inf
    # Beside an infinity every finite entry is nothing.
    a = tuple(jnp.where(infinite, jnp.where(x == jnp.inf, info.max, 0), x) for x in a)
    largest = _max(a, axes)
    magnitude = tuple(_rescale(x, scale) for x in a)
    if metric is None:
        slope, lowered = None, largest > 2 * radius
        key = tuple(
            jnp.where(lowered, _times(x - largest, scale), y)
            for x, y in zip(a, magnitude, strict=True)
        )
        top = jnp.where(lowered, 0, _rescale(largest, scale))
    else:
        lowered = jnp.zeros_like(infinite)
        key, slope = _weigh(a, largest, exponent, metric, axes)
        top = _max(key, axes)
    return _Columns(
        magnitude=magnitude,
        key=key,
        slope=slope,
        top=top,
        lowered=lowered,
        c=_times(radius, scale),
        c_rest=tuple(_times(x, scale) for x in rest),
        scale=scale,
        unscale=_scale(exponent),
        outside=infinite,
        free=jnp.isposinf(head),
        dtypes=tuple(part.dtype for part in parts),
    )


def _rescale(a: jax.Array, scale: Pair) -> jax.Array:
    """``a`` times the scale, subnormal numbers included, which CPUs and TPUs read as zero."""
    info = jnp.finfo(a.dtype)
    lowest = info.minexp - info.nmant  # a subnormal number is an integer times 2^lowest
    integer = lax.bitcast_convert_type(a, jnp.dtype(f"int{info.bits}")).astype(a.dtype)
    tiny = integer * (scale[0] * 2.0 ** (lowest // 2)) * (scale[1] * 2.0 ** (lowest - lowest // 2))
    return jnp.where(a < info.tiny, tiny, _times(a, scale))


def _weigh(
    a: Arrays, largest: jax.Array, exponent: jax.Array, metric: Arrays, axes: Axes
) -> tuple[Arrays, Arrays]:
    """|v| d, scaled so that the largest is about 1, and the slope that takes it to c's scale."""
    info = jnp.finfo(largest.dtype)

    def unit(parts: Arrays, largest: jax.Array) -> tuple[jax.Array, Arrays]:
        """The parts with their largest entry brought to [1, 2), and its exponent."""
        exponent = _exponent(jnp.maximum(largest, info.tiny))
        return exponent, tuple(_rescale(x, _scale(-exponent)) for x in parts)

    own, a = unit(a, largest)
    d = tuple(weights.astype(info.dtype) for weights in metric)
    _, d = unit(d, _max(d, axes))
    heaviest = _max(tuple(x * y for x, y in zip(a, d, strict=True)), axes)
    heaviest = jnp.maximum(heaviest, info.tiny)
    d = tuple(jnp.clip(x / heaviest, 1 / _LARGEST_WEIGHT, _LARGEST_WEIGHT) for x in d)
    # The minima keep the compiler from fusing these products into an addition that follows: it
    # would round once where another copy of the same product rounds twice.
    key = tuple(jnp.minimum(x * y, info.max) for x, y in zip(a, d, strict=True))
    up = _scale(own - exponent)
    return key, tuple(jnp.minimum(_times(1 / x, up), info.max) for x in d)


# --- the threshold --------------------------------------------------------------------------------


class _Search(NamedTuple):
    """State of the search for the threshold.

    Attributes:
        trial: The threshold to try next.
        low: The largest one known to leave the column outside.
        high: The smallest one known to bring it inside; where ``done``, the answer.
        done: Columns that have their answer.
        passes: How many thresholds were tried.
    """

    trial: Pair
    low: Pair
    high: Pair
    done: jax.Array
    passes: jax.Array


def _inside(columns: _Columns, axes: Axes) -> jax.Array:
    """Whether a column is in its ball, decided exactly, layer of bits by layer of bits.

    The multiples of a grid that the entries hold add up without rounding; what lies below the grid
    adds up to less than n times the grid. Most columns are decided by the first layer. A float32
    column whose norm, rounded to float64, is c counts as inside.
    """
    eps = float(jnp.finfo(columns.c.dtype).eps)
    unseen = 2.0**-53 * (1 - 2.0**-10) if eps > 2.0**-52 else 0.0
    n = _length(columns.magnitude, axes)
    finer = min(2.0 ** math.ceil(math.log2(max(n, 1))) * eps / 2, 0.5)  # a grid to the last one
    last = min(eps**4, 2.0**-90)
    magnitude = tuple(jnp.minimum(x, 4) for x in columns.magnitude)  # 4 > c is outside by itself

    def undecided(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        known, grid = carry  # the excess is above known - 2 grid and below known + n grid
        near = (known - 2 * grid <= unseen) & (known + n * grid > unseen)
        return jnp.any(near) & (grid > last)

    def next_layer(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        known, grid = carry
        next_grid = grid * finer

        def layer(x: jax.Array) -> jax.Array:
            return jnp.floor((x - jnp.floor(x / grid) * grid) / next_grid) * next_grid

        known = known + _total(tuple(map(layer, magnitude)), axes)
        return functools.reduce(jnp.subtract, map(layer, columns.c_rest), known), next_grid

    first, _ = _layer(magnitude, eps, axes)
    grid = jnp.asarray(eps, columns.c.dtype)
    known, _ = lax.while_loop(undecided, next_layer, (first - columns.c, grid))
    return columns.free | ((known <= unseen) & ~columns.outside)


def _survivors(columns: _Columns, theta: Pair) -> Arrays:
    """What soft-thresholding leaves of the magnitudes, not yet rounded to the parts' dtypes."""
    over = tuple((x - theta[0]) - theta[1] for x in columns.key)
    if columns.slope is not None:
        over = tuple(x * g for x, g in zip(over, columns.slope, strict=True))
    return tuple(jnp.maximum(x, 0) for x in over)


def _slope(columns: _Columns, survivors: Arrays, axes: Axes) -> jax.Array:
    """How fast the norm falls as the threshold rises: the number of survivors, or their slopes."""
    slope = columns.slope or tuple(jnp.ones_like(x) for x in survivors)
    active = tuple(jnp.where(x > 0, g, 0) for x, g in zip(survivors, slope, strict=True))
    return _total(active, axes)


def _lower_bound(columns: _Columns, axes: Axes) -> jax.Array:
    """A threshold left of the root: no survivor is above c, nor is their mean above c / n."""
    eps = float(jnp.finfo(columns.c.dtype).eps)
    c = columns.c * (1 + 2.0**-18)  # so that rounding cannot take the bounds to the right
    if columns.slope is not None:
        lone = tuple(
            x - jnp.abs(x) * (4 * eps) - c / g
            for x, g in zip(columns.key, columns.slope, strict=True)
        )
        return jnp.maximum(_max(lone, axes, initial=-jnp.inf), 0)
    down = 1 - (_depth(columns.key, axes) + 4) * eps
    mean = (_total(columns.magnitude, axes) * down - c) / max(_length(columns.key, axes), 1)
    others = jnp.where(columns.lowered, -jnp.inf, jnp.maximum(mean, 0))
    return jnp.maximum(columns.top - c, others)


def _threshold(
    columns: _Columns, inside: jax.Array, axes: Axes, method: str
) -> tuple[Pair, jax.Array]:
    """The threshold of every column outside its ball, and how many were tried to find it."""
    low = _lower_bound(columns, axes)
    if method == "sort":
        start, passes = _sort(columns, axes), jnp.int32(0)
    else:
        start, passes = _newton(columns, jnp.where(inside, columns.top, low), axes)
    search = _certify(columns, start, low, inside, axes)
    return search.high, passes + search.passes


def _newton(columns: _Columns, start: jax.Array, axes: Axes) -> tuple[Pair, jax.Array]:
    """Newton's method with ordinary sums, up to a thousandth of c from the root."""
    most = _NEWTON_PASSES + (0 if columns.slope is None else round(math.log2(_LARGEST_WEIGHT)))

    def unfinished(carry: tuple[Pair, jax.Array, jax.Array]) -> jax.Array:
        _, close, passes = carry
        return ~jnp.all(close) & (passes < most)

    def step(carry: tuple[Pair, jax.Array, jax.Array]) -> tuple[Pair, jax.Array, jax.Array]:
        theta, close, passes = carry
        survivors = _survivors(columns, theta)
        excess = _total(survivors, axes) - columns.c
        slope = _slope(columns, survivors, axes)
        # A column that was close before this pass stays, however long its neighbours take.
        usable = ~close & (excess > 0) & (excess < jnp.inf)
        theta = _shift(theta, jnp.where(usable, excess / slope, 0))
        return theta, close | ~(excess > 2.0**-10 * columns.c), passes + 1

    carry = (start, jnp.zeros_like(start)), jnp.zeros_like(columns.lowered), jnp.int32(0)
    theta, _, passes = lax.while_loop(unfinished, step, carry)
    return theta, passes


def _sort(columns: _Columns, axes: Axes) -> Pair:
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

    keys = rows(columns.key)
    if keys.size == 0:
        return jnp.zeros_like(columns.c), jnp.zeros_like(columns.c)
    slopes = jnp.ones_like(keys) if columns.slope is None else rows(columns.slope)
    theta = jax.vmap(threshold)(keys, slopes, columns.c.reshape(-1)).reshape(columns.c.shape)
    return theta, jnp.zeros_like(theta)


def _certify(
    columns: _Columns, trial: Pair, low: jax.Array, inside: jax.Array, axes: Axes
) -> _Search:
    """The smallest threshold, but for rounding, whose rounded result is in the ball.

    Newton's method on the exact sum of the result as it will be stored. It normally ends at the
    second pass: the first finds the excess, the second confirms that it is gone. A bracket and
    bisection bound the number of passes whatever rounding does; ``high`` is feasible at all times.
    """
    info = jnp.finfo(columns.c.dtype)
    coarsest = max((jnp.finfo(dtype) for dtype in columns.dtypes), key=lambda f: f.eps)
    n = _length(columns.key, axes)
    # How far below c a result may end: a few units in the last place, and what is lost where
    # its format runs out of exponents. Aiming half a unit below c makes the next pass the last one.
    smallest = coarsest.smallest_subnormal if coarsest.dtype == jnp.float16 else coarsest.tiny
    quantum = float(smallest) * n * columns.scale[0] * columns.scale[1]
    slack = (4 if coarsest.eps == info.eps else 2) * float(coarsest.eps) * columns.c + quantum
    aim = float(info.eps) / 2

    def unfinished(search: _Search) -> jax.Array:
        return ~jnp.all(search.done) & (search.passes < _PASSES)

    def step(search: _Search) -> _Search:
        survivors = _survivors(columns, search.trial)
        excess = _excess(columns, survivors, axes)
        slope = _slope(columns, survivors, axes)
        feasible = excess <= 0
        done = search.done | (feasible & (excess >= -slack)) | jnp.isnan(excess)
        closer = ~search.done & (_gap(search.trial, search.low) > 0)
        low = _choose(closer & ~feasible, search.trial, search.low)
        closer = ~search.done & (_gap(search.high, search.trial) > 0)
        high = _choose(closer & feasible, search.trial, search.high)
        # Entries that tie round alike, so a step may change nothing: try one twice as long.
        longer = jnp.where(
            feasible, 1.0, jnp.exp2(jnp.minimum(search.passes, 20).astype(info.dtype))
        )
        newton = _shift(search.trial, longer * (excess + aim) / slope)
        between = (_gap(newton, low) > 0) & (_gap(high, newton) > 0)
        bisect = (search.passes >= _NEWTON_PASSES) & (search.passes % 2 == 1)
        middle = _shift(low, _gap(high, low) / 2)
        trial = _choose(between & ~bisect, newton, middle)
        return _Search(_choose(done, high, trial), low, high, done, search.passes + 1)

    zero = jnp.zeros_like(low)
    high = columns.top + (columns.c - columns.c), zero  # NaN if c is
    done = inside | jnp.isnan(high[0]) | (columns.c == 0)
    search = _Search(_choose(done, high, trial), (low, zero), high, done, jnp.int32(0))
    return lax.while_loop(unfinished, step, search)


def _excess(columns: _Columns, survivors: Arrays, axes: Axes) -> jax.Array:
    """How far the column's norm, as it will be stored, is above c: an upper bound, and tight."""
    eps = float(jnp.finfo(columns.c.dtype).eps)
    stored = tuple(
        jnp.minimum(_as_stored(x, dtype, columns), 4)
        for x, dtype in zip(survivors, columns.dtypes, strict=True)
    )
    coarse, rest = _layer(stored, eps, axes)
    return (coarse - columns.c) + _total(rest, axes) * (1 + (_depth(stored, axes) + 2) * eps)


def _as_stored(x: jax.Array, dtype: jnp.dtype, columns: _Columns) -> jax.Array:
    """Scaled survivors, rounded as they will be in ``dtype``."""
    if dtype == x.dtype:
        return x
    return _times(round_to(_times(x, columns.unscale), dtype), columns.scale)


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


# --- thresholds as unevaluated sums of two floats -------------------------------------------------


def _shift(theta: Pair, step: jax.Array) -> Pair:
    """``theta + step``, its first float the sum rounded, its second the rounding error (Knuth)."""
    small = theta[1] + step
    head = theta[0] + small
    moved = head - theta[0]
    return head, (theta[0] - (head - moved)) + (small - moved)


def _gap(a: Pair, b: Pair) -> jax.Array:
    return (a[0] - b[0]) + (a[1] - b[1])


def _choose(condition: jax.Array, a: Pair, b: Pair) -> Pair:
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


# --- the projection and its derivative ------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("axes", "method"))
def _solve(parts: Arrays, c: Arrays, metric: Arrays | None, axes: Axes, method: str) -> Arrays:
    columns = _columns(parts, c, metric, axes)
    inside = _inside(columns, axes)
    theta, _ = _threshold(columns, inside, axes, method)
    survivors = _survivors(columns, theta)
    results = []
    for part, survivor in zip(parts, survivors, strict=True):
        w = round_to(_times(survivor, columns.unscale), part.dtype).astype(part.dtype)
        signed = jnp.where(w == 0, 0, jnp.copysign(w, part))
        results.append(jnp.where(inside, part, signed))
    return tuple(results)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _project(parts: Arrays, c: Arrays, metric: Arrays | None, axes: Axes, method: str) -> Arrays:
    return _solve(parts, c, metric, axes, method)


@_project.defjvp
def _project_jvp(axes: Axes, method: str, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    """Differentiates the optimality conditions on the support S, where they are linear.

    There ``|w| = |v| - theta g`` and ``sum_S |w| = c``. With ``e = d|v| + theta g dd/d``, what the
    entry would do at a fixed threshold, ``dtheta = (sum_S e - dc) / sum_S g`` and
    ``d|w| = e - g dtheta``.
    """
    parts, c, metric = primals
    dparts, dc, dmetric = tangents
    results = _project(parts, c, metric, axes, method)
    dtype = jnp.result_type(jnp.float32, *parts)
    inside = functools.reduce(
        jnp.logical_and,
        (jnp.all(w == v, axis=axes, keepdims=True) for w, v in zip(results, parts, strict=True)),
    )
    support = tuple(w != 0 for w in results)
    signs = tuple(jnp.sign(v).astype(dtype) for v in parts)
    free = tuple(s * dv.astype(dtype) for s, dv in zip(signs, dparts, strict=True))
    if metric is None:
        slope: Arrays = tuple(jnp.ones_like(e) for e in free)
    else:
        d = tuple(x.astype(dtype) for x in metric)
        on_support = tuple(jnp.where(s, -x, -jnp.inf) for s, x in zip(support, d, strict=True))
        least = -_max(on_support, axes, initial=-jnp.inf)
        slope = tuple(least / x for x in d)
        free = tuple(
            e + (jnp.abs(v) - jnp.abs(w)).astype(dtype) * (dx.astype(dtype) / x)
            for e, v, w, x, dx in zip(free, parts, results, d, dmetric, strict=True)
        )

    def over_support(values: Arrays) -> jax.Array:
        return _total(tuple(jnp.where(s, x, 0) for s, x in zip(support, values, strict=True)), axes)

    radius = functools.reduce(jnp.add, (t.astype(dtype) for t in dc))
    weight = over_support(slope)
    dtheta = (over_support(free) - radius) / jnp.where(weight > 0, weight, 1)
    dresults = tuple(
        jnp.where(inside, dv, jnp.where(s, sign * (e - g * dtheta), 0).astype(dv.dtype))
        for dv, s, sign, e, g in zip(dparts, support, signs, free, slope, strict=True)
    )
    return results, dresults
