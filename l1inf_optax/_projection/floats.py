"""Floats by the bit: sums of two floats, powers of two, rounding to a format.

A threshold is an unevaluated sum of two floats, a `Pair`. One float is too coarse: a million
entries just above the threshold would each be wrong by half a unit in its last place, their sum by
some per cent.
"""

import jax
import jax.numpy as jnp
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
    """``x``, not negative, rounded towards zero in ``dtype`` but still in its own."""
    info, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if info.bits >= own.bits:
        return x
    dropped = own.nmant - info.nmant
    rounded = lax.bitcast_convert_type((bits(x) >> dropped) << dropped, x.dtype)
    if info.nexp < own.nexp:  # below its normal numbers a format is a fixed-point format
        quantum = float(info.smallest_subnormal)
        rounded = jnp.where(x < float(info.tiny), jnp.floor(x / quantum) * quantum, rounded)
    return jnp.minimum(rounded, float(info.max))


def bits(x: jax.Array) -> jax.Array:
    """The bits of ``x`` as an unsigned integer."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
