"""The metric an optimizer steps in: how far the same gradient moves each weight.

Adam steps by ``-lr m / (sqrt(nu) + eps)``: steepest descent in the metric ``d = sqrt(nu) + eps``. A
projection after it must use the same metric, or a fixed point of both is no optimum. The metric is
not computed here a second time but read off the optimizer, whatever wraps it, in four lines:

1. Take the state before the step, its first moments zero.
2. Set its second moments so that a step with next to no gradient ends with those of the real step.
3. That step, divided by its gradient, is ``1 / d``, up to a factor for each leaf.
4. The factor is how much longer the real updates are than a step so small predicts them.

Only which fields of which state are moments is written down, in `_optimizers`. What is not known is
an error. Links without a state cannot be known by name: `_trial` finds out what they do.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l1inf_optax import _layers
from l1inf_optax._layers import Layer
from l1inf_optax._optimizers import is_euclidean, links, moments_in, with_moments

# A gradient so small that no second moment notices, and so large that its square, times what a
# running mean takes of it, is a normal number: a subnormal one would be lost on the way.
_NEXT_TO_NOTHING = 1e-15
# Beyond these, largest gradients count as these: one of 1e38 would make nothing of all others.
_SIZES = 1e-20, 1e10
_SAMPLE = 4096  # entries of a leaf that tell its factor


def slopes(
    optimizer: optax.GradientTransformationExtraArgs,
    before: Any,
    after: Any,
    grads: Any,
    updates: Any,
    params: Any,
    extra: dict[str, Any],
    layers: Sequence[Layer],
) -> Any | None:
    """How far the step just taken moves each entry for the same gradient.

    Args:
        optimizer: The optimizer.
        before: Its state before the step.
        after: Its state after the step.
        grads: What it was given.
        updates: What it returned.
        params: The parameters.
        extra: The other arguments it was given.
        layers: What is constrained. The factors between the leaves of a layer count.

    Returns:
        Pytree like ``updates``, float32 or wider: ``1 / d``, up to a factor for all leaves and the
        sign; zero where there was no step. None if all entries of a layer move alike.
    """
    alike = is_euclidean(after)
    if alike and all(len(layer.leaves) == 1 for layer in layers):
        return None
    grads, updates, params, before, after = map(_wide, (grads, updates, params, before, after))
    # Without parameters there is no weight decay, so that updates are in proportion to gradients.
    zero_params = jax.tree.map(jnp.zeros_like, params)

    def step(grads: Any, first: Any, second: Any) -> tuple[Any, Any]:
        return optimizer.update(grads, with_moments(before, first, second), zero_params, **extra)

    # It makes parameters grow: whoever keeps them positive lets it pass.
    tiny_grads = jax.tree.map(lambda g: jnp.full_like(g, -_NEXT_TO_NOTHING), grads)
    first = moments_in(before, "first")
    zero_first = jax.tree.map(jnp.zeros_like, first)
    second = moments_in(before, "second")
    uneven = has_leaf_factors(lambda g: step(g, zero_first, second)[0], grads, layers)
    if alike and not uneven:
        return None
    second_before = _moments_before(
        lambda second: moments_in(step(tiny_grads, zero_first, second)[1], "second"), after
    )
    moved = _moved(lambda g: step(g, zero_first, second_before)[0], tiny_grads, after)
    if any(name == "ScaleBySM3State" for name, _ in links(before)):
        return jax.tree.map(
            lambda u, g, x: jnp.where(g == 0, -x / _NEXT_TO_NOTHING, u / g),
            step(grads, zero_first, second_before)[0],
            grads,
            moved,
        )
    if not uneven:
        return moved
    sizes = [_largest_finite(x) for x in jax.tree.leaves((grads, first))]
    largest = jnp.clip(functools.reduce(jnp.maximum, sizes), *_SIZES)
    scale = _NEXT_TO_NOTHING / largest
    small_grads, small_first = jax.tree.map(lambda x: x * scale, (grads, first))
    linear = jax.tree.map(lambda u: u / scale, step(small_grads, small_first, second_before)[0])
    factors = jax.tree.map(_leaf_factor, updates, linear, params)
    return jax.tree.map(jnp.multiply, moved, factors)


def _moved(step: Callable[[Any], Any], tiny_grads: Any, state: Any) -> Any:
    """What a step without first moments makes of a gradient next to nothing."""
    if all(name != "AddNoiseState" for name, _ in links(state)):
        return step(tiny_grads)
    # Noise hides so small a step, but not how the step changes with the gradient.
    ones = jax.tree.map(jnp.ones_like, tiny_grads)
    changes = jax.jvp(step, (tiny_grads,), (ones,))[1]
    return jax.tree.map(lambda x: x * -_NEXT_TO_NOTHING, changes)


def _largest_finite(x: jax.Array) -> jax.Array:
    """The largest magnitude: what is not finite must not reach the factors of other leaves."""
    return jnp.max(jnp.abs(jnp.where(jnp.isfinite(x), x, 0)), initial=0)


def has_leaf_factors(step: Callable[[Any], Any], grads: Any, layers: Sequence[Layer]) -> bool:
    """Whether a kernel's updates use sums or maxima over entries that its bias's do not.

    Without them, or where all leaves share them, as a global norm, no leaf has a factor of its own.
    """
    pairs = [pair for layer in layers for pair in itertools.pairwise(layer.leaves)]

    def of_pairs(grads: Any) -> list[Any]:
        leaves, _ = _layers.flatten(step(grads))
        return [leaves[i] for pair in pairs for i in pair]

    jaxpr = jax.make_jaxpr(of_pairs)(grads).jaxpr
    used = _reductions(jaxpr, [frozenset()] * len(jaxpr.invars), itertools.count())
    return any(first != second for first, second in zip(used[::2], used[1::2], strict=True))


_Uses = frozenset[int]


def _reductions(jaxpr: Any, given: Sequence[_Uses], names: Iterator[int]) -> list[_Uses]:
    """The sums and maxima over entries that each result of a computation uses, by numbers."""
    uses = dict(zip(jaxpr.invars, given, strict=True))

    def used(x: Any) -> _Uses:
        return frozenset() if hasattr(x, "val") else uses.get(x, frozenset())

    for equation in jaxpr.eqns:
        inputs = [used(x) for x in equation.invars]
        inner = called(equation)
        if inner:  # what comes before the arguments says which branch is taken
            n = len(inner[0].invars)
            branches = [_reductions(x, inputs[len(inputs) - n :], names) for x in inner]
            results = [
                frozenset().union(*inputs[: len(inputs) - n], *x)
                for x in zip(*branches, strict=True)
            ]
        else:
            together = frozenset().union(*inputs)
            own = _reduces(equation)
            results = [together | ({next(names)} if own else set()) for _ in equation.outvars]
        uses |= zip(equation.outvars, results, strict=True)
    return [used(x) for x in jaxpr.outvars]


def _jaxprs(equation: Any) -> list[Any]:
    inner = (getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(equation.params.values())))
    return [x for x in inner if hasattr(x, "eqns")]


def called(equation: Any) -> list[Any]:
    """The computations that an equation is short for: one, or the branches of a choice."""
    name, inner = equation.primitive.name, _jaxprs(equation)
    n = len(equation.invars) - (name == "cond")
    once = name not in ("scan", "while") and (len(inner) == 1 or name == "cond")
    return inner if once and all(len(x.invars) == n for x in inner) else []


def _reduces(equation: Any) -> bool:
    """Whether an equation adds up, or takes maxima, over entries."""
    if equation.primitive.name.startswith(("reduce_", "dot_")):
        return True
    return any(_reduces(x) for inner in _jaxprs(equation) for x in inner.eqns)


def _leaf_factor(update: jax.Array, linear: jax.Array, param: jax.Array) -> jax.Array:
    """The r of ``update = r linear + k param``, by least squares: k is the weight decay.

    It holds for every entry: some thousand of them are enough.
    """
    each = round(_SAMPLE ** (1 / max(update.ndim, 1)))
    strides = [max(1, n // each) for n in update.shape]
    update, linear, param = (
        jax.lax.slice(x, [0] * x.ndim, x.shape, strides) for x in (update, linear, param)
    )
    # Of small steps the squares would underflow.
    sizes = [jnp.maximum(_largest_finite(x), 1e-30) for x in (update, linear, param)]
    update, linear, param = (x / n for x, n in zip((update, linear, param), sizes, strict=True))
    uu, up, pp = (jnp.sum(x * y) for x, y in ((linear, linear), (linear, param), (param, param)))
    tu, tp = jnp.sum(update * linear), jnp.sum(update * param)
    determinant = uu * pp - up * up
    alone = determinant <= 1e-3 * uu * pp
    r = jnp.where(alone, tu / uu, (tu * pp - tp * up) / determinant)
    r *= sizes[0] / sizes[1]
    return jnp.where((r > 0) & (r < jnp.inf), r, 1)


def _moments_before(step: Callable[[Any], Any], after: Any) -> list[Any]:
    """Second moments that a step with next to no gradient turns into those of ``after``."""
    wanted = moments_in(after, "second")

    def from_all(n: float) -> Any:
        return step(jax.tree.map(lambda x: jnp.full_like(x, n), wanted))

    def given(x: jax.Array, of_zero: jax.Array, of_one: jax.Array) -> jax.Array:
        share = of_one - of_zero
        inverse = (x - of_zero) / jnp.where(share > 0, share, 1)
        return jnp.where(x >= 0, jnp.maximum(inverse, 0), inverse)  # centred ones have a sign

    return jax.tree.map(given, wanted, from_all(0), from_all(1))


def _wide(tree: Any) -> Any:
    """16-bit floats in 32 bits, in which differences and quotients keep their digits."""

    def wide(x: Any) -> Any:
        dtype = jnp.result_type(x)
        short = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(x, jnp.float32) if short else x

    return jax.tree.map(wide, tree)
