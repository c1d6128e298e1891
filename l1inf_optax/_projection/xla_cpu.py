"""What XLA's CPU compiler has to be told, each with the plain form beside it.

The CPU compiler writes one result in one loop. Asked for two sums of the same entries it makes two
loops that each read everything, and it computes an operand again in every consumer. None of what is
here changes a result; other platforms get the plain forms.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from l1inf_optax._projection.arguments import Arrays
from l1inf_optax._projection.floats import bits

Stage = Callable[[list[Arrays]], list[Arrays]]


def cut(x: jax.Array, start: int, end: int, axis: int) -> jax.Array:
    """``lax.slice_in_dim(x, start, end, axis=axis)``.

    Of 16-bit floats the compiler has no slice: it converts all of x first. Of integers it has.
    """
    if x.dtype.itemsize > 2:
        return lax.slice_in_dim(x, start, end, axis=axis)
    as_integers = lax.slice_in_dim(bits(x), start, end, axis=axis)
    return lax.bitcast_convert_type(as_integers, x.dtype)


def in_stages(
    read: Callable[[], list[Arrays]], later: Sequence[Stage], opaque_true: jax.Array
) -> list[Arrays]:
    """What the stages make of each other's results, each computed once.

    The plain form is ``reduce(lambda rows, stage: stage(rows), later, read())``. The compiler would
    make a loop of its own for every result, one that reads all entries, and repeat it for
    everything that uses the result. What a branch returns is computed once, and two results that
    are one complex number are one.

    Args:
        read: Makes the first rows: tuples of arrays, the first two of one dtype.
        later: The stages.
        opaque_true: True, in a way that the compiler cannot see: else it removes the branches.
    """

    def once(compute: Callable[[], list[Arrays]]) -> list[Arrays]:
        shapes = jax.eval_shape(compute)
        nothing = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return lax.cond(opaque_true, compute, nothing)

    def then(stage: Stage, rows: list[Arrays]) -> list[Arrays]:
        return _packed(stage(_unpacked(rows)))

    def on_cpu() -> list[Arrays]:
        rows = once(lambda: _packed(read()))
        for stage in later:
            rows = once(functools.partial(then, stage, rows))
        return _unpacked(rows)

    def elsewhere() -> list[Arrays]:
        return functools.reduce(lambda rows, stage: stage(rows), later, read())

    return lax.platform_dependent(cpu=on_cpu, default=elsewhere)


def _packed(rows: list[Arrays]) -> list[Arrays]:
    return [(lax.complex(*x[:2]), *x[2:]) for x in rows]


def _unpacked(rows: list[Arrays]) -> list[Arrays]:
    return [(x.real, x.imag, *rest) for x, *rest in rows]


def kept_in_the_loop(operands: tuple) -> tuple:
    """The operands as they are: ``operands``.

    Without the barrier the compiler takes what does not depend on the threshold, a copy of all
    entries cut into slices, out of the loop.
    """
    return lax.optimization_barrier(operands)


def not_fused(product: jax.Array) -> jax.Array:
    """The product as it is: ``product``.

    The minimum keeps the compiler from fusing it into a difference: it would round once where
    another copy of the same product rounds twice.
    """
    return jnp.minimum(product, jnp.finfo(product.dtype).max)
