"""The optax transformations: the only place with optimizer state.

An optimizer proposes the update u; the parameters would become ``v = p + u``. What is wanted is
``w``, the projection of v, and what must be returned is an update u' with ``p + u' = w``. In
floating point there may be no such u'. The one that is returned lands on w or, where it must, next
to it on the side of zero: no column grows, and an exact zero of w is one of the parameters.
"""

import functools
import glob
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l1inf_optax import _layers, _metric, _trial
from l1inf_optax._layers import Layer, Layers, Radii, Radius, radius_at
from l1inf_optax._projection.arguments import (
    Arrays,
    Axes,
    brief,
    check_count,
    check_method,
    check_radius,
    check_share,
    is_traced,
)
from l1inf_optax._projection.floats import Pair, round_to, wide_dtype
from l1inf_optax._projection.requests import Request, project_all, project_columns
from l1inf_optax._projection.shrink import Projected
from l1inf_optax._pruning import Operands, Prune, pruned, unmoved
from l1inf_optax._schedules import Shrink, ShrinkState

_SMALL = 0.02  # of a column's largest threshold: steps that no longer choose which entries are zero

Projection = Callable[[Callable[..., Arrays], list[Request]], list[Projected]]


class _Rules(NamedTuple):
    """What a transformation was told: arguments of :func:`keep_params_in_l1inf_ball`.

    Attributes:
        project: Projects requests; `contributing` says how to write one for another ball.
    """

    project: Projection
    c: Radii
    layers: Layers
    hold_zeros_from: int | None
    stickiness: float | jax.Array

    @property
    def sticks(self) -> bool:
        """Whether zeros may stick; what is traced may be anything."""
        return isinstance(self.stickiness, jax.Array) or self.stickiness > 0


class KeepParamsInL1InfBallState(NamedTuple):
    """State of :func:`keep_params_in_l1inf_ball`.

    Attributes:
        step: int32 scalar, the number of updates so far: the step a schedule for ``c`` reads.
        thresholds: For each constrained layer the threshold that projected each column last; zero
            where the column was inside the ball. They are nested dicts with the keys that lead to
            the layers' kernels in the parameters, so that what takes the parameters apart by their
            keys, and puts them together again, can do so with the state. The next search starts
            there, which saves it passes over the layer. It confirms what it finds, so any other
            values give the same result to rounding error, only later. For `optax.tree.map_params`
            they are one field, and no parameters.
        largest_thresholds: The largest that each column has had. The first update does not count:
            it may have had to take the column into the ball.
        shrinking: How far the layers are whose radius is a :func:`shrink`; empty if there are none.
    """

    step: jax.Array
    thresholds: dict[str, Any]
    largest_thresholds: dict[str, Any]
    shrinking: ShrinkState | tuple[()] = ()


def keep_params_in_l1inf_ball(
    c: Radii,
    *,
    layers: Layers = None,
    method: str = "newton",
    stickiness: float | jax.Array = 0.03,
    hold_zeros_from: int | None = None,
) -> optax.GradientTransformation:
    r"""Modifies the updates so that every column stays in the L1 ball of radius ``c``.

    After `optax.apply_updates` every constrained layer's augmented matrix (bias and weights
    together) satisfies :math:`\|V\|_{1,\infty} \le c`, in float32, bfloat16 and float16 alike,
    without a tolerance. It is the Euclidean projection of what the update would have made of the
    parameters: projected gradient descent, Algorithm 1 of Wen et al. A column that stays inside
    the ball anyway keeps its update bit for bit.

    .. warning::
        This must be the last transformation in a chain. Whatever comes after it changes the
        updates again, and the parameters are neither feasible nor sparse any more.

    .. warning::
        The Euclidean projection belongs to SGD and momentum. After Adam and other optimizers that
        scale coordinates one by one it still gives feasible parameters, but it can take away most
        of what the step has learned: use :func:`constrain` around them.

    The parameters should start in the ball: see :func:`project_params`. If they do not, the first
    update takes them there.

    Args:
        c: The normalization constant: a number; a :func:`shrink`, which makes layers sparse; an
            optax schedule, from the number of updates so far to a number; or a mapping from globs
            over the layers' paths to one of these or None. The first match wins; None, like no
            match, leaves a layer free. A plain number constrains every layer, the output layer
            too, which the paper leaves free: ``c={"hidden_*": 1.0}`` does not.
        layers: Which leaves make one augmented matrix. ``None`` finds the layers of Flax (Linen and
            NNX), Haiku, Equinox and this library by their names; anything else is said with
            :class:`LayerDimensionNumbers`: a mapping from globs over the leaves' paths, a pytree,
            or a function from the parameters to either.
        method: As in :func:`projection_l1inf_ball`.
        stickiness: Once steps are small, a zero in a column on its sphere stays zero unless it
            would be a survivor in a ball smaller by this share, too: unless the step lifts it above
            ``stickiness c / k``, that share of the mean of the k survivors. Minibatch noise does
            not, and neither do steps of a learning rate that goes to zero. Steps are small where
            the threshold is a fiftieth of the column's largest so far; before that every entry can
            come back. Columns that are inside by no more than this share count as on the sphere.
            0 for none.
        hold_zeros_from: ``None``, or the number of updates after which parameters of constrained
            layers that are exactly zero stay zero, biases too: a :func:`shrink` by hand, for radii
            that fall by a schedule. Zeros must not be held from a start at zero.

    Returns:
        A `optax.GradientTransformation`. The updates keep their dtypes, except that updates less
        precise than their parameters are returned in the parameters' dtype, without which no exact
        zero could be reached. Wrappers that choose between branches, such as
        `optax.apply_if_finite`, want them cast before: ``optax.tree.cast_like(grads, params)``.

    Raises:
        ValueError: ``c`` is not positive, ``method`` unknown, ``stickiness`` not from 0 to below 1,
            or ``hold_zeros_from`` no whole number or negative; and, from ``init`` and ``update``, a
            pattern matches nothing, there is no layer to constrain, the axes of one cannot be told,
            its parameters are integers, ``params`` are missing or empty, or ``state`` belongs to
            something else.

    Example:
        >>> import jax, jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> model = l1inf.linen.AugmentedMLP((32, 10))
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))
        >>> tx = optax.chain(
        ...     optax.sgd(0.1, momentum=0.9), l1inf.keep_params_in_l1inf_ball({"hidden_*": 1.0})
        ... )
        >>> state = tx.init(params)
        >>> grads = jax.grad(lambda p: jnp.sum(model.apply(p, jnp.ones((1, 8)))))(params)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> l1inf.l1inf_norm(params["params"]["hidden_0"]["augmented_kernel"]).round(6)
        Array(1., dtype=float32)
    """
    check_method(method)
    project = functools.partial(project_all, method=method)
    return _keep_params_in_ball(project, c, layers, hold_zeros_from, stickiness)


class ConstrainState(NamedTuple):
    """State of :func:`constrain`.

    Attributes:
        inner_state: State of the optimizer inside.
        ball: What the projection keeps.
    """

    inner_state: Any
    ball: KeepParamsInL1InfBallState


def constrain(
    optimizer: optax.GradientTransformation,
    c: Radii,
    *,
    metric: str | Callable[[Any, Any], Any] = "auto",
    layers: Layers = None,
    stickiness: float | jax.Array = 0.03,
    hold_zeros_from: int | None = None,
    neutral: Sequence[type] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps every column in the L1 ball, by projections in the metric the optimizer steps in.

    An adaptive optimizer steps by :math:`-\eta D^{-1} m` with a diagonal D, Adam's
    :math:`\sqrt{\hat\nu} + \epsilon`. What must follow is

    .. math::
        \operatorname*{argmin}_w \; \tfrac12 (w - v)^\top D (w - v)
        \quad \text{subject to} \quad \|w\|_1 \le c

    for every column v of the stepped parameters. Then a point that the step and the projection
    leave where it is satisfies the optimality conditions of the constrained problem, whatever D;
    after the Euclidean projection of :func:`keep_params_in_l1inf_ball` it does not, and what Adam
    learns is lost. Everything else is as there: feasible to the last bit, columns inside keep their
    update, zeros are exact.

    ``metric="auto"`` reads D off the optimizer and its state, with its bias corrections and its
    epsilon, leaf by leaf, through `optax.chain`, `named_chain`, `inject_hyperparams`, `masked`,
    `partition`, `MultiSteps`, `apply_if_finite`. It knows Adam, AdamW, NAdam, AMSGrad, AdaBelief,
    RAdam, Yogi, LAMB, NovoGrad, Adamax, Adan, AdEMAMix, RMSProp (centred too), Adagrad, Adadelta,
    Adafactor and SM3; SGD and momentum step along the gradient, and so do optimizers that rescale
    whole leaves, such as LARS: within a leaf the projection is Euclidean. An optimizer that it does
    not know is an error, and so is one that steps by signs (Lion, sign-SGD) or by matrices (Muon),
    which has no such metric.

    Links without a state have no name to know them by. So ``init`` tries the optimizer on small
    arrays: each entry has to move by its own gradient times its slope, within a layer up to one
    factor. Links that mix entries or limit them (`centralize`, `adaptive_grad_clip`) are an error.
    Where they change the gradient they belong in front:
    ``optax.chain(optax.centralize(), constrain(optax.adam(1e-3), c))``.

    `apply_if_finite` and `MultiSteps` may as well go around the result. Then a schedule for ``c``
    counts the steps that are taken; inside, it counts those that are not, too.

    Args:
        optimizer: What to constrain. Nothing may be chained after the result.
        c: As in :func:`keep_params_in_l1inf_ball`.
        metric: ``"auto"``; ``"euclidean"``; or a function from the optimizer's state after its
            step, and the parameters, to a pytree of weights d like the parameters, positive. Only
            ratios within a column matter, from 2^-60 to 1 within a layer.
        layers: As in :func:`keep_params_in_l1inf_ball`.
        stickiness: As in :func:`keep_params_in_l1inf_ball`; the entries that the optimizer moves
            faster have to rise higher.
        hold_zeros_from: As in :func:`keep_params_in_l1inf_ball`.
        neutral: Types of states that ``"auto"`` may pass over: those of links of your own that
            scale whole updates, or only look on. What they do is tried all the same.

    Returns:
        A `optax.GradientTransformationExtraArgs`, which hands other arguments to the optimizer.

    Raises:
        ValueError: as :func:`keep_params_in_l1inf_ball`; ``optimizer`` is none, or the function
            that makes it; ``metric`` is unknown; and, from ``init``, ``"auto"`` finds no metric or
            the optimizer projects already.

    References:
        Melchior, Joseph and Moolekamp (2019), *Proximal Adam*. Yun, Lozano and Yang (2021),
        *Adaptive proximal gradient methods for structured neural networks*.

    Example:
        >>> import jax, jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> params = {"hidden": {"kernel": jnp.ones((8, 3)), "bias": jnp.zeros(3)}}
        >>> tx = l1inf.constrain(optax.adam(1e-2), c=1.0)
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> l1inf.l1inf_norm(params["hidden"]["kernel"]).round(4)
        Array(1., dtype=float32)
    """
    if not callable(metric) and metric not in ("auto", "euclidean"):
        raise ValueError(
            f"metric={brief(metric)} is unknown: use 'auto', 'euclidean' or a function"
        )
    check_optimizer(optimizer, "constrain(optax.adam(1e-3), c)")
    inner = optax.with_extra_args_support(optimizer)
    ball = keep_params_in_l1inf_ball(
        c, layers=layers, stickiness=stickiness, hold_zeros_from=hold_zeros_from
    )
    rules = _Rules(project_all, c, layers, hold_zeros_from, stickiness)

    def init_fn(params: Any) -> ConstrainState:
        state = inner.init(params)
        if ball_states(state):
            raise ValueError(
                "optimizer keeps its parameters in a ball already, and constrain would project "
                "them a second time: give it the optimizer alone, as in "
                "constrain(optax.adam(1e-3), c)"
            )
        if metric == "auto" and not isinstance(params, PLACEHOLDER):
            chosen = _layers.constrained_layers(params, c, layers)
            _trial.check(inner, state, params, [layer for layer, _ in chosen], neutral)
        return ConstrainState(state, ball.init(params))

    def update_fn(
        updates: Any, state: ConstrainState, params: Any = None, **extra: Any
    ) -> tuple[Any, ConstrainState]:
        _check_params(params)
        _check_state(state, ConstrainState)
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra)
        slopes = None
        if callable(metric):
            slopes = jax.tree.map(lambda d: 1 / d, metric(inner_state, params))
        elif metric == "auto":
            chosen = _layers.constrained_layers(params, c, layers)
            slopes = _metric.slopes(
                inner,
                state.inner_state,
                inner_state,
                updates,
                steps,
                params,
                extra,
                [layer for layer, _ in chosen],
            )
        steps, ball_state = _into_ball(rules, steps, state.ball, params, slopes)
        return steps, ConstrainState(inner_state, ball_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_optimizer(optimizer: Any, example: str) -> None:
    """Raises a ValueError that shows the example if ``optimizer`` is none."""
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return
    what = f"optimizer={optimizer!r} is no optimizer"
    if callable(optimizer):
        name = getattr(optimizer, "__name__", "optimizer")
        what = f"optimizer={name} is a function that makes one: call it, as in {name}(1e-3)"
    raise ValueError(f"{what}. Say {example}, the optimizer first")


def project_params(params: Any, c: Radii, *, layers: Layers = None) -> Any:
    """Projects parameters once, for instance freshly initialised ones.

    Args:
        params: Pytree of parameters, floating-point, or a module that is one.
        c: As in :func:`keep_params_in_l1inf_ball`; a schedule is read at step 0.
        layers: As in :func:`keep_params_in_l1inf_ball`.

    Returns:
        The parameters, every constrained layer projected, everything else untouched.

    Raises:
        ValueError: as :func:`keep_params_in_l1inf_ball`.

    Example:
        >>> import jax.numpy as jnp, l1inf_optax as l1inf
        >>> params = {"hidden": {"kernel": jnp.array([[2.0], [1.0]]), "bias": jnp.array([-1.0])}}
        >>> l1inf.project_params(params, 2.5)["hidden"]["bias"].round(6)
        Array([-0.5], dtype=float32)
    """
    _layers.check_params(params)
    _layers.check_radii(c)
    leaves, structure = _layers.flatten(params)
    chosen = _layers.constrained_layers(params, c, layers)
    for layer, radius in as_schedules(chosen, params):
        columns = layer.columns(leaves)
        layer.put(
            project_columns(columns, radius_at(radius, 0), layer.reduction_axes).parts, leaves
        )
    return jax.tree.unflatten(structure, leaves)


def relative_radii(params: Any, share: Radii, *, layers: Layers = None) -> dict[str, Any]:
    """Radii as shares of the norms that layers have, for ``c``.

    Args:
        params: Pytree of parameters, or a module that is one.
        share: Of the layer's own L1,inf norm, positive: 0.5 for half of it. One for every layer, or
            a mapping from globs over the layers' paths to one or None, as ``c`` is.
        layers: As in :func:`keep_params_in_l1inf_ball`.

    Returns:
        A mapping from the paths of these layers to their radii: numbers, or for stacks of layers
        float32 arrays with one for each column. Layers without a share are left free.

    Raises:
        ValueError: as :func:`keep_params_in_l1inf_ball`; a layer is zero.

    Example:
        >>> import jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> params = {"a": {"kernel": jnp.eye(3)}, "b": {"kernel": 4 * jnp.eye(3)}}
        >>> c = l1inf.relative_radii(params, 0.5)
        >>> c
        {'a': 0.5, 'b': 2.0}
        >>> tx = l1inf.constrain(optax.adam(1e-3), c)
    """
    _layers.check_params(params)
    for part in _layers.radii(share):
        if callable(part) or isinstance(part, Shrink | Prune):
            raise ValueError(f"share={brief(share)} is no number: give what share of the norm c is")
        if part is not None:
            check_radius(part, name="share")
    leaves, _ = _layers.flatten(params)
    radii = {}
    # The first match wins, and a path matches all that end with it.
    chosen = _layers.constrained_layers(params, share, layers)
    for layer, part in sorted(chosen, key=lambda x: len(x[0].path), reverse=True):
        norm = layer.for_columns(layer.norm(leaves))
        if not (norm > 0).all():
            raise ValueError(f"params is zero at {layer.path!r}: it has no norm to take a share of")
        radii[glob.escape(layer.path)] = part * (norm if layer.batch_axes else float(norm))
    return radii


def _keep_params_in_ball(
    project: Projection,
    c: Radii,
    layers: Layers,
    hold_zeros_from: int | None,
    stickiness: float | jax.Array,
) -> optax.GradientTransformation:
    """Keeps columns in any closed star-shaped set around 0 that ``project`` projects onto."""
    _layers.check_radii(c)
    if hold_zeros_from is not None:
        what = "the number of updates after which zeros stay, such as round(0.8 * steps), or None"
        check_count("hold_zeros_from", hold_zeros_from, what)
    what = (
        "the share of a survivor's mean below which a zero stays zero, such as 0.01, or 0 for none"
    )
    check_share("stickiness", stickiness, what, may_be_zero=True)
    rules = _Rules(project, c, layers, hold_zeros_from, stickiness)

    def init_fn(params: Any) -> KeepParamsInL1InfBallState:
        step = jnp.zeros([], jnp.int32)
        if isinstance(params, PLACEHOLDER):
            # One leaf stands for all thresholds. A placeholder would make parameters of them.
            one_leaf: Any = jnp.zeros([])
            shrinks = any(isinstance(radius, Shrink) for radius in _layers.radii(c))
            shrinking = ShrinkState(one_leaf, one_leaf) if shrinks else ()
            return KeepParamsInL1InfBallState(step, one_leaf, one_leaf, shrinking)
        leaves, _ = _layers.flatten(params)
        chosen = _layers.constrained_layers(params, c, layers)
        told = _told.get()
        if told is not None:
            told.append(Kept({layer.leaf_path: c for layer, c in chosen}, hold_zeros_from))
        memories = {}
        for layer, radius in chosen:
            start = radius.begin(layer, leaves) if isinstance(radius, Shrink) else None
            memories[layer.kernels[0]] = _Memory(layer.zeros(leaves), layer.zeros(leaves), start)
        return _ball_state(params, step, memories)

    def update_fn(
        updates: Any, state: KeepParamsInL1InfBallState, params: Any = None
    ) -> tuple[Any, KeepParamsInL1InfBallState]:
        _check_params(params)
        return _into_ball(rules, updates, state, params)

    return optax.GradientTransformation(init_fn, update_fn)


def _check_params(params: Any) -> None:
    if params is None:
        raise ValueError(
            "params=None: the projection needs the parameters the updates will be added to. "
            "Call update(updates, state, params)"
        )


def _check_state(state: Any, kind: type) -> None:
    if not isinstance(state, kind):
        raise ValueError(
            f"state is a {type(state).__name__}, not the {kind.__name__} that init(params) of this "
            "transformation returned. Call update(updates, state, params), in this order"
        )


def _optax_placeholder() -> type:
    """The type of what `optax.tree.map_params` gives to ``init`` in the place of parameters."""
    seen: list[type] = []
    optax.tree.map_params(lambda params: seen.append(type(params)), lambda x: x, None)
    return seen[0]


PLACEHOLDER = _optax_placeholder()


def _check_belongs(state: KeepParamsInL1InfBallState, chosen: list[tuple[Layer, Radius]]) -> None:
    """Raises a ValueError unless the state is of these layers and radii."""
    has = {(path, jnp.shape(x)) for path, x in _layers.named_leaves(state.thresholds)}
    wanted = {(layer.leaf_path, layer.columns_shape) for layer, _ in chosen}
    for path, _ in sorted(has ^ wanted):
        raise ValueError(
            f"state has thresholds of shape {dict(has).get(path)} for {path!r}, but c, layers and "
            f"params ask for {dict(wanted).get(path)}: take the state from init(params) of this "
            "transformation, with these params"
        )
    shrunk = {layer.leaf_path for layer, radius in chosen if isinstance(radius, Shrink)}
    has_start = {path for path, memory in _memories([state]).items() if memory.shrinking}
    for path in sorted(shrunk ^ has_start):
        what, asked = ("no", "one") if path in shrunk else ("a", "none")
        raise ValueError(
            f"state has {what} start of a radius that shrinks for {path!r}, and c asks for "
            f"{asked}: take the state from init(params) of this transformation"
        )


class _Memory(NamedTuple):
    """What the state holds of one layer; `KeepParamsInL1InfBallState` says what that is."""

    threshold: jax.Array
    largest_threshold: jax.Array
    shrinking: ShrinkState | None


def _memories(balls: Sequence[KeepParamsInL1InfBallState]) -> dict[str, _Memory]:
    """What states hold of their layers, by the paths of their kernels."""
    memories = {}
    for ball in balls:
        largest = dict(_layers.named_leaves(ball.largest_thresholds))
        starts, held_from = (
            dict(_layers.named_leaves(field)) for field in ball.shrinking or ({}, {})
        )
        for path, threshold in _layers.named_leaves(ball.thresholds):
            shrinks = path in starts
            shrinking = ShrinkState(starts[path], held_from[path]) if shrinks else None
            memories[path] = _Memory(threshold, largest[path], shrinking)
    return memories


def updates_until_held(balls: Sequence[KeepParamsInL1InfBallState]) -> dict[str, int]:
    """After how many updates radii had fallen, by the paths of their kernels, as `ShrinkState`."""
    return {
        path: int(jnp.max(memory.shrinking.held_from))
        for path, memory in _memories(balls).items()
        if memory.shrinking is not None
    }


def _ball_state(
    params: Any, step: jax.Array, memories: dict[int, _Memory]
) -> KeepParamsInL1InfBallState:
    """The state, of what it holds for each layer, by the index of the layer's kernel."""
    nested = functools.partial(_layers.nested, params)
    shrinking = {i: m.shrinking for i, m in memories.items() if m.shrinking is not None}
    fields = (
        nested({i: getattr(own, field) for i, own in shrinking.items()})
        for field in ShrinkState._fields
    )
    return KeepParamsInL1InfBallState(
        step,
        nested({i: memory.threshold for i, memory in memories.items()}),
        nested({i: memory.largest_threshold for i, memory in memories.items()}),
        ShrinkState(*fields) if shrinking else (),
    )


def as_schedules(
    chosen: list[tuple[Layer, Radius]],
    params: Any,
    balls: Sequence[KeepParamsInL1InfBallState] = (),
) -> list[tuple[Layer, Radius]]:
    """The layers, schedules in the place of radii that shrink.

    How far these are is in ``balls``; without them they start from the norms of ``params``.
    """
    leaves, _ = _layers.flatten(params)
    memories = _memories([ball for ball in balls if ball.step > 0])

    def schedule(layer: Layer, radius: Radius) -> Radius:
        if isinstance(radius, Prune):
            return radius.c
        if not isinstance(radius, Shrink):
            return radius
        memory = memories.get(layer.leaf_path)
        if memory is None or memory.shrinking is None:
            first = layer.for_columns(radius.first(radius.begin(layer, leaves)))
            return lambda step: first
        state = memory.shrinking
        return lambda step: layer.for_columns(radius.radius(state, step))

    return [(layer, schedule(layer, radius)) for layer, radius in chosen]


class Kept(NamedTuple):
    """What one projection of a transformation was told to keep.

    Attributes:
        radii: For each constrained layer, under the path of its kernel, its radius; None if that
            is read from the state.
        hold_zeros_from: As in :func:`keep_params_in_l1inf_ball`.
    """

    radii: dict[str, Radius]
    hold_zeros_from: int | None


# A transformation is two closures, and c is in them. Their `init` tells what it is, if it is asked.
_told: ContextVar[list[Kept] | None] = ContextVar("told", default=None)


def kept_by(tx: optax.GradientTransformation, params: Any) -> list[Kept]:
    """What the projections in ``tx`` were told, as far as they do not read it from their state."""
    told: list[Kept] = []
    token = _told.set(told)
    try:
        jax.eval_shape(lambda params: tx.init(params), params)  # a function of its own: not cached
    finally:
        _told.reset(token)

    def is_known(x: Any) -> bool:
        return not any(map(is_traced, vars(x).values() if isinstance(x, Shrink | Prune) else [x]))

    return [
        Kept(
            {path: c if is_known(c) else None for path, c in ball.radii.items()},
            ball.hold_zeros_from if is_known(ball.hold_zeros_from) else None,
        )
        for ball in told
    ]


def ball_states(state: Any) -> list[KeepParamsInL1InfBallState]:
    """What projections keep, wherever in an optimizer's state they are."""

    def is_ball(x: Any) -> bool:
        return isinstance(x, KeepParamsInL1InfBallState)

    return [x for x in jax.tree.leaves(state, is_leaf=is_ball) if is_ball(x)]


def optimizer_state(state: Any) -> Any:
    """An optimizer's state, also where an `nnx.Optimizer` or a `TrainState` holds it."""
    holder = hasattr(state, "tx") and hasattr(state, "opt_state")
    return _layers.unboxed(state.opt_state if holder else state)


def balls_of(state: Any) -> list[KeepParamsInL1InfBallState]:
    """What the projections keep that an optimizer's state holds; at least one.

    Raises:
        ValueError: Nothing in ``state`` keeps parameters in a ball.
    """
    balls = ball_states(optimizer_state(state))
    if not balls:
        raise ValueError(
            f"state, a {type(state).__name__}, holds no state of keep_params_in_l1inf_ball or "
            "constrain: give the optimizer's state that belongs to params"
        )
    return balls


def last_steps(balls: Sequence[KeepParamsInL1InfBallState]) -> dict[str, int]:
    """At which step the last update has read a layer's schedule for c; 0 before the first.

    By the path of the layer's kernel: two transformations may count different updates.
    """
    return {
        path: max(int(ball.step) - 1, 0)
        for ball in balls
        for path, _ in _layers.named_leaves(ball.thresholds)
    }


def _into_ball(
    rules: _Rules,
    updates: Any,
    state: KeepParamsInL1InfBallState,
    params: Any,
    slopes: Any = None,
) -> tuple[Any, KeepParamsInL1InfBallState]:
    """Updates that end in the ball, and the next state; slopes as `Request` has them, or None."""
    _check_state(state, KeepParamsInL1InfBallState)
    leaves, structure = _layers.flatten(updates)
    params_leaves, params_structure = _layers.flatten(params)
    if structure != params_structure:
        raise ValueError(
            f"updates have the structure {structure}, but params {params_structure}: "
            "pass the parameters that the gradients belong to"
        )
    slope_leaves = None if slopes is None else _layers.flatten(slopes)[0]
    chosen = _layers.constrained_layers(params, rules.c, rules.layers)
    _check_belongs(state, chosen)
    memories = _memories([state])
    stepped, slopes_of = [], []
    for layer, _ in chosen:
        operands = layer.columns(params_leaves), layer.columns(leaves)
        if rules.hold_zeros_from is not None:
            is_held = state.step >= rules.hold_zeros_from
            operands = unmoved(operands, tuple((p == 0) & is_held for p in operands[0]))
        stepped.append(operands)
        slopes_of.append(None if slope_leaves is None else layer.columns(slope_leaves))
    asked, requests, fallen, after = [], [], [], {}
    for (layer, radius), slope, operands in zip(
        chosen, slopes_of, pruned(chosen, stepped, slopes_of, state.step), strict=True
    ):
        memory = memories[layer.leaf_path]
        if isinstance(radius, Prune) and radius.is_free:
            layer.put(operands[1], leaves)
            after[layer.kernels[0]] = memory
            continue
        c, shrinking, operands = _at_step(layer, radius, memory.shrinking, state.step, operands)
        request = Request(
            operands=operands,
            c=c,
            axes=layer.reduction_axes,
            start=memory.threshold,
            slope=None if slope is None else _at_most_one(slope, layer.reduction_axes),
            near=_near(rules.stickiness, operands[0]) if rules.sticks else 0.0,
        )
        asked.append(layer)
        requests.append(request)
        fallen.append(shrinking)
    for layer, request, shrinking, projected in zip(
        asked, requests, fallen, rules.project(_all_stepped, requests), strict=True
    ):
        land = functools.partial(_landing_update, inside=projected.inside)
        landing = tuple(map(land, *request.operands, projected.parts))
        largest = jnp.maximum(memories[layer.leaf_path].largest_threshold, projected.threshold)
        largest = jnp.where(state.step > 0, largest, 0)
        if rules.sticks:
            landing = _with_zeros_that_stick(landing, request, projected, rules.stickiness, largest)
        layer.put(landing, leaves)
        after[layer.kernels[0]] = _Memory(projected.threshold, largest, shrinking)
    ball = _ball_state(params, optax.safe_increment(state.step), after)
    return jax.tree.unflatten(structure, leaves), ball


def _at_step(
    layer: Layer,
    radius: Radius,
    shrinking: ShrinkState | None,
    step: jax.Array,
    operands: Operands,
) -> tuple[Any, ShrinkState | None, Operands]:
    """What a radius is at an update, its state then, and the operands, its zeros held."""
    if not isinstance(radius, Shrink) or shrinking is None:
        return radius_at(radius, step), None, operands
    zeros = layer.zero_weights(operands[0])
    shrinking = radius.advance(shrinking, step, layer.share_of_zeros(zeros))
    if radius.hold:
        is_held = layer.for_entries(step >= shrinking.held_from)
        operands = unmoved(operands, tuple(zero & is_held for zero in zeros))
    return layer.for_columns(radius.radius(shrinking, step)), shrinking, operands


def _near(stickiness: float | jax.Array, parts: Arrays) -> jax.Array:
    """By how much of c a column may be inside and still count as on its sphere.

    By what sticking may have taken from it, and by rounding, towards zero in its own format.
    """
    rounding = max(1e-5, *(4 * float(jnp.finfo(part.dtype).eps) for part in parts))
    return jnp.where(jnp.asarray(stickiness) > 0, jnp.maximum(stickiness, rounding), 0)


def _with_zeros_that_stick(
    landing: Arrays,
    request: Request,
    projected: Projected,
    stickiness: float | jax.Array,
    largest: jax.Array,
) -> Arrays:
    """The updates, but for zeros that they would lift by next to nothing.

    In a column on its sphere a zero stays zero unless it would be a survivor in a ball smaller by
    this share, too. A threshold higher by x takes x times the slope of the norm off it, so that
    ball's is higher by ``stickiness c / slope``: that times its own slope an entry has to reach.

    Not before steps have become small. While they are large, one that is at zero by chance must be
    able to leave it, and a step that is held back would be lost: an entry that the optimum needs
    rises by little at a time. Thresholds are proportional to steps, so they tell.
    """
    c = jnp.broadcast_to(request.c, projected.threshold.shape)
    rise = stickiness * jnp.expand_dims(c, request.axes).astype(projected.slope.dtype)
    rise /= jnp.where(projected.slope > 0, projected.slope, 1)
    steps_are_small = projected.threshold < _SMALL * largest
    sticks = projected.on_sphere & jnp.expand_dims(steps_are_small, request.axes)
    rise = jnp.where(sticks, rise, 0)
    slopes = request.slope or (None,) * len(landing)

    def stick(update: jax.Array, p: jax.Array, w: jax.Array, slope: jax.Array | None) -> jax.Array:
        least = rise if slope is None else rise * slope
        return jnp.where((p == 0) & (jnp.abs(w.astype(least.dtype)) <= least), 0, update)

    return tuple(map(stick, landing, request.operands[0], projected.parts, slopes))


def _at_most_one(slopes: Arrays, axes: Axes) -> Arrays:
    """Slopes, scaled to what a projection expects; all alike in a column where nothing moves."""
    tops = (jnp.max(jnp.abs(s), axes, keepdims=True, initial=0) for s in slopes)
    top = functools.reduce(jnp.maximum, tops)
    moves = (top > 0) & (top < jnp.inf)
    scale, least = 1 / jnp.where(moves, top, 1), jnp.where(moves, 2.0**-60, 1)
    return tuple(jnp.clip(jnp.abs(s) * scale, least, 1) for s in slopes)


def _all_stepped(ps: Arrays, us: Arrays) -> Arrays:
    return tuple(map(_stepped, ps, us))


@jax.custom_jvp
@jax.jit
def _stepped(p: jax.Array, u: jax.Array) -> jax.Array:
    """The bits that `optax.apply_updates` makes of p and u, whatever the compiler does here.

    Left to itself it may fuse p + u with the product u comes from, rounding once where the real sum
    rounds twice, or keep a 16-bit sum in 32. Clipping u to finite numbers stops the one, saying how
    to round stops the other.
    """
    dtype = wide_dtype(p.dtype, u.dtype)
    info = jnp.finfo(dtype)
    exact = round_to(u.astype(dtype), u.dtype)
    finite = p.astype(dtype) + jnp.clip(exact, info.min, info.max)
    total = jnp.where(jnp.isinf(exact), exact, finite)
    return round_to(total, p.dtype).astype(p.dtype)


@_stepped.defjvp
def _stepped_jvp(primals: Arrays, tangents: Arrays) -> Pair:
    (p, u), (dp, du) = primals, tangents
    return _stepped(p, u), dp + du.astype(dp.dtype)


@jax.custom_jvp
@jax.jit
def _landing_update(p: jax.Array, u: jax.Array, w: jax.Array, inside: jax.Array) -> jax.Array:
    """The update that takes p to its projection w, or next to it on the side of zero.

    The difference w - p is rounded, by half a unit in its last place; so one unit towards zero, the
    sum cannot round to beyond w. If that crosses zero, w is within a unit of p's last place of it,
    and zero is where the parameter goes: p - p is exact. A column ``inside`` keeps its update u.
    """
    dtype = jnp.result_type(p, u)
    wide = wide_dtype(dtype)
    # As if w were positive: products with a sign, and with eps, are exact, however they are fused.
    sign = jnp.copysign(jnp.ones((), wide), w.astype(wide))
    p_, w_ = p.astype(wide) * sign, jnp.abs(w.astype(wide))

    def lands(step: jax.Array) -> jax.Array:
        x = round_to(p_ + step, p.dtype)
        return (x >= 0) & (x <= w_)

    nearest = round_to(w_ - p_, dtype)
    shorter = round_to(nearest - jnp.abs(nearest) * float(jnp.finfo(dtype).eps), dtype)
    step = jnp.where(lands(shorter), shorter, -p_)
    step = jnp.where(lands(nearest) | jnp.isnan(w), nearest, step) * sign
    return jnp.where(inside, round_to(u.astype(wide), u.dtype), step).astype(dtype)


@_landing_update.defjvp
def _landing_update_jvp(primals: Arrays, tangents: Arrays) -> Pair:
    p, u, w, inside = primals
    dp, _, dw, _ = tangents
    update = _landing_update(p, u, w, inside)
    return update, (dw - dp).astype(update.dtype)
