"""Norms, thresholds and projections: arrays in, arrays out; nothing here knows a pytree.

The projection of a column v onto the L1 ball of radius c soft-thresholds it,
``w = sign(v) max(|v| - theta, 0)``. In six lines:

1. f(theta) = sum max(|v| - theta, 0) - c is convex, decreasing and piecewise linear.
2. One pass over the entries gives f and its slope; the first at an earlier threshold, or at 0.
3. f(0) <= 0, whatever rounding can hide, means inside the ball: the column is left as it is.
4. Newton's step, theta += f(theta) / #{|v| > theta}, lands left of the root from either side.
5. Far from the root it goes half as far again as an exponential tail would need.
6. Stop at the first theta near the root where f plus all that rounding can hide is f <= 0.

With a metric d the minimiser of ``sum d (w - v)^2`` is ``sign(v) max(|v| - theta g, 0)`` with
``g = 1 / d``: the same iteration, each entry with slope g.

The rooms, each of which knows only those before it:

| room | what happens there |
| --- | --- |
| `floats` | sums of two floats, powers of two, rounding to a format |
| `arguments` | what is wrong is said before anything is compiled |
| `xla_cpu` | what the CPU's compiler has to be told, the plain form beside it |
| `sums` | column sums in doubled precision, on one device or many |
| `columns` | magnitudes, their scale, how fast they shrink |
| `measure` | a threshold's norm, excess, doubt and slope, in one pass |
| `judge` | what a measurement says of a column, and where to look next |
| `search` | Newton's method: from measurements to the threshold |
| `sort` | Algorithm 2 of the paper |
| `shrink` | from thresholds to projected entries |
| `threshold` | columns in, thresholds out: what an answer has to meet, and the search for it |
| `batch` | layers that share a search, on the devices that hold them |
| `derivative` | the optimality conditions, differentiated |
| `requests` | the columns of many layers, each with its radius |
| here | the public functions |

The words: a *part* is one of the arrays a column is split over (a bias, a kernel); an *entry* is a
number in it; a *survivor* an entry above the threshold; *slope* how fast an entry, or a norm,
shrinks as the threshold rises; *excess* how far a norm is above c; *doubt* how far rounding may
have taken it from the truth; *shortfall* how far below c is near enough; a *pass* one reading of
all entries. In signatures ``*columns`` is the shape of a layer whose axes that a column runs along
have length 1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from l1inf_optax._projection.arguments import floating, normalise_axes
from l1inf_optax._projection.requests import project_columns
from l1inf_optax._projection.sums import column_norms


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
    array = floating(x)
    axes = normalise_axes(axis, array.ndim)
    return jnp.max(column_norms(array, axes), initial=0)


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
    absolute values of a column, added up in float64, are at most ``c``. Infinite entries take the
    limit (``k`` of them share ``c`` equally); a NaN makes its own column NaN and no other.

    A column inside its ball is returned bit for bit. One whose norm is within rounding of ``c``, 8
    units in the last place of a float32, counts as on the sphere: its last bits may move, its zeros
    do not. 16-bit results are rounded towards zero. What is subnormal (below 1.2e-38 in float32)
    counts as zero, as processors read it; an entry above 1e38 times ``c`` may count as infinite.

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
            that, and so does an entry above 2^60 times ``c``.
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
    array = floating(x)
    axes = normalise_axes(axis, array.ndim)
    weights = None if metric is None else (floating(metric, "metric"),)
    return project_columns((array,), c, axes, metric=weights, method=method).parts[0]
