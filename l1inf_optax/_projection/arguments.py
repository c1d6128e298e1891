"""What is wrong with an argument is said before anything is compiled."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]

METHODS = ("newton", "sort")
# Of a column, a weight or an entry above this many times the least, or the radius, counts as that.
LARGEST_WEIGHT = 2.0**60
_SHOWN = 16  # numbers that a message shows


def floating(x: ArrayLike, name: str = "x") -> jax.Array:
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


def check_radius(c: ArrayLike, columns: tuple[int, ...] | None = None, name: str = "c") -> None:
    """Raises a ValueError if ``c`` is not positive or, where these are given, does not fit columns.

    What is traced is not known yet, and passes for positive.
    """
    try:
        radii = np.asarray(1 if is_traced(c) else c)
    except (TypeError, ValueError):  # no array can be made of it
        radii = np.asarray(None)
    if not any(jnp.issubdtype(radii.dtype, kind) for kind in (np.floating, np.integer, np.bool_)):
        raise ValueError(
            f"{name}={brief(c)} is a {type(c).__name__}, not a number: give the largest L1 norm a "
            "column may have"
        )
    if not np.all(radii > 0):
        raise ValueError(
            f"{name}={brief(c)} is not positive: give the largest L1 norm a column may have"
        )
    if columns is not None and jnp.shape(c) not in ((), columns):
        raise ValueError(
            f"{name} has shape {jnp.shape(c)}: give a scalar, or one value for each column, "
            f"{columns}"
        )


def is_traced(x: Any) -> bool:
    """Whether a value is not known before the program runs."""
    return isinstance(x, jax.core.Tracer)


def check_count(name: str, number: Any, what: str, *, least: int = 0) -> None:
    """Raises a ValueError if ``number`` is known not to be a whole number from ``least`` on."""
    whole = isinstance(number, int) or jnp.issubdtype(getattr(number, "dtype", bool), jnp.integer)
    if isinstance(number, bool) or not whole or jnp.ndim(number):
        raise ValueError(f"{name}={brief(number)} is no whole number: give {what}")
    if not is_traced(number) and number < least:
        raise ValueError(f"{name}={brief(number)} is less than {least}: give {what}")


def check_share(name: str, share: Any, what: str, *, may_be_zero: bool) -> None:
    """Raises a ValueError if ``share`` is known not to be a number below 1, and from 0 on."""
    is_number = isinstance(share, int | float | np.number | np.ndarray | jax.Array)
    is_scalar = is_number and not isinstance(share, bool) and jnp.ndim(share) == 0
    if not is_scalar or (
        not is_traced(share) and not (0 < share < 1 or (may_be_zero and share == 0))
    ):
        span = "from 0 to below 1" if may_be_zero else "between 0 and 1"
        raise ValueError(f"{name}={brief(share)} is no number {span}: give {what}")


def brief(x: Any) -> str:
    """How a message shows a value: as Python does, but never a page of it."""
    leaves = jax.tree.leaves(x)
    if sum(getattr(leaf, "size", 1) for leaf in leaves) > _SHOWN:  # do not fetch them from a device
        if leaves[0] is x:
            return f"{x.dtype}[{','.join(map(str, x.shape))}]"
        return f"<{type(x).__name__} with {len(leaves)} leaves>"
    text = " ".join(repr(x).split())
    return text if len(text) <= _SHOWN * 10 else f"{text[: _SHOWN * 10]}..."


def ordinary_radii(*, is_weighted: bool) -> tuple[float, float]:
    """The least and the largest radius for which nothing needs a scale of its own.

    No sum that decides anything can overflow, no bit that decides anything can underflow, and what
    underflows is nothing beside c. With a metric `LARGEST_WEIGHT`, the largest entry there is, has
    to be at least c / eps, where float64 has eps = 2^-52.
    """
    return 2.0**-30, 2.0**7 if is_weighted else 2.0**60


def is_ordinary_radius(c: ArrayLike, *, is_weighted: bool) -> bool:
    """Whether ``c`` is known now (not traced) and of ordinary size."""
    least, most = ordinary_radii(is_weighted=is_weighted)
    try:
        radii = np.asarray(c).astype(np.float64)
    except jax.errors.TracerArrayConversionError:
        return False
    return bool(np.all((radii >= least) & (radii <= most)))


def radius(c: ArrayLike, dtype: jnp.dtype, columns: tuple[int, ...]) -> jax.Array:
    """``c`` in ``dtype``, rounded down: no column may exceed what was asked for."""
    check_radius(c, columns)
    most = float(jnp.finfo(dtype).max)
    if not isinstance(c, jax.Array):
        exact = np.asarray(c, np.float64)
        rounded = np.where(exact < np.inf, np.clip(exact, 0, most), exact).astype(dtype)
        rounded = np.where(rounded > exact, np.nextafter(rounded, np.zeros_like(rounded)), rounded)
        return jnp.asarray(rounded)
    if jnp.issubdtype(c.dtype, jnp.floating) and c.dtype.itemsize <= dtype.itemsize:
        return c.astype(dtype)
    nearest = jnp.minimum(c.astype(dtype), most)
    below = jnp.nextafter(nearest, jnp.zeros_like(nearest))
    # A difference of neighbours is exact, and so is its sum with one of them.
    step = jnp.where(nearest.astype(c.dtype) > c, below - nearest, 0)
    return jnp.where(c < jnp.inf, nearest + lax.stop_gradient(step), c.astype(dtype))
