"""Floats by the bit: sums of two floats, powers of two, rounding to a format.

A threshold is an unevaluated sum of two floats, a `Pair`. One float is too coarse: a million
entries just above the threshold would each be wrong by half a unit in its last place, their sum by
some per cent.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

Pair = tuple[jax.Array, jax.Array]


def wide_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """What floats of these dtypes are computed in: float64 if one of them is, else float32.

    Said outright, so that it needs no promotion: under strict promotion there is none of 16 bits.
    """
    is_double = any(jnp.finfo(dtype).bits == 64 for dtype in dtypes)
    return jax.dtypes.canonicalize_dtype(jnp.float64 if is_double else jnp.float32)


# --- unevaluated sums of two floats ---------------------------------------------------------------


def moved(theta: Pair, step: jax.Array) -> Pair:
    """``theta + step``, its first float the sum rounded, its second the rounding error (Knuth)."""
    small = theta[1] + step
    head = theta[0] + small
    virtual = head - theta[0]
    return head, (theta[0] - (head - virtual)) + (small - virtual)


def gap(a: Pair, b: Pair) -> jax.Array:
    """``a - b``, as one float."""
    return (a[0] - b[0]) + (a[1] - b[1])


def larger(a: Pair, b: Pair) -> Pair:
    """The larger of two; ``b`` if ``a`` is not a number."""
    return choose(gap(a, b) > 0, a, b)


def choose(condition: jax.Array, a: Pair, b: Pair) -> Pair:
    """``a`` where the condition holds, else ``b``."""
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


# --- powers of two --------------------------------------------------------------------------------


def exponent_of(x: jax.Array) -> jax.Array:
    """The e with 2^e <= x < 2^(e + 1), for positive normal x."""
    info = jnp.finfo(x.dtype)
    as_integer = lax.bitcast_convert_type(x, jnp.dtype(f"int{info.bits}"))
    return (as_integer >> info.nmant) - (info.maxexp - 1)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, exactly, for exponents of normal numbers."""
    info = jnp.finfo(f"float{jnp.iinfo(exponent.dtype).bits}")
    return lax.bitcast_convert_type((exponent + (info.maxexp - 1)) << info.nmant, info.dtype)


def scale_of(exponent: jax.Array) -> Pair:
    """Two powers of two whose product is 2^exponent; as one float it could overflow."""
    half = exponent // 2
    return power_of_two(half), power_of_two(exponent - half)


def reciprocal(scale: Pair) -> Pair:
    """The scale that undoes a scale."""
    return 1 / scale[0], 1 / scale[1]


def scaled(x: jax.Array, scale: Pair) -> jax.Array:
    """``x`` times the scale."""
    return x * scale[0] * scale[1]


def rescaled(a: jax.Array, scale: Pair) -> jax.Array:
    """Magnitudes times the scale, subnormal ones included, which CPUs and TPUs read as zero."""
    info = jnp.finfo(a.dtype)
    lowest = info.minexp - info.nmant  # a subnormal number is an integer times 2^lowest
    integer = lax.bitcast_convert_type(a, jnp.dtype(f"int{info.bits}")).astype(a.dtype)
    tiny = integer * (scale[0] * 2.0 ** (lowest // 2)) * (scale[1] * 2.0 ** (lowest - lowest // 2))
    return jnp.where(a < info.tiny, tiny, scaled(a, scale))


# --- rounding to a format -------------------------------------------------------------------------


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x``, float32 or float64, rounded to nearest in ``dtype`` but still in its own.

    Not by a cast there and back, which compilers remove as an excess of precision.
    """
    if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype != jnp.float16:
        return rounded
    # Below its normal numbers float16 is a fixed-point format, which reduce_precision leaves out.
    quantum = float(info.smallest_subnormal)
    fixed = lax.round(x / quantum, lax.RoundingMethod.TO_NEAREST_EVEN) * quantum
    return jnp.where(jnp.abs(x) < float(info.tiny), fixed, rounded)


def round_down(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x``, positive, rounded towards zero in ``dtype`` but still in its own."""
    info = jnp.finfo(dtype)
    if x.dtype == dtype:
        return x
    quantum = jnp.maximum(power_of_two(exponent_of(x) - info.nmant), float(info.smallest_subnormal))
    return jnp.minimum(jnp.floor(x / quantum) * quantum, float(info.max))


def terms_rounded_down(c: Any, dtype: jnp.dtype, xp: Any) -> list[Any]:
    """Three floats of ``dtype``, rounded down, that add up to ``c``: 72 bits hold float64's 53.

    Args:
        c: A wider float, of NumPy or JAX.
        dtype: The narrower format.
        xp: The module that ``c`` belongs to, `numpy` or `jax.numpy`.
    """
    terms: list[Any] = []
    for _ in range(3):
        with np.errstate(over="ignore"):
            nearest = c.astype(dtype)
        terms.append(xp.where(nearest > c, xp.nextafter(nearest, xp.zeros_like(nearest)), nearest))
        finite = xp.isfinite(terms[-1])
        c = xp.where(finite, c - xp.where(finite, terms[-1], 0), 0)
    return terms


def bits(x: jax.Array) -> jax.Array:
    """The bits of ``x`` as an unsigned integer."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
