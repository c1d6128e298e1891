"""The metric an optimizer steps in: how far the same gradient moves each weight.

Adam steps by ``-lr m / (sqrt(nu) + eps)``: steepest descent in the metric ``d = sqrt(nu) + eps``. A
projection after it must use the same metric, or a fixed point of both is no optimum. The metric is
not computed here a second time but read off the optimizer, whatever wraps it, in four lines:

1. Take the state before the step, its first moments zero.
2. Set its second moments so that a step with next to no gradient ends with those of the real step.
3. There the derivative of the updates in the gradient is ``1 / d``, up to a factor for each leaf.
4. That factor is how much longer the real updates are than the derivative predicts them.

Only which fields of which state are moments is written down. What is not known is an error.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l1inf_optax import _layers


class _Moments(NamedTuple):
    """The fields of a state that the updates depend on.

    Attributes:
        first: Running means of gradients or of updates: in these the updates are linear.
        second: Running means of squares: these are the metric.
        settled: Values that make a step take over some of the second moments it is given.
    """

    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    settled: tuple[tuple[str, int], ...] = ()


# By the names of optax's states, as it does not export all of them.
_MOMENTS = {
    "ScaleByAdamState": _Moments(("mu",), ("nu",)),  # adam(w), nadam(w), radam, yogi, lamb, adamax
    "ScaleByAmsgradState": _Moments(("mu", "nu"), ("nu_max",)),
    "ScaleByBeliefState": _Moments(("mu",), ("nu",)),
    "ScaleByNovogradState": _Moments(("mu",), ("nu",)),
    "ScaleByRmsState": _Moments((), ("nu",)),
    "ScaleByRmsWithCountState": _Moments((), ("nu",)),
    "ScaleByRStdDevState": _Moments((), ("mu", "nu")),
    "ScaleByRStdDevWithCountState": _Moments((), ("mu", "nu")),
    "ScaleByRssState": _Moments((), ("sum_of_squares",)),
    "ScaleByAdaDeltaState": _Moments((), ("e_g",)),
    # Adafactor's first steps forget everything before them: take one from later on.
    "FactoredState": _Moments((), ("v_row", "v_col", "v"), (("count", 10**6),)),
    "ScaleBySM3State": _Moments(("nu",)),  # its second moments are known only to the step itself
    "TraceState": _Moments(("trace",)),
    "EmaState": _Moments(("ema",)),
    "MultiStepsState": _Moments(("acc_grads",)),
    "ApplyEvery": _Moments(("grad_acc",)),
}
_WRAPPERS = {
    "MultiStepsState": "inner_opt_state",
    "ApplyIfFiniteState": "inner_state",
    "ConditionallyTransformState": "inner_state",
    "ConditionallyMaskState": "inner_state",
    "InjectHyperparamsState": "inner_state",
    "InjectStatefulHyperparamsState": "inner_state",
    "MaskedState": "inner_state",
    "MultiTransformState": "inner_states",
    "PartitionState": "inner_states",
}
_NEUTRAL = {
    "AddNoiseState",
    "MonitorState",
    "ScaleByScheduleState",
    "SnapshotState",
    "ZeroNansState",
}
# A gradient so small that no second moment notices, and so large that its square is a number.
_NEXT_TO_NOTHING = 1e-18
_CHOICES = (
    "Give metric='euclidean', which suits optimizers that step along the gradient itself, or a "
    "function metric(state, params) that returns the weights of the optimizer's own metric"
)

_UNEVEN = {"MaskedState", "MultiTransformState", "PartitionState", "ScaleBySM3State"}


def is_euclidean(state: Any) -> bool:
    """Whether an optimizer with this state steps along the gradient, alike in every leaf.

    Raises:
        ValueError: a part of the state belongs to an optimizer that is not known.
    """
    return all(
        not _MOMENTS.get(name, _Moments()).second and name not in _UNEVEN
        for name, _ in _parts(state)
    )


def check(
    optimizer: optax.GradientTransformationExtraArgs, state: Any, params: Any, chosen: Sequence[int]
) -> None:
    """Raises a ValueError if the optimizer has no metric, or none that can be read off it.

    Args:
        optimizer: The optimizer.
        state: Its state.
        params: The parameters.
        chosen: Which leaves of ``params`` are constrained.
    """
    list(_parts(state))

    def tangents(tangent: Any) -> list[Any]:
        def update(grads: Any) -> Any:
            return optimizer.update(grads, state, params)[0]

        leaves, _ = _layers.flatten(jax.jvp(update, (params,), (tangent,))[1])
        return [leaves[i] for i in chosen]

    jaxpr = jax.make_jaxpr(tangents)(params).jaxpr
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(x in reached for x in equation.invars if not hasattr(x, "val")):
            reached.update(equation.outvars)
    if not all(not hasattr(x, "val") and x in reached for x in jaxpr.outvars):
        raise ValueError(
            "metric='auto' finds that the updates of a constrained layer do not depend on how long "
            f"its gradient is, as those of sign-SGD: there is no metric to project in. {_CHOICES}"
        )


def slopes(
    optimizer: optax.GradientTransformationExtraArgs,
    before: Any,
    after: Any,
    grads: Any,
    updates: Any,
    params: Any,
    extra: dict[str, Any],
) -> Any:
    """How far the step just taken moves each entry for the same gradient: ``1 / d``.

    Args:
        optimizer: The optimizer.
        before: Its state before the step.
        after: Its state after the step.
        grads: What it was given.
        updates: What it returned.
        params: The parameters.
        extra: The other arguments it was given.

    Returns:
        Pytree like ``updates``, float32 or wider; zero where there was no step.
    """
    nowhere = jax.tree.map(jnp.zeros_like, _wide(params))
    grads, updates, params, before, after = map(_wide, (grads, updates, params, before, after))
    nothing = jax.tree.map(lambda g: jnp.full_like(g, _NEXT_TO_NOTHING), grads)
    held = _held(lambda state: optimizer.update(nothing, state, nowhere, **extra)[1], before, after)
    first = _moments(before, "first")

    def step(even: jax.Array, own: jax.Array) -> Any:
        """The updates by a gradient of ``even`` everywhere and ``own`` times the real moments."""
        moments = jax.tree.map(lambda x: own * x, first)
        state = _with_moments(before, moments, held)
        moved = jax.tree.map(lambda g, x: even + own * g + x, grads, nothing)
        return optimizer.update(moved, state, nowhere, **extra)[0]

    zero = jnp.zeros(())
    _, derivative = jax.linearize(step, zero, zero)
    by_gradient, linear = derivative(zero + 1, zero), derivative(zero, zero + 1)
    if any(name == "ScaleBySM3State" for name, _ in _parts(before)):
        state = _with_moments(before, jax.tree.map(jnp.zeros_like, first), held)
        exact = optimizer.update(grads, state, nowhere, **extra)[0]
        return jax.tree.map(
            lambda u, g, s: jnp.abs(jnp.where(g == 0, s, u / g)), exact, grads, by_gradient
        )
    return jax.tree.map(
        lambda s, u, x, p: jnp.abs(s) * _longer(u, x, p), by_gradient, updates, linear, params
    )


def _longer(update: jax.Array, linear: jax.Array, param: jax.Array) -> jax.Array:
    """The r of ``update = r linear + k param``, by least squares: k is the weight decay."""
    uu, up, pp = (jnp.sum(x * y) for x, y in ((linear, linear), (linear, param), (param, param)))
    tu, tp = jnp.sum(update * linear), jnp.sum(update * param)
    determinant = uu * pp - up * up
    alone = determinant <= 1e-3 * uu * pp
    r = jnp.where(alone, tu / uu, (tu * pp - tp * up) / determinant)
    return jnp.where((r > 0) & (r < jnp.inf), r, 1)


def _held(new_state: Callable[[Any], Any], before: Any, after: Any) -> list[Any]:
    """Second moments that a step with next to no gradient turns into those of ``after``."""
    wanted = _moments(after, "second")
    none = jax.tree.map(jnp.zeros_like, _moments(before, "first"))

    def kept(share: jax.Array) -> list[Any]:
        given = jax.tree.map(lambda x: jnp.full_like(x, share), wanted)
        return _moments(new_state(_with_moments(before, none, given)), "second")

    added, share = jax.jvp(kept, (jnp.zeros(()),), (jnp.ones(()),))

    def given(x: jax.Array, added: jax.Array, share: jax.Array) -> jax.Array:
        inverse = (x - added) / jnp.where(share > 0, share, 1)
        inverse = jnp.where(x >= 0, jnp.maximum(inverse, 0), inverse)
        return jnp.where(share > 0, inverse, x)

    return jax.tree.map(given, wanted, added, share)


def _wide(tree: Any) -> Any:
    """16-bit floats in 32 bits, in which differences and quotients keep their digits."""

    def wide(x: Any) -> Any:
        dtype = jnp.result_type(x)
        short = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(x, jnp.float32) if short else x

    return jax.tree.map(wide, tree)


# --- the parts of an optimizer's state ------------------------------------------------------------


def _parts(state: Any) -> Iterator[tuple[str, Any]]:
    """The named tuples in a state, with their names, outer ones first.

    Raises:
        ValueError: one of them is not known.
    """
    name = type(state).__name__
    if not hasattr(state, "_fields"):
        if isinstance(state, dict | list | tuple):
            for part in state.values() if isinstance(state, dict) else state:
                yield from _parts(part)
            return
        if jax.tree.leaves(state):
            raise ValueError(f"metric='auto' does not know a state of type {name}. {_CHOICES}")
        return
    if state and name not in _MOMENTS and name not in _WRAPPERS and name not in _NEUTRAL:
        raise ValueError(f"metric='auto' does not know the metric of {name}. {_CHOICES}")
    yield name, state
    if name in _WRAPPERS:
        yield from _parts(getattr(state, _WRAPPERS[name]))


def _moments(state: Any, kind: str) -> list[Any]:
    """The first or second moments in a state, in the order of its parts."""
    return [
        getattr(part, field)
        for name, part in _parts(state)
        if name in _MOMENTS
        for field in getattr(_MOMENTS[name], kind)
    ]


def _with_moments(state: Any, first: Sequence[Any], second: Sequence[Any]) -> Any:
    """The state with other moments."""
    return _replaced(state, {"first": iter(first), "second": iter(second)})


def _replaced(state: Any, moments: dict[str, Iterator[Any]]) -> Any:
    name = type(state).__name__
    if not hasattr(state, "_fields"):
        if isinstance(state, dict):
            return type(state)((k, _replaced(x, moments)) for k, x in state.items())
        if isinstance(state, list | tuple):
            return type(state)(_replaced(x, moments) for x in state)
        return state
    own = _MOMENTS.get(name, _Moments())
    changed = {field: next(moments["first"]) for field in own.first}
    changed |= {field: next(moments["second"]) for field in own.second}
    changed |= {field: jnp.full_like(getattr(state, field), x) for field, x in own.settled}
    if name in _WRAPPERS:
        changed[_WRAPPERS[name]] = _replaced(getattr(state, _WRAPPERS[name]), moments)
    return state._replace(**changed)
