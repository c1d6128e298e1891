"""The projection as one GPU kernel; not on the default path, as no GPU was at hand to measure it.

JAX 0.11 deprecated the backend that compiles it, Triton: the kernel moves to Mosaic GPU, or goes.

A program of the grid projects a block of columns: it searches for their thresholds by rereading
the block in chunks of rows, from L2 while it fits there, and writes it once. In six lines:

1. A pass adds up the survivors: their multiples of a grid, exactly in any order, and the rest.
2. A column whose sum is surely at most c at threshold 0 is inside its ball: left as it is.
3. A threshold's survivors plus k times the threshold surely above c: the column is outside.
4. Newton's step, or half as far again as an exponential tail needs, leads to the next threshold.
5. One that leaves the bracket gives way to Newton's from the left, and that to the middle.
6. Accept a threshold only if the sum of what will be stored is surely at most c, and barely.

What is not certain after `_PASSES` passes, and what is not finite, is left to `_projection`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import ArrayLike

from l1inf_optax import _projection
from l1inf_optax._projection import Pair, _choose, _gap, _larger, _shift, _smaller

_PASSES = 40
_EPS = 2.0**-23
_UNKNOWN, _OUTSIDE, _INSIDE, _PROJECTED, _UNDECIDED = range(5)


class Attempt(NamedTuple):
    """What the kernel has made of the columns.

    Attributes:
        projected: Their projections, of the shape and dtype of the input.
        threshold: Their thresholds, float32, zero where a column was inside its ball.
        undecided: Columns the kernel left as they were and that are to be projected otherwise.
    """

    projected: jax.Array
    threshold: jax.Array
    undecided: jax.Array


def project(
    x: jax.Array, c: ArrayLike, start: jax.Array | None = None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Projects every column of a matrix onto the L1 ball of radius ``c``, on a GPU.

    Keeps the promises of :func:`l1inf_optax.projection_l1inf_ball` but has no derivative.
    One undecided column costs another projection of the whole matrix, by XLA.

    Args:
        x: Matrix, not empty; float16, bfloat16 or float32.
        c: Radius, positive; a scalar or one value for each column.
        start: ``None`` or a guess of the thresholds, such as those of similar columns.
        interpret: Runs the kernel as ordinary JAX, on any device.

    Returns:
        The projection and the thresholds.

    Raises:
        ValueError: ``x`` is not such a matrix, ``c`` is not positive or of another shape.
    """
    first = attempt(x, c, start, interpret=interpret)

    def again() -> tuple[jax.Array, jax.Array]:
        threshold = jnp.where(first.undecided, 0, first.threshold)
        exact = _projection.project_columns((x,), c, (0,), start=threshold)
        projected = jnp.where(first.undecided, exact.parts[0], first.projected)
        return projected, jnp.where(first.undecided, exact.threshold, first.threshold)

    return lax.cond(jnp.any(first.undecided), again, lambda: (first.projected, first.threshold))


def attempt(
    x: jax.Array,
    c: ArrayLike,
    start: jax.Array | None = None,
    *,
    block_rows: int = 256,
    block_columns: int = 16,
    interpret: bool = False,
) -> Attempt:
    """Projects the columns of a matrix of which the kernel is certain.

    Args:
        x: As in :func:`project`.
        c: As in :func:`project`.
        start: As in :func:`project`.
        block_rows: Rows in a chunk, a power of two.
        block_columns: Columns of a program, a power of two.
        interpret: As in :func:`project`.

    Returns:
        The projections, the thresholds and which columns are undecided.

    Raises:
        ValueError: as :func:`project`.
    """
    if x.ndim != 2 or x.size == 0 or x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"x has shape {x.shape} and dtype {x.dtype}: "
            "give a matrix with entries, float16, bfloat16 or float32"
        )
    m = x.shape[1]
    radius = _projection._constant(c, jnp.dtype(jnp.float32), (m,))[0]
    if radius.dtype != jnp.float32:
        radius = _projection._terms(radius, jnp.dtype(jnp.float32), jnp)[0]
    guess = jnp.float32(0) if start is None else start.astype(jnp.float32)
    guess = jnp.where((guess > 0) & (guess < jnp.inf), guess, 0)
    projected, threshold, status = pl.pallas_call(
        functools.partial(_kernel, rows=block_rows, columns=block_columns, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((m,), jnp.float32),
            jax.ShapeDtypeStruct((m,), jnp.int32),
        ),
        grid=(pl.cdiv(m, block_columns),),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
    )(x, jnp.broadcast_to(radius, (m,)), jnp.broadcast_to(guess, (m,)))
    return Attempt(projected, threshold, (status != _INSIDE) & (status != _PROJECTED))


class _Search(NamedTuple):
    """State of the search; the thresholds are pairs and bracket the roots of outside columns.

    Attributes:
        theta: The threshold to try next; the answer of a column that is projected.
        low: The largest threshold known to be too small.
        high: The smallest one known to be large enough.
        left: Newton's step from the left.
        status: What is known of the columns.
        passes: How many thresholds were tried.
    """

    theta: Pair
    low: Pair
    high: Pair
    left: Pair
    status: jax.Array
    passes: jax.Array


def _kernel(  # type: ignore[no-untyped-def]
    x_ref, c_ref, start_ref, projected_ref, threshold_ref, status_ref, *, rows, columns, interpret
) -> None:
    n, m = x_ref.shape
    dtype = x_ref.dtype
    eps = float(jnp.finfo(dtype).eps)
    chunks = pl.cdiv(n, rows)
    block = pl.ds(pl.program_id(0) * columns, columns)
    exists = pl.program_id(0) * columns + jnp.arange(columns) < m
    c = plgpu.load(c_ref.at[block], mask=exists, other=1.0)
    start = plgpu.load(start_ref.at[block], mask=exists, other=0.0)

    # Of a radius of ordinary size the grid is the unit in the last place.
    least, most = _projection._PLAIN_RADII
    plain = (c >= least) & (c <= most)
    exponent = _projection._exponent(jnp.where(plain, c, 1))
    grid = _projection._power_of_two(exponent - 23)
    per_grid = _projection._power_of_two(23 - exponent)

    def chunk(i: jax.Array) -> tuple[tuple[slice | pl.Slice, ...], jax.Array]:
        inside = i * rows + jnp.arange(rows) < n
        return (pl.ds(i * rows, rows), block), inside[:, None] & exists[None, :]

    def load(i: jax.Array) -> jax.Array:
        at, mask = chunk(i)
        return plgpu.load(x_ref.at[at], mask=mask, other=0.0)

    def stored(x: jax.Array, theta: Pair) -> jax.Array:
        """The magnitudes that stay, rounded as they will be in memory."""
        over = (jnp.abs(x.astype(jnp.float32)) - theta[0][None]) - theta[1][None]
        if interpret:  # XLA removes casts there and back; Triton keeps them, and knows no other way
            over = _projection.round_to(over, dtype)
        return jnp.where(over <= 0, 0.0, over.astype(dtype).astype(jnp.float32))  # keeps a NaN

    def sums(theta: Pair) -> tuple[jax.Array, ...]:
        def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            coarse, rest, count, top = carry
            x = load(i)
            w = stored(x, theta)
            # Numbers far above c need not be on the grid, as their sums decide nothing.
            on_grid = jnp.floor(jnp.minimum(w * per_grid[None], 2.0**26)) * grid[None]
            top = jnp.maximum(top, jnp.abs(x.astype(jnp.float32)))
            return coarse + on_grid, rest + (w - on_grid), count + jnp.where(w > 0, 1.0, 0.0), top

        zeros = jnp.zeros((rows, columns), jnp.float32)
        coarse, rest, count, top = lax.fori_loop(0, chunks, add, (zeros,) * 4)
        return coarse.sum(0), rest.sum(0), count.sum(0), top.max(0)

    # Sums of multiples of the grid are exact up to 2^24 of them, which is above c; one that is
    # larger stays so. What is left of an entry meets fewer additions than there are chunks and
    # rows. What underflows in them is invisible beside c in float64.
    doubt = (chunks + rows + 4) * _EPS
    units = (1.0, 3.0) if dtype == jnp.float32 else (0.25, 2.0)
    aim, slack = (unit * eps * c for unit in units)
    # Survivors that underflow in float16 may have grown by half of this.
    quantum = float(jnp.finfo(dtype).smallest_subnormal) if dtype == jnp.float16 else 0.0

    def step(search: _Search) -> _Search:
        theta = search.theta
        coarse, rest, count, top = sums(theta)
        total = coarse + rest
        excess = (coarse - c) + rest * (1 + doubt)  # at least the true one
        feasible, unshrunk = excess <= 0, theta[0] <= 0

        height = jnp.maximum((theta[0] + theta[1]) * (1 - 2.0**-20) - quantum, 0)
        norm = (coarse - c) + rest * (1 - doubt) + count * height
        margin = 4 * grid + jnp.where(unshrunk, 0, total * eps)  # c's last bits, and rounded w
        outside = (search.status == _OUTSIDE) | (norm > margin) | (top > 2 * c)
        hopeless = ~(top < jnp.inf) | jnp.isnan(excess)
        status = jnp.where(outside, _OUTSIDE, _UNKNOWN)
        status = jnp.where(outside & feasible & (excess >= -slack), _PROJECTED, status)
        certain = jnp.where(feasible, _INSIDE, _UNDECIDED)
        status = jnp.where(unshrunk & ~outside, certain, status)
        status = jnp.where(hopeless, _UNDECIDED, status)
        done = search.status >= _INSIDE
        status = jnp.where(done, search.status, status)

        nothing = jnp.zeros_like(c)
        low = _larger(_shift((top, nothing), -c), search.low)
        low = _choose(feasible, low, _larger(theta, low))
        high = _smaller((top, nothing), search.high)
        high = _choose(feasible, _smaller(theta, high), high)
        gain = (excess + aim) / count
        newton = _shift(theta, gain)
        left = _choose(feasible, search.left, _larger(newton, search.left))
        # If the tail falls exponentially the root is log(norm / c) times norm / slope away.
        tail = total / count * jnp.log(total / c)
        following = _choose(excess > c / 4, _shift(theta, (gain + tail) / 2), newton)

        def between(theta: Pair) -> jax.Array:
            return (_gap(theta, low) > 0) & (_gap(high, theta) > 0)

        other = _choose(between(left), left, _shift(low, _gap(high, low) / 2))
        following = _choose(between(following), following, other)
        following = _choose(outside, following, (nothing, nothing))
        theta = _choose(status >= _INSIDE, theta, following)
        return _Search(theta, low, high, left, status, search.passes + 1)

    zero = jnp.zeros_like(c)
    search = _Search(
        theta=(start, zero),
        low=(zero, zero),
        high=(jnp.full_like(c, jnp.inf), zero),
        left=(zero, zero),
        status=jnp.where(plain, jnp.where(exists, _UNKNOWN, _INSIDE), _UNDECIDED),
        passes=jnp.int32(0),
    )
    search = lax.while_loop(
        lambda search: (jnp.min(search.status) < _INSIDE) & (search.passes < _PASSES), step, search
    )
    shrunk = search.status == _PROJECTED

    def write(i: jax.Array, _: None) -> None:
        x, (at, mask) = load(i), chunk(i)
        w = stored(x, search.theta)
        w = jnp.where((x < 0) & (w > 0), -w, w).astype(dtype)
        plgpu.store(projected_ref.at[at], jnp.where(shrunk[None, :], w, x), mask=mask)

    lax.fori_loop(0, chunks, write, None)
    threshold = jnp.where(shrunk, search.theta[0] + search.theta[1], 0)
    plgpu.store(threshold_ref.at[block], threshold, mask=exists)
    plgpu.store(status_ref.at[block], search.status, mask=exists)
