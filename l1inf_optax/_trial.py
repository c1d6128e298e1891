"""Before training: has an optimizer a metric that can be read off it?

What its states say is not enough. A link without a state may mix entries, limit them or scale them,
and has no name to know it by. So the optimizer is tried on small arrays with a gradient that stays
the same. Each entry of a constrained layer must then move in proportion to its own gradient and its
slope, as `_metric` reads it: so that a point that step and projection leave is an optimum. Where
the arithmetic alone shows that, as with Adam and SGD, nothing is tried.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from l1inf_optax import _layers, _metric, _optimizers
from l1inf_optax._layers import Layer
from l1inf_optax._optimizers import A_FUNCTION, NO_METRIC


def check(
    optimizer: optax.GradientTransformationExtraArgs,
    state: Any,
    params: Any,
    layers: Sequence[Layer],
    neutral: Sequence[type] = (),
) -> None:
    """Raises a ValueError if the optimizer has no metric, or none that can be read off it.

    Args:
        optimizer: The optimizer.
        state: Its state, or shapes.
        params: The parameters, or their shapes.
        layers: What is constrained.
        neutral: Types of states that leave the metric as it is.
    """
    _check_known(state, tuple(neutral))
    try:
        obvious = _is_obvious(optimizer, state, params, layers)
        fits = obvious or _fits(optimizer, params, layers)
    except TypeError as error:
        raise ValueError(
            "metric='auto' tries the optimizer before training, and that fails: "
            f"{error}. If it needs arguments of its own, give {A_FUNCTION}, or "
            "metric='euclidean' if its steps are gradients, all entries scaled alike"
        ) from error
    if not fits:
        raise ValueError(
            "metric='auto' finds that a constrained layer does not move by its gradient, each "
            "entry times a weight of its own: a link mixes entries (as centralize does), limits "
            "them (clip, adaptive_grad_clip, clip_by_block_rms), or scales them without a state "
            "that shows how. What changes the gradient belongs in front: "
            "optax.chain(optax.centralize(), l1inf.constrain(optax.adam(1e-3), c)). What comes "
            f"after the optimizer leaves no metric, unless you know one: {A_FUNCTION}"
        )


def _check_known(state: Any, neutral: tuple[type, ...]) -> None:
    """Raises a ValueError if a part of a state belongs to something that is not known."""
    known = _optimizers.MOMENTS.keys() | _optimizers.WRAPPERS.keys() | _optimizers.NEUTRAL
    for name, part in _optimizers.links(state):
        if isinstance(part, neutral) or not jax.tree.leaves(part):
            continue
        if name in _optimizers.ADVICE:
            raise ValueError(f"metric='auto' finds no metric in {name}. {_optimizers.ADVICE[name]}")
        if name in _optimizers.LINE_SEARCHES and not _optimizers.is_euclidean(state):
            raise ValueError(
                f"metric='auto' finds no metric behind {name}, which would search along every step "
                "that is tried. Use a schedule for the learning rate, or search after SGD alone"
            )
        if name not in known:
            raise ValueError(
                f"metric='auto' does not know {name}. If it scales every entry by a number of its "
                f"own, as Adam does, give {A_FUNCTION}. If it only scales whole updates, or looks "
                f"on, say neutral=({name},). If its steps are gradients or means of them, all "
                "entries scaled alike, metric='euclidean' is right"
            )


def _is_obvious(optimizer: Any, state: Any, params: Any, layers: Sequence[Layer]) -> bool:
    """Whether the arithmetic alone shows that each entry moves by its own gradient and moments.

    Raises:
        ValueError: The updates do not depend on how long the gradient is.
    """
    state, params = (jax.tree.map(_shape, x) for x in (state, params))
    chosen = _indices(layers)

    def update(own: list[Any], grads: Any, state: Any, params: Any) -> list[Any]:
        leaves, structure = _layers.flatten(grads)
        for i, x in zip(chosen, own, strict=True):
            leaves[i] = x
        grads = jax.tree.unflatten(structure, leaves)
        updates, _ = optimizer.update(grads, state, params, **_arguments(grads, params))
        return _chosen(updates, layers)

    def tangents(tangent: list[Any], own: list[Any], *rest: Any) -> list[Any]:
        return jax.jvp(lambda own: update(own, *rest), (own,), (tangent,))[1]

    own = _chosen(params, layers)
    tangent_jaxpr = jax.make_jaxpr(tangents)(own, own, params, state, params).jaxpr
    first, last = len(own), len(tangent_jaxpr.invars)
    if not all(_reached(tangent_jaxpr, range(first))):
        raise ValueError(
            "metric='auto' finds that the updates of a constrained layer do not depend on how long "
            "its gradient is, as those of sign-SGD or of a layer that is frozen. A frozen layer "
            "is left free by c={its name: None, ...}. Steps by signs leave no metric to project "
            f"in: {NO_METRIC}"
        )
    closed = jax.make_jaxpr(update)(own, params, state, params)
    last_params = range(last - len(jax.tree.leaves(params)), last)
    return (
        _is_plain(closed.jaxpr)
        and all(jnp.ndim(x) == 0 for x in closed.consts)
        and not any(_reached(tangent_jaxpr, last_params))
    )


def _shape(x: Any) -> Any:
    """An array's shape and dtype, without its sharding; numbers as they are."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x


def _chosen(tree: Any, layers: Sequence[Layer]) -> list[Any]:
    leaves, _ = _layers.flatten(tree)
    return [leaves[i] for i in _indices(layers)]


def _indices(layers: Sequence[Layer]) -> list[int]:
    return [i for layer in layers for i in layer.leaves]


def _arguments(grads: Any, params: Any) -> dict[str, Any]:
    """What line searches and their like are given besides: a loss, 1 here, with these gradients."""

    def value_fn(at: Any) -> jax.Array:
        leaves = zip(*map(jax.tree.leaves, (grads, at, params)), strict=True)
        return sum((jnp.sum((g * (x - p)).real) for g, x, p in leaves), start=jnp.ones([]))

    return {"value": jnp.ones([]), "grad": grads, "value_fn": value_fn}


def _reached(jaxpr: Any, sources: Sequence[int]) -> list[bool]:
    """Which results depend on some of the arguments."""
    reached = {jaxpr.invars[i] for i in sources}
    for equation in jaxpr.eqns:
        if any(x in reached for x in equation.invars if not hasattr(x, "val")):
            reached.update(equation.outvars)
    return [not hasattr(x, "val") and x in reached for x in jaxpr.outvars]


_ENTRYWISE = {
    *("add", "add_any", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "square", "pow"),
    *("integer_pow", "convert_element_type", "copy", "copy_p", "name"),
}


def _is_plain(jaxpr: Any) -> bool:
    """Whether arrays are only added, multiplied and raised to powers, entry by entry."""
    for equation in jaxpr.eqns:
        arguments = [jnp.ndim(x.aval) for x in (*equation.invars, *equation.outvars)]
        inner = _metric.called(equation)
        if inner:
            if not all(map(_is_plain, inner)):
                return False
        elif equation.primitive.name == "broadcast_in_dim":
            if jnp.ndim(equation.invars[0].aval) > 0:
                return False
        elif max(arguments, default=0) > 0 and equation.primitive.name not in _ENTRYWISE:
            return False
    return True


# Sizes of the gradient in a trial. Larger ones bring out limits, which matter where leaves have
# factors of their own: these are read from how long the updates are.
_SIZE, _LARGER, _ABOVE_NOISE = 1e-4, (0.1, 10.0, 1e3), 1e8
_SMALLER = 1e-5  # the parameters, so that weight decay adds next to nothing to the gradient
_FIRST_STEPS, _MOST_STEPS = 200, 10_000  # MultiSteps, a warm-up: some wait with their first update
_LONGER = 10.0  # by so much is the gradient of the last step
_SAME = 1e-2


def _fits(optimizer: Any, params: Any, layers: Sequence[Layer]) -> bool:
    """Whether, with a gradient that stays the same, each entry moves by it times its slope."""
    with jax.ensure_compile_time_eval():
        try:
            return _fits_on(jax.tree.map(_small, params), optimizer, layers)
        except (TypeError, ValueError):  # a link may hold arrays of the parameters' own shapes
            return _fits_on(jax.tree.map(_positive, params), optimizer, layers)


def _small(x: Any) -> jax.Array:
    return _positive(jax.ShapeDtypeStruct((4,) * len(x.shape), x.dtype))


def _positive(x: Any) -> jax.Array:
    """Numbers between 1/2 and 2, in float32; zeros for what is no float."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.asarray(np.exp2(np.random.default_rng(0).uniform(-1, 1, x.shape)), jnp.float32)


def _fits_on(like: Any, optimizer: Any, layers: Sequence[Layer]) -> bool:
    tried = jax.jit(lambda g, s, p, at: optimizer.update(g, s, p, **_arguments(*at)))
    state, at = optimizer.init(like), (like, like)
    sizes: tuple[float, ...] = (_SIZE,)
    if any(name == "AddNoiseState" for name, _ in _optimizers.links(state)):
        sizes = (_ABOVE_NOISE,)
    elif _metric.has_leaf_factors(lambda g: tried(g, state, like, at)[0], like, layers):
        sizes = (_SIZE, *_LARGER)
    return all(_fits_at(size, like, optimizer.init, tried, layers) for size in sizes)


class _Step(NamedTuple):
    """A step of a trial."""

    before: Any
    updates: Any
    after: Any


def _fits_at(size: float, like: Any, init: Any, tried: Any, layers: Sequence[Layer]) -> bool:
    params = jax.tree.map(lambda x: x * jnp.asarray(size * _SMALLER, x.dtype), like)

    def given(scale: ArrayLike) -> Any:
        return jax.tree.map(lambda x: _gradient(size, x) * jnp.asarray(scale, x.dtype), like)

    def step(state: Any, scale: ArrayLike) -> _Step:
        grads = given(scale)
        return _Step(state, *tried(grads, state, params, (grads, params)))

    def fits(taken: _Step, scale: float) -> bool:
        grads = given(scale)
        again = optax.GradientTransformationExtraArgs(
            init, lambda g, s, p: tried(g, s, p, (grads, params))
        )
        slopes = _metric.slopes(
            again, taken.before, taken.after, grads, taken.updates, params, {}, layers
        )
        predicted = grads if slopes is None else jax.tree.map(jnp.multiply, slopes, grads)
        arrays = [_chosen(x, layers) for x in (taken.updates, predicted, params)]
        factors = dict(zip(_indices(layers), map(_factor, *arrays), strict=True))
        return all(
            abs(factors[i] / factors[layer.leaves[0]] - 1) < _SAME
            for layer in layers
            for i in layer.leaves
        )

    taken = _late(step, init(params), layers)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(taken)):
        return True  # the learning rate, say, is being traced: nothing can be told now
    # As long as all of Adam's updates are alike, a limit on them does not show. Make them differ.
    taken = _Step(taken.before, *step(taken.before, 1.0)[1:])
    longer = step(_optimizers.varied(taken.before), _LONGER)
    return fits(taken, 1.0) and fits(longer, _LONGER)


def _gradient(size: float, like: jax.Array) -> jax.Array:
    """Of other sizes in kernels than in biases, as are their norms.

    It is negative, so that parameters grow: whoever keeps them positive has nothing to do.
    """
    return jnp.flip(like) * jnp.asarray(-size * 3.0**like.ndim, like.dtype)


def _late(step: Any, state: Any, layers: Sequence[Layer]) -> _Step:
    """A step after many, at which every constrained layer moves: the last of the first, or later.

    The gradient grows and shrinks, so that its variance is not zero, but does not turn. A schedule
    may end before the first steps do; an optimizer may wait with its first update.
    """

    @jax.jit
    def moves(updates: list[Any]) -> jax.Array:
        return jnp.stack([jnp.any(x != 0) for x in updates]).all()

    latest, taken = None, step(state, 1.0)
    for n in range(_FIRST_STEPS):
        moved = moves(_chosen(taken.updates, layers))
        if isinstance(moved, jax.core.Tracer):
            return taken
        latest = taken if moved else latest
        taken = step(taken.after, 0.5 + n % 2)
    if latest is not None:
        return latest
    return jax.lax.while_loop(
        lambda carry: (carry[0] < _MOST_STEPS) & ~moves(_chosen(carry[1].updates, layers)),
        lambda carry: (carry[0] + 1, step(carry[1].after, 0.5 + carry[0] % 2)),
        (0, taken),
    )[1]


def _factor(*arrays: Any) -> float:
    """The r of ``updates = r predicted``, perhaps with weight decay; NaN where there is none."""
    updates, predicted, params = (np.asarray(x, np.float64).ravel() for x in arrays)
    top = np.abs(predicted).max()
    if not 0 < top < np.inf:
        return np.nan
    predicted, params = predicted / top, params / params.max()
    for terms in (predicted[:, None], np.stack([predicted, params], 1)):
        solution = np.linalg.lstsq(terms, updates)[0]
        if np.abs(updates - terms @ solution).max() <= _SAME * np.abs(updates).max():
            return solution[0] / top
    return np.nan
