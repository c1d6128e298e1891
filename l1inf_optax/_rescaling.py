r"""Any radius trains: what small balls take from the signal is given back, and rates follow.

A layer of ReLU units with weights ``s W`` and a bias ``t b`` passes on t times what it does with W
and b, if what it is given is t / s times as large. So a network is the same network whatever the
radii of its hidden layers, but for its outputs' size, which a free layer sets. An optimizer does
not know that: its rates would have to be ``s`` and ``t`` times as large. Here it steps in the
parameters divided by these scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l1inf_optax import _layers
from l1inf_optax._layers import Layer, Layers, Radii, Radius
from l1inf_optax._projection.arguments import brief, is_traced
from l1inf_optax._pruning import Prune
from l1inf_optax._schedules import Shrink
from l1inf_optax._transform import PLACEHOLDER, ball_states, check_optimizer

_SAME = 0.02  # factors that count as equal
_CLOSE = 0.05  # by what share of what they differ by outputs may change: bfloat16 rounds


class Rescaled(NamedTuple):
    """What :func:`rescale_params` returns.

    Attributes:
        params: Pytree like the parameters, to start from.
        scales: The same pytree of float32 scalars, for :func:`with_scales`. An augmented kernel of
            shape ``(d_in + 1, d_out)`` has a column ``(d_in + 1, 1)``: one for its bias, one for
            its weights.
    """

    params: Any
    scales: Any


def rescale_params(
    apply: Callable[[Any, Any], Any],
    params: Any,
    inputs: Any,
    c: Radii,
    *,
    layers: Layers = None,
    reference: float = 5.0,
) -> Rescaled:
    r"""Scales a network down, so that in small balls it trains as in those of a middle size.

    In balls of radius c the signal of an ordinary network falls with :math:`\prod_l c_l`, and so do
    its gradients; from about two hidden layers and c = 1 on it does not train any more. But with
    ReLU units, and others that are positively homogeneous, nothing is lost except the size of the
    outputs. So constrained weights start ``min(1, c / reference)`` times as large, free layers take
    up what is missing at the output, and :func:`with_scales` hands the optimizer parameters in
    units in which the network is as it was before. Then every c up to ``reference`` trains as that
    does, to rounding error; only biases count for less in the norm of a column, the smaller the
    balls in front of it. Nothing is projected: that is left to :func:`shrink`, or to the first
    update.

    What scales to take is measured, so neither names nor the order of layers matter: a leaf's is
    the ratio of the gradients of the outputs before and after. A norm behind a layer makes its
    scale harmless, and that shows there, too. Whether the outputs are what they were is checked. It
    needs numbers: call it before training, outside of `jax.jit`.

    Args:
        apply: A function of the parameters and ``inputs`` to the outputs, one array with the
            examples along its first axis. It should not be random.
        params: Pytree of freshly initialised parameters, with the scale that an initialization of
            He or LeCun gives them.
        inputs: Some inputs that differ, such as a batch.
        c: As for :func:`constrain`, but numbers: of a schedule the one that it ends at. A
            :func:`shrink` counts as its ``to`` (without one nothing is scaled), a :func:`prune` as
            its ``c``.
        layers: As in :func:`keep_params_in_l1inf_ball`.
        reference: Radius whose signal all smaller ones get. A unit with k equal weights keeps the
            mean square of ReLU units if its norm is :math:`\sqrt{2k}`: 5 suits about a dozen.

    Returns:
        A :class:`Rescaled`: the parameters, and their scales.

    Raises:
        ValueError: as :func:`keep_params_in_l1inf_ball`; ``reference`` is not positive and finite;
            a radius is a schedule or an array; there is not one array of outputs, or they do not
            differ; no free layer's weights scale them; or they are not what they were, as the
            network is not homogeneous (tanh, GELU, residual sums) or the format too short.

    References:
        Neyshabur, Salakhutdinov and Srebro (2015), *Path-SGD*, for the invariance.

    Example:
        >>> import jax, jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> model, x = l1inf.linen.AugmentedMLP((32, 32, 10)), jnp.eye(4, 8)
        >>> params = model.init(jax.random.key(0), x)
        >>> c = {"hidden_*": l1inf.shrink(0.5, over=1000)}
        >>> small, scales = l1inf.rescale_params(model.apply, params, x, c)
        >>> bool(jnp.allclose(model.apply(small, x), model.apply(params, x), atol=1e-5))
        True
        >>> round(float(scales["params"]["readout"]["kernel"]), 2)
        100.0
        >>> tx = l1inf.constrain(l1inf.with_scales(optax.adam(1e-3), scales), c)
    """
    if jnp.ndim(reference) or not 0 < float(reference) < math.inf:
        raise ValueError(f"reference={brief(reference)} is no positive number: give a radius")
    _layers.check_params(params)
    _layers.check_radii(c)
    leaves, structure = _layers.flatten(params)
    chosen = _layers.constrained_layers(params, c, layers)
    found = _layers.find_layers(params, layers)
    constrained = {layer.leaf_path for layer, _ in chosen}
    free = [layer for layer in found if layer.leaf_path not in constrained]

    def outputs(leaves: list[Any]) -> jax.Array:
        """What tells inputs apart."""
        y = apply(jax.tree.unflatten(structure, leaves), inputs)
        if len(jax.tree.leaves(y)) != 1 or jnp.ndim(jax.tree.leaves(y)[0]) == 0:
            raise ValueError(
                f"apply returns {brief(jax.tree.map(jnp.shape, y))}: give a function to one array "
                "of outputs, examples along its first axis"
            )
        y = jax.tree.leaves(y)[0].astype(jnp.float32)
        return y - y.mean(0)

    size = jax.jit(lambda leaves: _length(outputs(leaves)))
    # Without biases the network is homogeneous. They start at zero, or follow when it is known how.
    start = small = _without_biases(found, leaves)
    if not 0 < size(start) < jnp.inf:
        raise ValueError(
            "apply gives outputs that are the same for all inputs, or not finite: give some inputs "
            "that differ, and random weights, those of the output layer included"
        )
    factors: dict[int, float] = {}
    # One layer after the other, as the product of all factors may be below the smallest float.
    for layer, radius in chosen:
        before = size(small)
        factor = min(1.0, _radius(layer, radius) / float(reference))
        factors |= dict.fromkeys(layer.kernels, factor)
        small = _scaled(start, factors)
        lost = float(size(small) / before)
        if abs(lost - 1) > _SAME:
            takers = _takers(size, small, free)
            if not takers:
                raise ValueError(
                    f"c={brief(radius)} for {layer.path!r} leaves {lost:.2g} of the outputs, and "
                    "no free layer's weights scale them: leave the output layer free, as in "
                    "c={'hidden_*': 1.0}"
                )
            share = lost ** (-1 / len(takers))
            factors |= {i: factors.get(i, 1.0) * share for x in takers for i in x.kernels}
            small = _scaled(start, factors)
    of_start, of_small = (_sensitivities(outputs, x, found) for x in (start, small))
    scales = [
        _scale(leaf, before, after, factors.get(i))
        for i, (leaf, before, after) in enumerate(zip(leaves, of_start, of_small, strict=True))
    ]
    own = {i for layer in found for i in layer.leaves}
    rescaled = [(x * scales[i]).astype(x.dtype) if i in own else x for i, x in enumerate(leaves)]
    _check_same(outputs, leaves, rescaled, c)
    return Rescaled(*(jax.tree.unflatten(structure, x) for x in (rescaled, scales)))


def _length(x: jax.Array) -> jax.Array:
    """The Euclidean length; squares neither underflow nor overflow."""
    top = jnp.max(jnp.abs(x))
    return top * jnp.linalg.norm(jnp.ravel(x / jnp.where(top > 0, top, 1)))


def _takers(size: Callable[[list[Any]], Any], leaves: list[Any], free: list[Layer]) -> list[Layer]:
    """The free layers whose weights scale the outputs: doubled, they double them."""
    doubled = 2 * size(leaves)

    def doubles(layer: Layer) -> bool:
        return bool(
            abs(size(_scaled(leaves, dict.fromkeys(layer.kernels, 2.0))) / doubled - 1) < _SAME
        )

    return list(filter(doubles, free))


def _check_same(
    outputs: Callable[[list[Any]], jax.Array], before: list[Any], after: list[Any], c: Radii
) -> None:
    expected, got = jax.jit(outputs)(before), jax.jit(outputs)(after)
    error = float(_length(got - expected) / _length(expected))
    if not error < _CLOSE:
        raise ValueError(
            f"c={brief(c)} changes the outputs by {error:.2g} of what they differ by: scaling "
            "layers down is harmless behind ReLU and norms, but not behind tanh or GELU, within "
            "residual sums, with biases of a stack of layers, or in float16. Choose larger radii "
            "for these layers, or leave them free"
        )


def _radius(layer: Layer, radius: Radius) -> float:
    """The radius that a layer ends at."""
    if isinstance(radius, Prune):
        radius = radius.c
    elif isinstance(radius, Shrink):
        radius = math.inf if radius.to is None else radius.to
    if callable(radius) or is_traced(radius) or jnp.ndim(radius):
        raise ValueError(f"c={brief(radius)} for {layer.path!r}: give the number that it ends at")
    return float(radius)


def _without_biases(found: list[Layer], leaves: list[Any]) -> list[Any]:
    leaves = list(leaves)
    for layer in found:
        columns = layer.columns(leaves)
        is_weight = layer.of_weights(tuple(jnp.ones_like(x, bool) for x in columns))
        layer.put(tuple(map(jnp.multiply, columns, is_weight)), leaves)
    return leaves


def _scaled(leaves: list[Any], factors: dict[int, float]) -> list[Any]:
    return [x * factors[i] if i in factors else x for i, x in enumerate(leaves)]


def _sensitivities(
    outputs: Callable[[list[Any]], jax.Array], leaves: list[Any], found: list[Layer]
) -> list[Any]:
    """How much the outputs depend on each leaf: a number, or one for a bias row and the rest."""
    is_float = [hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    rows = {layer.kernels[0]: layer.reduction_axes for layer in found if layer.has_bias_row}

    @jax.jit
    def grads(floats: list[Any]) -> list[Any]:
        def mixed(floats: list[Any]) -> jax.Array:
            given = iter(floats)
            y = outputs([next(given) if f else x for f, x in zip(is_float, leaves, strict=True)])
            return jnp.sum(y * jax.random.normal(jax.random.key(0), y.shape, y.dtype))

        return jax.grad(mixed)(floats)

    given = iter(grads([x for f, x in zip(is_float, leaves, strict=True) if f]))
    return [
        _norms(next(given).astype(jnp.float32), rows.get(i)) if f else None
        for i, f in enumerate(is_float)
    ]


def _norms(grad: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """The gradient's norm; of an augmented kernel that of its bias row, and of the others below."""
    if axes is None:
        return _length(grad)
    shape = [n if i in axes else 1 for i, n in enumerate(grad.shape)]
    row = jax.lax.broadcasted_iota(jnp.int32, shape, axes[0])
    bias, weights = (_length(jnp.where(mask, grad, 0)) for mask in (row == 0, row > 0))
    return jnp.where(row == 0, bias, weights)


def _scale(
    leaf: Any, before: jax.Array | None, after: jax.Array | None, factor: float | None
) -> Any:
    """How much smaller steps have to be where outputs depend more on a leaf than they did."""
    if before is None or after is None:
        return jnp.ones([]) if hasattr(leaf, "dtype") else leaf
    if factor is not None and before.ndim == 0:
        return jnp.float32(factor)
    is_known = (before > 0) & (after > 0)
    return jnp.where(is_known, before / jnp.where(after > 0, after, 1), 1)


class WithScalesState(NamedTuple):
    """State of :func:`with_scales`.

    Attributes:
        inner_state: State of the optimizer inside.
    """

    inner_state: Any


def with_scales(
    optimizer: optax.GradientTransformation, scales: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer step in the parameters divided by ``scales``.

    Its rates, its weight decay, its epsilon then mean what they mean for a network whose parameters
    are so much larger. Adam's steps, for instance, become ``scales`` times as large, those of SGD
    the square of it.

    Args:
        optimizer: What to wrap. :func:`constrain` goes around the result, and reads its metric.
        scales: Pytree with the paths of the parameters, positive; leaves broadcast.
            :func:`rescale_params` measures them.

    Returns:
        A `optax.GradientTransformationExtraArgs`, which hands other arguments to the optimizer.

    Raises:
        ValueError: ``optimizer`` is none, ``scales`` not positive; and, from ``init`` and
            ``update``, ``scales`` has nothing for a leaf, or ``optimizer`` keeps a ball itself.

    Example:
        >>> import jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> params = {"hidden": {"kernel": jnp.ones((2, 2))}, "out": {"kernel": jnp.ones((2, 1))}}
        >>> scales = {"hidden": {"kernel": 0.1}, "out": {"kernel": 10.0}}
        >>> tx = l1inf.with_scales(optax.adam(1e-3), scales)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["hidden"]["kernel"][0, 0].round(6), updates["out"]["kernel"][0, 0].round(6)
        (Array(-0.0001, dtype=float32), Array(-0.01, dtype=float32))
    """
    check_optimizer(optimizer, "with_scales(optax.adam(1e-3), scales)")
    for path, scale in _layers.named_leaves(scales):
        if hasattr(scale, "dtype") and not is_traced(scale) and not bool(jnp.all(scale > 0)):
            raise ValueError(
                f"scales is not positive at {path!r}: give what rescale_params returned"
            )
    inner = optax.with_extra_args_support(optimizer)
    by_path = dict(_layers.named_leaves(scales))  # NNX hands out parameters with and without boxes

    def scaled(tree: Any, operation: Callable[[Any, Any], Any]) -> Any:
        leaves = []
        for path, x in _layers.named_leaves(tree):
            if hasattr(x, "dtype"):
                if path not in by_path:
                    raise ValueError(
                        f"scales has no leaf at {path!r}, but at {brief(sorted(by_path))}: give "
                        "what rescale_params returned for these parameters"
                    )
                x = operation(x, by_path[path]).astype(x.dtype)
            leaves.append(x)
        return jax.tree.unflatten(_layers.flatten(tree)[1], leaves)

    def init_fn(params: Any) -> WithScalesState:
        is_placeholder = isinstance(params, PLACEHOLDER)
        state = inner.init(params if is_placeholder else scaled(params, jnp.divide))
        if ball_states(state):
            raise ValueError(
                "optimizer keeps its parameters in a ball, which would be scaled with them: put "
                "constrain around, as in constrain(with_scales(optax.adam(1e-3), scales), c)"
            )
        return WithScalesState(state)

    def update_fn(
        updates: Any, state: WithScalesState, params: Any = None, **extra: Any
    ) -> tuple[Any, WithScalesState]:
        if params is not None:
            params = scaled(params, jnp.divide)
        if "grad" in extra:  # those of line searches
            extra["grad"] = scaled(extra["grad"], jnp.multiply)
        if "value_fn" in extra:
            value_fn = extra["value_fn"]
            extra["value_fn"] = lambda params, *args, **more: value_fn(
                scaled(params, jnp.multiply), *args, **more
            )
        updates = scaled(updates, jnp.multiply)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        return scaled(updates, jnp.multiply), WithScalesState(inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
