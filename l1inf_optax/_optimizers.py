"""What is known of optimizers by the names of their states; Optax does not export all of these.

One line in `MOMENTS` teaches the library an optimizer. What has no metric has a line in `ADVICE`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """The fields of a state that the updates depend on.

    Attributes:
        first: What a step without a gradient starts without: running means of gradients or of
            updates, in which the updates are linear.
        second: What the metric is made of, such as running means of squares. A step turns each
            entry into an affine function of itself, which `_metric` inverts from its values at 0
            and 1. The first of the fields is like the parameters.
        fixed_fields: Values that make a step take over some of the second moments it is given.
    """

    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    fixed_fields: tuple[tuple[str, int], ...] = ()


# `diagnosis` warns of those with second moments where nothing reads their metric.
MOMENTS = {
    "ScaleByAdamState": Moments(("mu",), ("nu",)),  # adam(w), nadam(w), radam, yogi, lamb, adamax
    "ScaleByAmsgradState": Moments(("mu", "nu"), ("nu_max",)),  # nu only raises nu_max
    "ScaleByBeliefState": Moments(("mu",), ("nu",)),
    "ScaleByNovogradState": Moments(("mu",), ("nu",)),
    "ScaleByRmsState": Moments((), ("nu",)),
    "ScaleByRmsWithCountState": Moments((), ("nu",)),
    "ScaleByRStdDevState": Moments((), ("mu", "nu")),
    "ScaleByRStdDevWithCountState": Moments((), ("mu", "nu")),
    "ScaleByRssState": Moments((), ("sum_of_squares",)),
    "ScaleByAdaDeltaState": Moments((), ("e_g",)),
    # Adafactor's first steps forget everything before them: take one from later on.
    "FactoredState": Moments((), ("v_row", "v_col", "v"), (("count", 10**6),)),
    "ScaleByAdanState": Moments(("m", "v", "g"), ("n",)),
    "ScaleByAdemamixState": Moments(("m1", "m2"), ("nu",)),
    "ScaleBySimplifiedAdEMAMixState": Moments(("m",), ("n",)),
    "ScaleByOptimisticGradientState": Moments(("previous_gradient",)),
    "ScaleBySM3State": Moments(("nu",)),  # its second moments are known only to the step itself
    "TraceState": Moments(("trace",)),
    "EmaState": Moments(("ema",)),
    "MultiStepsState": Moments(("acc_grads",)),
    "ApplyEvery": Moments(("grad_acc",)),
}
WRAPPERS = {
    "MultiStepsState": "inner_opt_state",
    "ApplyIfFiniteState": "inner_state",
    "ConditionallyTransformState": "inner_state",
    "ConditionallyMaskState": "inner_state",
    "InjectHyperparamsState": "inner_state",
    "InjectStatefulHyperparamsState": "inner_state",
    "MaskedState": "inner_state",
    "MultiTransformState": "inner_states",
    "PartitionState": "inner_states",
    "SplitRealAndImaginaryState": "inner_state",
    "WithScalesState": "inner_state",
}
# Those that search along an update for its length: the metric stays what it is.
LINE_SEARCHES = {"ScaleByBacktrackingLinesearchState", "ScaleByZoomLinesearchState"}
# Those that leave the metric as it is: they scale whole updates or leaves, add noise, or look on.
NEUTRAL = LINE_SEARCHES | {
    "AddNoiseState",
    "DoGState",
    "DoWGState",
    "MonitorState",
    "ReduceLROnPlateauState",
    "ScaleByDistanceOverGradientsState",
    "ScaleByScheduleState",
    "SnapshotState",
    "WeightDecaySchedule",
    "ZeroNansState",
}
# Those that may step differently in different leaves, or adapt without second moments of their own.
UNEVEN = {
    *("MaskedState", "MultiTransformState", "PartitionState", "ScaleBySM3State", "WithScalesState")
}
# Those that do not step along the gradient, even within a leaf, each with a field that is like the
# parameters.
UNEUCLIDEAN = {
    name: moments.second[0]
    for name, moments in MOMENTS.items()
    if moments.second and name != "ScaleByNovogradState"
} | {"ScaleBySM3State": "nu", "ScaleByLionState": "mu", "MuonState": "mu"}
A_FUNCTION = (
    "metric=f, where f(state, params) returns the positive weights d of steps -m / d, such as "
    "lambda state, params: jax.tree.map(lambda v: jnp.sqrt(v) + 1e-8, optax.tree.get(state, 'nu'))"
)
NO_METRIC = (
    "there is no metric to project in, and after the Euclidean projection most of what it learns "
    "is lost. Use another optimizer; if it must be this one, metric='euclidean' keeps it feasible"
)
_SIGNS = f"It steps by signs: {NO_METRIC}"
_MATRICES = f"It steps by whole matrices: {NO_METRIC}"
_AVERAGES = (
    "It averages points of the ball, which brings back entries that were zero. Constrain {} "
    "instead, with a learning rate that decays"
)
# What to write for what is known to have no metric, or none that can be read off its state.
ADVICE = {
    "COCOBState": f"It bets on every coordinate anew: {NO_METRIC}",
    "DAdaptAdamWState": f"It is adaptive: give {A_FUNCTION.replace('nu', 'exp_avg_sq')}",
    "DifferentiallyPrivateAggregateState": "It takes a gradient for each example. Put it in front: "
    "optax.chain(differentially_private_aggregate(...), l1inf.constrain(optax.sgd(0.1), c))",
    "GaLoreState": _MATRICES,
    "HutchinsonState": "It returns no updates: constrain the optimizer that uses its estimate",
    "LookaheadState": "Put it around: optax.lookahead(l1inf.constrain(optimizer, c), 6, 0.5). Its "
    "means of points in the ball are in the ball, but for rounding",
    "MadgradState": "It averages gradients from the start on, as dual averaging does. Constrain "
    "optax.adagrad(...) instead",
    "MechanicState": "It moves from where it started, not from where the projection put it. "
    "Constrain the optimizer inside, with a learning rate of its own",
    "MomoAdamState": f"It is adaptive: give {A_FUNCTION.replace('nu', 'exp_avg_sq')}",
    "MomoState": "It steps along a running mean of gradients, all entries alike: give "
    "metric='euclidean'",
    "MuonState": _MATRICES,
    "ProdigyState": f"It is adaptive: give {A_FUNCTION.replace('nu', 'exp_avg_sq')}",
    "SAMState": "It leaves the ball on purpose, for a gradient elsewhere. Put it around, with "
    "opaque_mode=True: optax.contrib.sam(l1inf.constrain(optimizer, c), adversary, "
    "opaque_mode=True)",
    "ScaleByLBFGSState": _MATRICES,
    "ScaleByLionState": _SIGNS,
    "ScaleByRpropState": _SIGNS,
    "ScheduleFreeState": _AVERAGES.format("optax.adamw(...) or optax.sgd(...)"),
    "SophiaState": "It clips what it divides by the curvature, so that most of its steps are "
    f"signs: {NO_METRIC}",
}


def is_euclidean(state: Any) -> bool:
    """Whether a state that `_trial` lets pass is of steps along the gradient within a leaf."""
    return all(
        not MOMENTS.get(name, Moments()).second and name not in UNEVEN for name, _ in links(state)
    )


def links(state: Any) -> Iterator[tuple[str, Any]]:
    """The states of a chain's links, and of what these wrap, by name, outer ones first."""
    name = type(state).__name__
    if not hasattr(state, "_fields"):
        if isinstance(state, dict | list | tuple):
            for part in _sorted(state).values() if isinstance(state, dict) else state:
                yield from links(part)
            return
        if jax.tree.leaves(state):
            yield name, state
        return
    yield name, state
    if name in WRAPPERS:
        yield from links(getattr(state, WRAPPERS[name]))


def _sorted(state: dict[Any, Any]) -> dict[Any, Any]:
    """By key, as JAX sorts a dict wherever it takes one apart: of two states one may be fresh."""
    return dict(sorted(state.items()))


def moments_in(state: Any, kind: str) -> list[Any]:
    """The first or second moments in a state, in the order of its links."""
    return [
        getattr(link, field)
        for name, link in links(state)
        if name in MOMENTS
        for field in getattr(MOMENTS[name], kind)
    ]


def with_moments(state: Any, first: Sequence[Any], second: Sequence[Any]) -> Any:
    """The state with other moments."""
    return _replaced(state, {"first": iter(first), "second": iter(second)})


def varied(state: Any) -> Any:
    """The state without first moments, its second ones unevenly smaller."""

    def smaller(x: jax.Array) -> jax.Array:
        return x * jnp.linspace(0.1, 1, x.size, dtype=x.dtype).reshape(x.shape)

    none = jax.tree.map(jnp.zeros_like, moments_in(state, "first"))
    return with_moments(state, none, jax.tree.map(smaller, moments_in(state, "second")))


def _replaced(state: Any, moments: dict[str, Iterator[Any]]) -> Any:
    name = type(state).__name__
    if not hasattr(state, "_fields"):
        if isinstance(state, dict):
            changed = {k: _replaced(x, moments) for k, x in _sorted(state).items()}
            return type(state)(changed)
        if isinstance(state, list | tuple):
            return type(state)(_replaced(x, moments) for x in state)
        return state
    own = MOMENTS.get(name, Moments())
    changed = {field: next(moments["first"]) for field in own.first}
    changed |= {field: next(moments["second"]) for field in own.second}
    changed |= {field: jnp.full_like(getattr(state, field), x) for field, x in own.fixed_fields}
    if name in WRAPPERS:
        changed[WRAPPERS[name]] = _replaced(getattr(state, WRAPPERS[name]), moments)
    return state._replace(**changed)
