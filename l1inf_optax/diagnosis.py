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

from l1inf_optax import _layers, _metric
from l1inf_optax._layers import Layer, Layers, Radii, Radius
from l1inf_optax._transform import ConstrainState, KeepParamsInL1InfBallState, ball_states

Constrained = list[tuple[Layer, Radius]]

_OUTPUT_NAMES = {"classifier", "head", "lm_head", "logits", "output", "output_layer", "readout"}
_BATCH_NORM = re.compile(r"batch_?norm|(^|_)bn(_?\d|$)", re.IGNORECASE)
_LEAST_SIGNAL = 1e-3  # what is left of an input's differences after constrained layers in a row
_MOST_BIAS = 0.9  # of a column's norm
_ROUNDED = 1 + 1e-5  # a schedule's float32 depends on how it is compiled
_SEVERAL = 4  # entries of a column that a step should not reduce to one


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
        free: Paths of the layers that are not.
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
) -> Diagnosis:
    """Looks for mistakes that raise no error, and names cause and cure of each.

    Call it once before training, with gradients if there are some, and again when training goes
    wrong. It looks at the order of the chain, the optimizer beside the projection, which layers are
    constrained, and where the columns lie in the ball; with ``grads`` also at what one step does.
    No finding is no proof that all is well. Nothing is emitted as a Python warning: those are shown
    once only, and a question is answered by what it returns.

    Args:
        tx: The whole transformation, as it is trained with.
        params: Pytree of parameters: freshly projected ones, or those of any later step.
        c: As ``tx`` has it; see :func:`keep_params_in_l1inf_ball`.
        layers: As ``tx`` has it.
        state: The optimizer's state that belongs to ``params``, or ``None`` before training.
        grads: Gradients at ``params``, or ``None``. One step is taken with them, by
            ``tx.update(grads, state, params)``, and thrown away.

    Returns:
        A :class:`Diagnosis`.

    Raises:
        ValueError: as :func:`keep_params_in_l1inf_ball`; ``c`` and ``layers`` constrain others than
            ``tx`` does.

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
    _layers.check_radii(c)
    state = tx.init(params) if state is None else state
    balls = ball_states(state)
    found = _layers.find_layers(params, layers)
    constrained = _layers.constrained_layers(params, c, layers)
    _check_same(balls, constrained)
    step = int(balls[0].step) if balls else 0
    columns = _columns(params, constrained, max(step - 1, 0))  # where the last update left them
    findings = [
        *_not_kept(balls),
        *_not_last(state),
        *_not_finite(columns, "parameters"),
        *_outside(columns, step),
        *_optimizer(state, constrained),
        *_output_layer(found, constrained, c),
        *_small_c(columns),
        *_large_c(columns),
        *_dead_units(columns),
        *_biases(columns),
        *_batch_norm(params, constrained),
    ]
    if grads is not None:
        findings += _not_finite(_columns(grads, constrained, step), "gradients")
        updates, _ = jax.jit(tx.update)(grads, state, params)
        stepped = optax.apply_updates(params, updates)
        findings += _step(
            columns, _columns(stepped, constrained, step), seen=not balls or _links_after(state) > 0
        )
    findings.sort(key=lambda finding: finding.severity)
    paths = tuple(layer.path for layer, _ in constrained)
    free = tuple(layer.path for layer in found if layer.path not in paths)
    return Diagnosis(tuple(findings), paths, free)


# --- what is looked at ----------------------------------------------------------------------------


class _Columns(NamedTuple):
    """A constrained layer at one step.

    Attributes:
        layer: Where it is.
        c: Its radius, or one for each column.
        bias: Magnitudes of the biases, in one row or none.
        weights: Magnitudes of the weights, in rows.
    """

    layer: Layer
    c: np.ndarray
    bias: np.ndarray
    weights: np.ndarray

    @property
    def norms(self) -> np.ndarray:
        return self.bias.sum(0) + self.weights.sum(0)

    @property
    def entries(self) -> np.ndarray:
        """How many entries of each column are not zero."""
        return np.sum(self.bias > 0, 0) + np.sum(self.weights > 0, 0)


def _columns(params: Any, constrained: Constrained, step: int) -> list[_Columns]:
    leaves, _ = _layers.flatten(params)

    def rows(layer: Layer, x: Any) -> np.ndarray:
        magnitudes, axes = np.abs(np.asarray(x, np.float64)), layer.reduction_axes
        return np.moveaxis(magnitudes, axes, range(len(axes))).reshape(-1, *layer.columns_shape)

    columns = []
    for layer, radius in constrained:
        c = np.asarray(_at(radius, step), np.float64)
        if callable(radius):
            c = c * _ROUNDED
        *bias, kernel = (rows(layer, x) for x in layer.columns(leaves))
        first = int(layer.has_bias_row)
        columns.append(_Columns(layer, c, np.concatenate([*bias, kernel[:first]]), kernel[first:]))
    return columns


def _at(radius: Any, step: int) -> Any:
    return radius(step) if callable(radius) else radius


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
        return isinstance(x, ConstrainState) or type(x).__name__ in _metric.UNEUCLIDEAN

    names, paths = set(), set()
    for part in jax.tree.leaves(state, is_leaf=ends):
        name = type(part).__name__
        if name in _metric.UNEUCLIDEAN:
            moments = dict(_layers.named_leaves(getattr(part, _metric.UNEUCLIDEAN[name])))
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
                "Choose a larger c (l1inf.selection.cross_validate finds one), start with a larger "
                "c that falls by a schedule, or make the output layer's weights larger by as much.",
            )
            return


def _large_c(columns: list[_Columns]) -> Iterator[Finding]:
    used = [float((x.norms / x.c).max(initial=0)) for x in columns if np.isfinite(x.c).all()]
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
