"""What is wrong with a setup although nothing raises an error, each with its cause and cure.

Wrong use that can be told where it happens is a ValueError there. What is left shows itself only in
the whole: in the order of a chain, in where the parameters lie, in what a step does to them. One
function looks for each, and says nothing unless the evidence is strong.
"""

import dataclasses
import html
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from l1inf_optax import _layers, _optimizers
from l1inf_optax._layers import Layer, Layers, Radii, Radius, radius_at
from l1inf_optax._projection.arguments import check_radius, is_traced
from l1inf_optax._pruning import Prune
from l1inf_optax._schedules import STILL_FALLING, Shrink
from l1inf_optax._transform import (
    ConstrainState,
    KeepParamsInL1InfBallState,
    Kept,
    as_schedules,
    ball_states,
    kept_by,
    last_steps,
    optimizer_state,
    updates_until_held,
)
from l1inf_optax.sparsity import ON_BOUNDARY

Constrained = list[tuple[Layer, Radius]]

_OUTPUT_NAMES = {"classifier", "head", "lm_head", "logits", "output", "output_layer", "readout"}
_BATCH_NORM = re.compile(r"batch_?norm|(^|_)bn(_?\d|$)", re.IGNORECASE)
_LEAST_SPREAD = 0.01  # of outputs over inputs: losses notice about 1
_LEAST_SIGNAL = 1e-3  # what is left of an input's differences after constrained layers in a row
_MOST_BIAS = 0.9  # of a column's norm
_ROUNDED = 1 + 1e-5  # a schedule's float32 depends on how it is compiled
_SEVERAL = 4  # entries of a column that a step should not reduce to one
_ALIKE = 1e-5  # two radii, or the norms of columns projected to one, to rounding
_FAR = tuple(10**k for k in range(10))  # steps at which schedules are looked at
_VANISHED = 1e-30  # of the first radius: an exponential decay that is out of exponents
_ENOUGH = 100  # updates after which zeros should show, if nobody says how many are planned
_FEW_ZEROS = 0.5  # of the weights


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong, or probably so.

    Attributes:
        name: What it is, in a word or two; the troubleshooting page has an entry of this name.
        severity: ``"error"`` if the constraint does not hold or training has failed, ``"warning"``
            if it may be meant.
        layers: The paths of the layers it is about; empty if it is about all.
        cause: What was seen, and what causes it.
        cure: What to do.
    """

    name: str
    severity: str
    layers: tuple[str, ...]
    cause: str
    cure: str

    def __str__(self) -> str:
        text = f"{self.severity}: {self.name}{_where(self.layers)}. {self.cause} {self.cure}"
        return "\n".join(textwrap.wrap(text, 100, subsequent_indent="  "))


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; prints as a list and renders as HTML in Jupyter.

    Attributes:
        findings: The findings, errors first; empty if nothing is wrong.
        constrained: Paths of the layers that are constrained.
        free: Paths of the layers that are not, and of what else could hold weights: arrays of two
            axes or more, and biases without a kernel, that belong to no layer.
    """

    findings: tuple[Finding, ...]
    constrained: tuple[str, ...]
    free: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self._head(), *(map(str, self.findings))])

    def _repr_html_(self) -> str:
        def item(finding: Finding) -> str:
            what = html.escape(f"{finding.severity}: {finding.name}")
            rest = f"{_where(finding.layers)}. {finding.cause} {finding.cure}"
            return f"<li><b>{what}</b>{html.escape(rest)}</li>"

        head = "<br>".join(map(html.escape, self._head()))
        return f"<p>{head}</p><ul>{''.join(map(item, self.findings))}</ul>"

    def _head(self) -> list[str]:
        head = [f"constrained: {_some(self.constrained)}", f"free: {_some(self.free)}"]
        return head if self.findings else [*head, "nothing wrong found"]


def diagnose(
    tx: optax.GradientTransformation,
    params: Any,
    c: Radii,
    *,
    layers: Layers = None,
    state: Any = None,
    grads: Any = None,
    steps: int | None = None,
    outputs: Any = None,
) -> Diagnosis:
    """Looks for mistakes that raise no error, and names cause and cure of each.

    Call it once before training, with gradients if there are some, and again when training goes
    wrong. It looks at the order of the chain, the optimizer beside the projection, which layers are
    constrained, at what radius and for how long, and where the columns lie in the ball; with
    ``grads`` also at what one step does, and with ``outputs`` at whether they vary. No finding is
    no proof that all is well. Nothing is emitted as a Python warning: those are shown once only,
    and a question is answered by what it returns.

    Args:
        tx: The whole transformation, as it is trained with; or the `nnx.Optimizer` or `TrainState`
            that has it, whose state is then taken, too.
        params: Pytree of parameters, or a module that is one: freshly projected ones, or those of
            any later step.
        c: As ``tx`` has it; see :func:`keep_params_in_l1inf_ball`.
        layers: As ``tx`` has it.
        state: The optimizer's state that belongs to ``params``, or ``None`` before training.
        grads: Gradients at ``params``, or ``None``. One step is taken with them, by
            ``tx.update(grads, state, params)``, and thrown away.
        steps: The number of updates that are planned, or ``None``. Then schedules are looked at up
            to there, and zeros are expected in the end.
        outputs: What the network makes of some inputs with ``params``, an array with the examples
            along its first axis, or ``None``. They should differ.

    Returns:
        A :class:`Diagnosis`.

    Raises:
        ValueError: as :func:`keep_params_in_l1inf_ball`; ``tx`` is no transformation; ``steps`` is
            not positive; ``c`` and ``layers`` constrain others than ``tx`` does; ``outputs`` are
            not those of two inputs at least.

    Example:
        >>> import jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 1))}}
        >>> c = {"Dense_*": 1.0}
        >>> tx = optax.chain(optax.adam(1e-3), l1inf.keep_params_in_l1inf_ball(c))
        >>> print(l1inf.diagnose(tx, l1inf.project_params(params, c), c))
        constrained: Dense_0
        free: head
        warning: wrong optimizer in Dense_0. The Euclidean projection follows an optimizer that does
          not step along the gradient (ScaleByAdamState): it can take away what the step has
          learned. Use l1inf.constrain(optimizer, c), which projects in the optimizer's own metric,
          or says that there is none.
    """
    if hasattr(tx, "tx") and hasattr(tx, "opt_state"):
        tx, state = tx.tx, tx if state is None else state
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise ValueError(
            f"tx is a {type(tx).__name__}, not an optax transformation: call diagnose(tx, params, "
            "c), in this order"
        )
    if steps is not None and not steps > 0:
        raise ValueError(f"steps={steps!r}: give the number of updates that are planned, or None")
    _layers.check_params(params)
    _layers.check_radii(c)
    if grads is not None:  # which leave out what of a module is not trained
        grads = _layers.unboxed(grads)
        params = _layers.in_structure_of(grads, params)
    found = _layers.find_layers(params, layers)
    constrained = _layers.constrained_layers(params, c, layers)
    trained = params if grads is not None else _layers.trainable(params)
    kept = kept_by(tx, trained)
    state = tx.init(trained) if state is None else optimizer_state(state)
    balls = ball_states(state)
    _check_same(balls, constrained)
    step = int(balls[0].step) if balls else 0
    told, own = as_schedules(constrained, trained, balls), _as_kept(constrained, kept)
    constrained, hold_from = as_schedules(own, trained, balls), _hold_from(own, kept)
    columns = _columns(params, constrained, last_steps(balls))  # where the last update left them
    # Where one finding explains what another would say, it alone is right.
    dead, elsewhere = [*_dead_units(columns)], [*_projected_elsewhere(columns, step)]
    explained = {path for finding in elsewhere for path in finding.layers}
    others = [x for x in columns if x.layer.path not in explained]
    findings = [
        *_not_kept(balls),
        *_not_last(state),
        *_another_c(told, constrained, step),
        *_not_finite(columns, "parameters"),
        *elsewhere,
        *_outside(others, step),
        *_optimizer(state, constrained),
        *_output_layer(found, constrained, c),
        *_vanishing_c(constrained, steps),
        *(_small_c(columns) if outputs is None else _constant_outputs(outputs, constrained)),
        *([] if dead or elsewhere else _large_c(columns, own)),
        *dead,
        *_biases(columns),
        *_few_zeros(columns, hold_from, step, steps),
        *_held_from_start(columns, kept),
        *_never_held(own, hold_from, balls, steps),
        *_batch_norm(params, constrained),
        *_weight_norm(params, constrained),
    ]
    if grads is not None:
        findings += _not_finite(_columns(grads, constrained, {}), "gradients")
        updates, after = jax.jit(tx.update)(grads, state, params)
        balls = ball_states(optimizer_state(after))
        stepped = _columns(
            optax.apply_updates(params, updates),
            as_schedules(own, trained, balls),
            last_steps(balls),
        )
        findings += _step(columns, stepped, seen=not balls or _links_after(state) > 0)
    findings.sort(key=lambda finding: finding.severity)
    paths = tuple(layer.path for layer, _ in constrained)
    free = tuple(layer.path for layer in found if layer.path not in paths)
    free += tuple(_layers.in_no_layer(params, found))
    return Diagnosis(tuple(findings), paths, free)


# --- what is looked at ----------------------------------------------------------------------------


class _Columns(NamedTuple):
    """A constrained layer at one step.

    Attributes:
        layer: Where it is.
        c: Its radius, or one for each column.
        bias: Magnitudes of the biases, in one row or none.
        weights: Magnitudes of the weights, in rows.
        rounding: By how much of c the norm of a column on the boundary may be below it.
    """

    layer: Layer
    c: np.ndarray
    bias: np.ndarray
    weights: np.ndarray
    rounding: float

    @property
    def norms(self) -> np.ndarray:
        return self.bias.sum(0) + self.weights.sum(0)

    @property
    def entries(self) -> np.ndarray:
        """How many entries of each column are not zero."""
        return np.sum(self.bias > 0, 0) + np.sum(self.weights > 0, 0)


def _columns(params: Any, constrained: Constrained, steps: Mapping[str, int]) -> list[_Columns]:
    """The layers, each at the step under the path of its kernel, or at 0."""
    leaves, _ = _layers.flatten(params)

    def rows(layer: Layer, x: Any) -> np.ndarray:
        magnitudes, axes = np.abs(np.asarray(x, np.float64)), layer.reduction_axes
        return np.moveaxis(magnitudes, axes, range(len(axes))).reshape(-1, *layer.columns_shape)

    columns = []
    for layer, radius in constrained:
        step = steps.get(layer.leaf_path, 0)
        c = np.asarray(radius_at(radius, step), np.float64)
        if callable(radius):
            c = c * _ROUNDED
        matrix = np.concatenate([rows(layer, x) for x in layer.columns(leaves)])
        first = int(layer.has_bias_row or layer.bias is not None)
        rounding = 2 * ON_BOUNDARY[np.dtype(leaves[layer.kernels[0]].dtype).itemsize]
        columns.append(_Columns(layer, c, matrix[:first], matrix[first:], rounding))
    return columns


def _as_kept(constrained: Constrained, kept: Sequence[Kept]) -> Constrained:
    """The layers with the radii that the transformation has, where these can be read."""
    radii = {path: radius for ball in kept for path, radius in ball.radii.items()}
    own = [(layer, radii.get(layer.leaf_path), c) for layer, c in constrained]
    return [(layer, c if radius is None else radius) for layer, radius, c in own]


def _check_same(balls: Sequence[KeepParamsInL1InfBallState], constrained: Constrained) -> None:
    kept = {path for ball in balls for path, _ in _layers.named_leaves(ball.thresholds)}
    told = {layer.leaf_path for layer, _ in constrained}
    if balls and kept != told:
        raise ValueError(
            f"c and layers constrain {_some(sorted(told))}, but tx constrains "
            f"{_some(sorted(kept))}: give the c and layers that tx was made with"
        )


# --- the transformation ---------------------------------------------------------------------------


def _not_kept(balls: Sequence[KeepParamsInL1InfBallState]) -> Iterator[Finding]:
    if not balls:
        yield Finding(
            "not kept",
            "error",
            (),
            "Nothing in tx keeps the parameters in the ball: the first step leaves it.",
            "End the chain with l1inf.keep_params_in_l1inf_ball(c), or use "
            "l1inf.constrain(optimizer, c).",
        )


def _not_last(state: Any) -> Iterator[Finding]:
    after = _links_after(state)
    if after:
        yield Finding(
            "not last",
            "error",
            (),
            f"What comes after the projection in its chain ({after} more) changes the updates "
            "again: the parameters will be neither feasible nor sparse.",
            "Put it last: optax.chain(..., l1inf.keep_params_in_l1inf_ball(c)).",
        )


def _links_after(state: Any) -> int:
    """How many links of chains come after a projection."""
    if isinstance(state, KeepParamsInL1InfBallState) or not ball_states(state):
        return 0
    # A chain's state is a plain tuple, a named chain's an OrderedDict; others wrap or branch.
    in_order = not hasattr(state, "_fields") and type(state) is not dict
    parts = list(state.values() if isinstance(state, Mapping) else state)
    holds = [i for i, part in enumerate(parts) if ball_states(part)]
    after = len(parts) - 1 - holds[-1] if in_order else 0
    return after + max(_links_after(parts[i]) for i in holds)


def _optimizer(state: Any, constrained: Constrained) -> Iterator[Finding]:
    def ends(x: Any) -> bool:
        return isinstance(x, ConstrainState) or type(x).__name__ in _optimizers.UNEUCLIDEAN

    names, paths = set(), set()
    for part in jax.tree.leaves(state, is_leaf=ends):
        name = type(part).__name__
        if name in _optimizers.UNEUCLIDEAN:
            moments = dict(_layers.named_leaves(getattr(part, _optimizers.UNEUCLIDEAN[name])))
            # Where it does not step, `optax.partition` and `optax.masked` have put a MaskedNode.
            steps_in = {
                layer.path
                for layer, _ in constrained
                if hasattr(moments.get(layer.leaf_path), "shape")
            }
            paths |= steps_in
            names |= {name} if steps_in else set()
    if paths and ball_states(state):
        yield Finding(
            "wrong optimizer",
            "warning",
            tuple(sorted(paths)),
            "The Euclidean projection follows an optimizer that does not step along the gradient "
            f"({', '.join(sorted(names))}): it can take away what the step has learned.",
            "Use l1inf.constrain(optimizer, c), which projects in the optimizer's own metric, or "
            "says that there is none.",
        )


def _another_c(told: Constrained, constrained: Constrained, step: int) -> Iterator[Finding]:
    """Radii that are not those of the transformation, at one step at least."""
    differ = []
    for (layer, c), (_, own) in zip(told, constrained, strict=True):
        check_radius(1 if callable(c) else c, layer.columns_shape)
        for at in () if c is own else (step, *_FAR):
            given, has = (np.asarray(radius_at(x, at), np.float64) for x in (c, own))
            if not np.allclose(given, has, rtol=_ALIKE, atol=0):
                when = f" at step {at}" if callable(c) or callable(own) else ""
                differ.append((layer.path, f"{_number(has)}{when}", _number(given)))
                break
    if differ:
        _, kept_at, told_as = differ[0]
        yield Finding(
            "another c",
            "error",
            tuple(path for path, *_ in differ),
            f"tx keeps these columns at c = {kept_at}, but the c given to diagnose is {told_as}: "
            "all else that is said here holds for that of tx.",
            "Make tx and all that is told c from one variable.",
        )


def _vanishing_c(constrained: Constrained, steps: int | None) -> Iterator[Finding]:
    """Schedules that end at 0 or below."""
    last = 2**31 - 1 if steps is None else steps - 1
    looked_at = [step for step in (0, *_FAR, last) if step <= last]
    for layer, radius in constrained:
        if not callable(radius):
            continue

        def least(step: int, radius: Any = radius) -> float:
            return float(np.min(np.asarray(radius_at(radius, step), np.float64)))

        end = next((step for step in looked_at if not least(step) > 0), None)
        if end is None:
            continue
        before = max((step for step in looked_at if step < end), default=-1)
        while end - before > 1:  # the first step without a ball
            middle = (before + end) // 2
            before, end = (middle, end) if least(middle) > 0 else (before, middle)
        if steps is None and end > 0 == least(end) and least(before) < _VANISHED * least(0):
            continue
        yield Finding(
            "c falls to 0",
            "error",
            (layer.path,),
            f"The schedule of c gives {least(end):.3g} at step {end}: no ball has such a radius, "
            "and every weight goes to zero.",
            "End it at a positive radius, such as optax.cosine_decay_schedule(1.0, steps, "
            "alpha=0.1), and take the number of steps from the training loop.",
        )
        return


def _held_from_start(columns: list[_Columns], kept: Sequence[Kept]) -> Iterator[Finding]:
    """Biases or whole layers that start at zero and must stay there."""
    at_once = {path for ball in kept if ball.hold_zeros_from == 0 for path in ball.radii}
    paths = []
    for x in columns:
        pieces = [piece for piece in (x.bias, x.weights) if piece.size]
        if x.layer.leaf_path in at_once and not all(piece.any() for piece in pieces):
            paths.append(x.layer.path)
    if paths:
        yield Finding(
            "zeros held from the start",
            "warning",
            tuple(paths),
            "With hold_zeros_from=0 what is zero stays zero, and all biases or weights here are: "
            "they never learn.",
            "Hold zeros from a later update on, once training has chosen them, such as "
            "hold_zeros_from=round(0.8 * steps).",
        )


def _hold_from(own: Constrained, kept: Sequence[Kept]) -> dict[str, int]:
    """The update from which on a layer's zeros are held at the latest, where they ever are."""
    by_number = {
        path: int(ball.hold_zeros_from)
        for ball in kept
        if ball.hold_zeros_from is not None
        for path in ball.radii
    }
    by_radius = {
        layer.leaf_path: int(since)
        for layer, radius in own
        if (since := _held_after(radius)) is not None and not is_traced(since)
    }
    return {
        path: min(numbers[path] for numbers in (by_number, by_radius) if path in numbers)
        for path in by_number | by_radius
    }


def _held_after(radius: Any) -> Any:
    """The number of updates after which a radius holds all zeros that it makes, if it does."""
    if isinstance(radius, Prune):
        return radius.start + radius.over
    return radius.over if isinstance(radius, Shrink) and radius.hold else None


def _never_held(
    own: Constrained,
    hold_from: Mapping[str, int],
    balls: Sequence[KeepParamsInL1InfBallState],
    steps: int | None,
) -> Iterator[Finding]:
    if steps is None:
        return
    held = {path for path, since in updates_until_held(balls).items() if since < STILL_FALLING}
    at_any_time = {x.leaf_path for x, c in own if isinstance(c, Shrink) and c.zeros is not None}
    late = [
        layer
        for layer, _ in own
        if hold_from.get(layer.leaf_path, 0) >= steps and layer.leaf_path not in held | at_any_time
    ]
    if late:
        latest = max(hold_from[layer.leaf_path] for layer in late)
        yield Finding(
            "zeros never held",
            "warning",
            tuple(layer.path for layer in late),
            f"Zeros are held from update {latest} on, but only {steps} are planned: they are never "
            "held.",
            "Count hold_zeros_from, or over of l1inf.shrink, in updates, not in epochs or "
            "examples, and let it come before the end, such as round(0.8 * steps).",
        )


# --- the parameters -------------------------------------------------------------------------------


def _outside(columns: list[_Columns], step: int) -> Iterator[Finding]:
    outside, most = [], 1.0
    for x in columns:
        excess = x.norms / x.c
        largest = excess[np.isfinite(excess)].max(initial=0)
        if largest > 1:
            outside.append(x.layer.path)
            most = max(most, float(largest))
    if not outside:
        return
    seen = f"Columns are outside the ball, by up to {most - 1:.2g} c"
    if step:
        yield Finding(
            "left the ball",
            "error",
            tuple(outside),
            f"{seen}, but tx has kept them inside at each of {step} updates: something else "
            "moves them, such as an update applied twice, noise, or a cast to another dtype.",
            "Let nothing but optax.apply_updates(params, updates), once for each update, change "
            "them.",
        )
    else:
        yield Finding(
            "starts outside",
            "warning",
            tuple(outside),
            f"{seen}, before training: the first update takes all of that away in one jump.",
            "Start with params = l1inf.project_params(params, c).",
        )


def _projected_elsewhere(columns: list[_Columns], step: int) -> Iterator[Finding]:
    """Columns that were projected, but to another radius: most have the same norm."""
    seen = []
    for x in columns if step == 0 else ():  # later they have moved, and c may have
        largest = float(x.norms.max(initial=0))
        there = x.norms >= largest * (1 - x.rounding)
        entries = np.sort(np.concatenate([x.bias, x.weights])[:, there], axis=0)
        projected = 2 * there.sum() > x.norms.size > 1 and bool(np.ptp(entries, axis=1).any())
        if (
            projected
            and np.isfinite(x.c).all()
            and not np.isclose(x.c, largest, rtol=2 * x.rounding, atol=0).any()
        ):
            seen.append((x.layer.path, largest, x.c))
    if seen:
        _, norm, c = seen[0]
        yield Finding(
            "projected to another c",
            "warning",
            tuple(path for path, *_ in seen),
            f"Most columns have a norm of {norm:.6g}, as if projected to that, but tx keeps them "
            f"at c = {_number(c)}.",
            "Project the parameters with the c of tx: l1inf.project_params(params, c).",
        )


def _few_zeros(
    columns: list[_Columns], hold_from: Mapping[str, int], step: int, steps: int | None
) -> Iterator[Finding]:
    """Layers that are not sparse, although the ball holds them back and training has gone on."""
    if step < (_ENOUGH if steps is None else steps):
        return
    entries = zeros = 0
    paths = []
    for x in columns:
        on_boundary = x.norms >= x.c * (1 - x.rounding)
        is_small = len(x.weights) < _SEVERAL
        if is_small or x.layer.leaf_path in hold_from or 2 * on_boundary.sum() <= on_boundary.size:
            continue
        zeros_here = int(np.sum(x.weights == 0))
        if zeros_here < _FEW_ZEROS * x.weights.size:
            entries, zeros = entries + x.weights.size, zeros + zeros_here
            paths.append(x.layer.path)
    if paths:
        yield Finding(
            "few zeros",
            "warning",
            tuple(paths),
            f"After {step} updates most columns are on the boundary, but only {zeros} of {entries} "
            "weights are exactly zero: minibatches lift them, and nothing holds them.",
            "Let the radius fall and hold what it makes zero, c=l1inf.shrink(to=c, over=steps // "
            "2), with a learning rate that ends at zero. Of a network that is trained, project "
            "once more, onto 0.9 c.",
        )


def _not_finite(columns: list[_Columns], what: str) -> Iterator[Finding]:
    paths = [x.layer.path for x in columns if not np.isfinite(x.norms).all()]
    if paths:
        yield Finding(
            "not finite",
            "error",
            tuple(paths),
            f"There are NaN or infinite {what}: training has diverged, or the data hold some. "
            "A NaN stays in its column for good.",
            "Look for them in the data, lower the learning rate, and go on from parameters "
            "that are finite.",
        )


def _output_layer(found: list[Layer], constrained: Constrained, c: Radii) -> Iterator[Finding]:
    """An output layer that is constrained without having been named."""
    named = tuple(f"/{pattern}" for pattern in c) if isinstance(c, Mapping) else ()
    paths = [layer.path for layer, _ in constrained]
    suspects = [path for path in paths if _last(path).lower() in _OUTPUT_NAMES]
    if not suspects and len(found) == len(constrained) > 1:
        suspects = _highest(found)
    suspects = [path for path in suspects if not f"/{path}".endswith(named)]
    if suspects:
        yield Finding(
            "output layer",
            "warning",
            tuple(suspects),
            "This looks like the output layer, and c constrains it along with the others: the "
            "outputs cannot grow to the size of the targets. The paper leaves it free.",
            f"Leave it out, as in c={{{suspects[0]!r}: None, '*': 1.0}}; or name it in c if "
            "it is meant.",
        )


def _highest(found: list[Layer]) -> list[str]:
    """The last of numbered layers, if they are the whole network and nothing can follow it."""
    names = [re.fullmatch(r"(.*?)(\d+)", layer.path) for layer in found]
    if not all(names) or len({_parent(layer.path) for layer in found}) > 1:
        return []
    numbered = [
        (match[1], int(match[2]), layer)
        for match, layer in zip(names, found, strict=True)
        if match and len(layer.shape) == 2
    ]
    if len({prefix for prefix, _, _ in numbered}) != 1:
        return []
    last = max(numbered, key=lambda x: x[1])[2]
    taken = {_inputs(layer) for layer in found}
    return [] if _units(last) in taken else [last.path]


def _small_c(columns: list[_Columns]) -> Iterator[Finding]:
    """Layers in a row that let through next to nothing of what inputs differ by."""
    row: list[Layer] = []
    signal = 1.0
    for layer, c, *_ in sorted(columns, key=lambda x: _natural(x.layer.path)):
        follows = row and _inputs(layer) == _units(row[-1])
        if not follows or _parent(layer.path) != _parent(row[-1].path):
            row, signal = [], 1.0
        row, signal = [*row, layer], signal * float(c.max())
        if signal < _LEAST_SIGNAL:
            yield Finding(
                "c too small",
                "warning",
                tuple(layer.path for layer in row),
                f"The radii multiply to {signal:.2g} along these layers, and at most so much is "
                "left behind them of what two inputs differ by: the network is almost constant, "
                "and its gradients vanish.",
                "Start with l1inf.rescale_params, which gives the free layers as much back, or "
                "choose a larger c. If that is done, give outputs, which tell more than radii.",
            )
            return


def _constant_outputs(outputs: Any, constrained: Constrained) -> Iterator[Finding]:
    """Outputs that are the same for all inputs, next to what a loss notices."""
    parts = [np.asarray(x, np.float64) for x in jax.tree.leaves(outputs) if hasattr(x, "dtype")]
    if not parts or any(x.ndim == 0 or len(x) < 2 for x in parts):
        raise ValueError(
            "outputs needs the outputs for two inputs at least, along its first axis: give "
            "apply(params, inputs) for some inputs that differ"
        )
    if not all(np.isfinite(x).all() for x in parts):
        yield Finding(
            "not finite",
            "error",
            (),
            "There are NaN or infinite outputs: training has diverged, or the inputs hold some.",
            "Look for them in the data, and go on from parameters that are finite.",
        )
        return
    spread = max(float(x.std(0).max(initial=0)) for x in parts)
    if spread < _LEAST_SPREAD:
        yield Finding(
            "outputs hardly vary",
            "warning",
            tuple(layer.path for layer, _ in constrained),
            f"Over these inputs no output has a standard deviation above {spread:.2g}: the balls "
            "take the signal away, and gradients vanish with it, or the output layer starts at 0.",
            "Start with l1inf.rescale_params, which gives the free layers as much back, and let "
            "the optimizer follow with l1inf.with_scales; or choose a larger c.",
        )


def _large_c(columns: list[_Columns], own: Constrained) -> Iterator[Finding]:
    # A radius that falls by itself may be as wide as one likes at first.
    fall = {layer.leaf_path for layer, radius in own if isinstance(radius, Shrink)}
    used = [
        float((x.norms / x.c).max(initial=0))
        for x in columns
        if np.isfinite(x.c).all() and x.layer.leaf_path not in fall
    ]
    if used and max(used) < 0.5:
        yield Finding(
            "c too large",
            "warning",
            (),
            f"No column's norm is above {max(used):.2g} c: the constraint has done nothing so far, "
            "and there are no zeros.",
            "Choose a smaller c (l1inf.selection.cross_validate finds one).",
        )


def _dead_units(columns: list[_Columns]) -> Iterator[Finding]:
    paths = [x.layer.path for x in columns if 2 * np.sum(x.norms == 0) >= x.norms.size]
    if paths:
        yield Finding(
            "dead units",
            "warning",
            tuple(paths),
            "Half the columns or more are empty: these units are constant, and behind a ReLU no "
            "gradient brings them back.",
            "Start again with a lower learning rate, a larger c, or positive biases; after "
            "training such units can be removed.",
        )


def _biases(columns: list[_Columns]) -> Iterator[Finding]:
    paths = [
        x.layer.path
        for x in columns
        if 2 * np.sum(x.bias.sum(0) > _MOST_BIAS * x.norms) > x.norms.size
    ]
    if paths:
        yield Finding(
            "bias takes c",
            "warning",
            tuple(paths),
            f"In most columns the bias has over {_MOST_BIAS:.0%} of the norm, which counts towards "
            "c: nothing is left for the weights, and the units are almost constant.",
            "Initialise biases at zero or at a part of c, centre the inputs, or choose a larger c.",
        )


def _batch_norm(params: Any, constrained: Constrained) -> Iterator[Finding]:
    widths = set()
    for path, leaf in _layers.named_leaves(params):
        module = _parent(path)
        if _BATCH_NORM.search(_last(module)):
            widths.add((_parent(module), np.size(leaf)))
    paths = [
        layer.path for layer, _ in constrained if (_parent(layer.path), _units(layer)) in widths
    ]
    if paths:
        yield Finding(
            "batch norm",
            "warning",
            tuple(paths),
            "A batch normalisation of the same width stands beside the layer. If it follows it, it "
            "divides every unit by its own scale: c does not limit what the network computes, and "
            "no bound holds.",
            "Take the normalisation away, put it before the layer, or expect zeros only.",
        )


def _weight_norm(params: Any, constrained: Constrained) -> Iterator[Finding]:
    paths = {path for path, _ in _layers.named_leaves(params)}

    def is_normalised(layer: Layer) -> bool:
        parent, name = _parent(layer.path), _last(layer.path)
        inside = f"{parent}/" if parent else ""
        of_equinox = name == "layer" and f"{inside}g" in paths
        of_linen = any(
            path.startswith(f"{inside}WeightNorm") and path.endswith(f"/{name}/kernel/scale")
            for path in paths
        )
        return of_equinox or of_linen or name == "layer_instance"  # of NNX, spectral norm too

    normalised = [layer.path for layer, _ in constrained if is_normalised(layer)]
    if normalised:
        yield Finding(
            "weight norm",
            "warning",
            tuple(normalised),
            "The layer's weights are divided by a norm of their own before they are used: c does "
            "not limit what the network computes, and no bound holds.",
            "Take the weight normalisation away: the ball does what it is for.",
        )


# --- one step -------------------------------------------------------------------------------------


def _step(before: list[_Columns], after: list[_Columns], *, seen: bool) -> Iterator[Finding]:
    """What one step with real gradients does; ``seen`` if it is known to end outside the ball."""
    left, collapsed = [], []
    for v, w in zip(before, after, strict=True):
        # A step of `optax.MultiSteps` may be none, and while c falls it is that of the last one.
        if (v.norms <= v.c).all() and (w.norms > np.maximum(v.c, w.c)).any():
            left.append(w.layer.path)
        several = v.entries >= _SEVERAL
        if 2 * np.sum(several & (w.entries <= 1)) > max(1, several.sum()):
            collapsed.append(w.layer.path)
    if left and not seen:
        yield Finding(
            "not last",
            "error",
            tuple(left),
            "One step takes columns out of the ball: what is around the projection, or after it, "
            "changes the updates again.",
            "Put it last: optax.chain(..., l1inf.keep_params_in_l1inf_ball(c)).",
        )
    if collapsed:
        yield Finding(
            "step too long",
            "warning",
            tuple(collapsed),
            "One step leaves a single entry in most columns: it is much longer than c, so that "
            "only the largest survives the projection.",
            "Lower the learning rate, about in proportion to c.",
        )


# --- numbers --------------------------------------------------------------------------------------


def _number(radius: Any) -> str:
    """One radius, or the range of those of a layer's columns."""
    low, high = float(np.min(radius)), float(np.max(radius))
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


# --- names ----------------------------------------------------------------------------------------


def _units(layer: Layer) -> int:
    return math.prod(layer.shape[i] for i in layer.output_axes)


def _inputs(layer: Layer) -> int:
    rows = math.prod(layer.shape[i] for i in layer.reduction_axes)
    return rows - int(layer.has_bias_row)


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _natural(path: str) -> list[Any]:
    """Sorts ``Dense_2`` before ``Dense_10``."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)]


def _some(paths: Sequence[str]) -> str:
    shown = [path or "(root)" for path in paths[:4]]
    more = [f"{len(paths) - 4} more"] if len(paths) > 4 else []
    return ", ".join([*shown, *more]) or "none"


def _where(paths: Sequence[str]) -> str:
    return f" in {_some(paths)}" if paths else ""
