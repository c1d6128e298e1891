"""Choosing the normalization constant c by k-fold cross-validation (Section 5.4 of the paper).

`cross_validate` scores candidates for c: every (candidate, fold) is a lane of the training loop,
and all of them train at once. A candidate is a number, or a number for each layer, which the paper
leaves as future work: `search_layer_c` looks for those by Bayesian optimization.

Folds are scikit-learn's and the search is Optuna's: ``pip install "l1inf-optax[selection]"``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from l1inf_optax._lanes import (
    Apply,
    Lane,
    Metric,
    Params,
    Progress,
    Task,
    gathered,
    map_lanes,
    on_all_devices,
    shared_out,
    train,
)
from l1inf_optax._projection.arguments import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes

C = float | Mapping[str, float]
Fold = tuple[np.ndarray, np.ndarray]


class CrossValidation(NamedTuple):
    """What the candidates scored; more is better.

    Attributes:
        c: the m candidates, in the order given: numbers, or mappings from layers to numbers.
        scores: ``(m, k)`` float64, the mean score over the examples of each of k validation folds,
            NaN where the training diverged.
    """

    c: tuple[C, ...]
    scores: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """``(m,)`` means over the folds, each fold counted once, whatever its size."""
        return self.scores.mean(axis=1)

    @property
    def standard_error(self) -> np.ndarray:
        """``(m,)`` standard errors of the means, the sample standard deviation over sqrt(k)."""
        return self.scores.std(axis=1, ddof=1) / np.sqrt(self.scores.shape[1])

    @property
    def best_c(self) -> Any:
        """The candidate with the largest mean, the first of equals.

        Raises:
            ValueError: if all trainings have diverged.
        """
        return self.c[self._best()]

    @property
    def one_standard_error_c(self) -> float:
        """The smallest c whose mean is within one standard error, the best one's, of the best mean.

        The rule of Breiman, Friedman, Olshen and Stone (1984): of the models that cannot be told
        from the best, the simplest. The smallest ball has the smallest bound on the generalization
        error (Theorem 3).

        Raises:
            ValueError: if all trainings have diverged, or the candidates have a c for each layer,
                of which none is the smallest.
        """
        radii, best = self._radii(), self._best()
        enough = self.mean >= self.mean[best] - self.standard_error[best]
        return float(radii[enough].min())

    def plot(self, ax: Axes | None = None, *, label: str = "cross-validation score") -> Axes:
        """Figure 5 of the paper: see `l1inf_optax.plotting.plot_selection`.

        Args:
            ax: where to draw; the current axes by default.
            label: of the vertical axis.

        Returns:
            The axes.

        Raises:
            ValueError: as `one_standard_error_c`.
        """
        from l1inf_optax import plotting  # needs matplotlib

        return plotting.plot_selection(
            self._radii(),
            self.mean,
            self.standard_error,
            ax,
            best=self.best_c,
            one_standard_error=self.one_standard_error_c,
            label=label,
        )

    def _best(self) -> int:
        usable = np.where(np.isfinite(self.mean), self.mean, -np.inf)
        if np.isneginf(usable).all():
            raise ValueError(
                "the scores of all candidates are not finite: training has diverged, lower the "
                "learning rate"
            )
        return int(usable.argmax())

    def _radii(self) -> np.ndarray:
        if any(isinstance(c, Mapping) for c in self.c):
            raise ValueError(
                "the candidates have a c for each layer, and none is the smallest: use best_c"
            )
        return np.array(self.c, np.float64)


def cross_validate(
    init: Callable[[jax.Array, Any], Params],
    apply: Apply,
    loss: Metric,
    optimizer: Callable[[Any], optax.GradientTransformation],
    x: ArrayLike,
    y: ArrayLike,
    c: Iterable[C],
    *,
    epochs: int,
    batch_size: int,
    cv: Any = 5,
    score: Metric | None = None,
    seed: int = 0,
    lanes_at_once: int | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> CrossValidation:
    """Scores every candidate for c by k-fold cross-validation.

    All (candidate, fold) pairs train at once, in one compiled program in which c is data, spread
    over all devices; on each, ``lanes_at_once`` of them are computed together. Networks of the same
    fold start from the same key and see the same minibatches, whatever their c. Another call with
    the same functions, and as many candidates, compiles nothing anew.

    Folds may differ in size. All take as many steps as the smallest, so that a schedule means the
    same for each: every epoch draws as many minibatches as that one holds from a new random order
    of the fold's own examples, and leaves out the remainder, another one every time. Validation
    uses all examples of a fold.

    Args:
        init: ``(key, c) -> params``, a pytree of arrays: of Flax, of Haiku, an Equinox module's
            arrays, your own. Here a start is put into the ball; it may ignore c.
        apply: ``(params, x) -> outputs``, for a batch of inputs.
        loss: ``(outputs, y) -> (batch,)``; its mean over a minibatch is minimised.
        optimizer: ``c -> transformation``, which keeps the parameters in the ball. c is traced: a
            float32 scalar, or a dictionary of them, in the order of the candidate.
        x: ``(n, ...)`` inputs.
        y: ``(n, ...)`` targets.
        c: the candidates: positive numbers, ``inf`` for no constraint; or mappings from globs over
            the layers' paths to such numbers, all with the same globs.
        epochs: passes over the training part of a fold.
        batch_size: examples per step; all of the smallest fold if it has no more.
        cv: the number of folds, shuffled by ``seed``, stratified if the targets are one whole
            number per example (`sklearn.model_selection.StratifiedKFold`, otherwise ``KFold``); a
            splitter of scikit-learn's, whose ``random_state`` should be fixed; or pairs of integer
            arrays, the rows to train on and those to validate on.
        score: ``(outputs, y) -> (batch,)``, more is better, for instance 1 where the class is
            right; the negative loss by default. A fold scores its mean.
        seed: of folds, initial weights and minibatches.
        lanes_at_once: how many networks a device computes together, by `jax.vmap`, while others
            wait: by default one on a CPU, all on an accelerator. Equal to rounding either way.
        watch: called every 100 minibatches at the latest, for a progress bar.

    Returns:
        The scores.

    Raises:
        ValueError: there is no candidate, or one is not positive, or their layers differ; x and y
            differ in length, or hold NaN or infinities that loss or score hand on; cv makes fewer
            than two folds, or a fold that is empty, overlaps its training rows or has rows that do
            not exist; cv is a number, and y holds whole numbers none of which occurs so often; loss
            or score does not return one number per example; there is no epoch, or an empty batch.

    References:
        Wen et al., Section 5.4. Kohavi (1995), *A study of cross-validation and bootstrap for
        accuracy estimation and model selection*.

    Example:
        >>> import jax, jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> x = jax.random.normal(jax.random.key(0), (40, 30))
        >>> y = x[:, 0] - x[:, 1]  # needs a norm of 2
        >>> result = l1inf.selection.cross_validate(
        ...     init=lambda key, c: {"kernel": jnp.zeros((30, 1)), "bias": jnp.zeros(1)},
        ...     apply=lambda params, x: (x @ params["kernel"] + params["bias"])[:, 0],
        ...     loss=optax.squared_error,
        ...     optimizer=lambda c: l1inf.constrain(optax.sgd(0.1), c),
        ...     x=x, y=y, c=[0.5, 2.0, 8.0], epochs=50, batch_size=8,
        ... )
        >>> result.scores.shape, result.best_c, result.one_standard_error_c
        ((3, 5), 2.0, 2.0)
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} examples and y has {len(y)}: give one target for each")
    candidates = _candidates(c)
    folds = _folds(cv, np.asarray(y), seed)
    task = Task(init, apply, loss, optimizer)
    metrics = {"loss": loss, **({"score": score} if score else {})}
    for name, function in metrics.items():
        _check_per_example(name, function, task, candidates[0], x, y)
    _check_finite(metrics, task, candidates[0], x, y)

    lanes = [_lane(fold, own) for own in candidates for fold in range(len(folds))]
    params = train(
        task,
        lanes,
        (x[None], y[None]),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        rows=_stacked([rows for rows, _ in folds]),
        lanes_at_once=lanes_at_once,
        watch=watch,
    ).params
    which = np.array([lane.trial for lane in lanes])
    unseen = _stacked([rows for _, rows in folds])
    common = tuple(map(on_all_devices, (unseen, x, y)))
    means = _means(apply, score or loss, shared_out((params, which)), common)
    means = gathered(means, len(lanes)).astype(np.float64)
    scores = np.where(np.isfinite(means), means if score else -means, np.nan)
    scores = scores.reshape(len(candidates), len(folds))
    return CrossValidation(candidates, scores)


def search_layer_c(
    validate: Callable[[Sequence[Mapping[str, float]]], CrossValidation],
    bounds: Mapping[str, tuple[float, float]],
    *,
    rounds: int = 8,
    candidates_per_round: int = 8,
    start: Sequence[Mapping[str, float]] = (),
    seed: int = 0,
) -> CrossValidation:
    """Looks for the best c of each layer by Bayesian optimization.

    In every round Optuna's tree-structured Parzen estimator proposes candidates, uniform on a log
    scale at first, then where the scores so far are high; they are validated together. The best
    score is one of many noisy ones and so too good: measure the choice on data that had no part
    in it.

    Args:
        validate: `cross_validate` with everything but the candidates, by `functools.partial`. To
            be comparable all candidates must meet the same folds: see ``cv`` there.
        bounds: from globs over the layers' paths to the smallest and the largest c to try.
        rounds: how often to ask.
        candidates_per_round: how many candidates train at once. Many use the devices well; few let
            the search learn sooner.
        start: candidates to try first, at most one round's: for instance the best single c, for
            every layer.
        seed: of the proposals.

    Returns:
        All candidates and their scores, in the order in which they were proposed.

    Raises:
        ValueError: there are no bounds, or they are not positive, finite and in order; a start lies
            outside, misses a layer, or there are more than a round takes; or nothing is asked for.

    References:
        Bergstra, Bardenet, Bengio and Kégl (2011), *Algorithms for hyper-parameter optimization*.
        Wen et al., Section 6, for the question.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp, optax, l1inf_optax as l1inf
        >>> x = jax.random.normal(jax.random.key(0), (40, 5))
        >>> model = l1inf.linen.AugmentedMLP((8, 8, 1))
        >>> validate = partial(
        ...     l1inf.selection.cross_validate,
        ...     lambda key, c: l1inf.project_params(model.init(key, x), c),
        ...     lambda params, x: model.apply(params, x)[:, 0],
        ...     optax.squared_error,
        ...     lambda c: optax.chain(optax.sgd(1e-2), l1inf.keep_params_in_l1inf_ball(c)),
        ...     x, x[:, 0], epochs=1, batch_size=8, cv=2,
        ... )
        >>> result = l1inf.selection.search_layer_c(
        ...     validate, {"hidden_0": (0.1, 10), "hidden_1": (0.1, 10)},
        ...     rounds=2, candidates_per_round=2,
        ... )
        >>> result.scores.shape, sorted(result.best_c)
        ((4, 2), ['hidden_0', 'hidden_1'])
    """
    _check_search(bounds, start, rounds, candidates_per_round)
    import optuna  # takes a second to import

    space: dict[str, optuna.distributions.BaseDistribution] = {
        layer: optuna.distributions.FloatDistribution(low, high, log=True)
        for layer, (low, high) in bounds.items()
    }
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for candidate in start:
        study.enqueue_trial(dict(candidate))
    results = []
    for _ in range(rounds):
        asked = [study.ask(space) for _ in range(candidates_per_round)]
        result = validate([{layer: trial.params[layer] for layer in bounds} for trial in asked])
        for trial, mean in zip(asked, result.mean, strict=True):
            if np.isfinite(mean):
                study.tell(trial, mean)
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        results.append(result)
    candidates = tuple(c for result in results for c in result.c)
    return CrossValidation(candidates, np.concatenate([result.scores for result in results]))


def _candidates(c: Iterable[C]) -> tuple[C, ...]:
    """The candidates as floats, or as dictionaries of floats with the same keys in one order."""
    given = list(c)
    if not given:
        raise ValueError("c holds no candidate: give at least one")
    if not any(isinstance(one, Mapping) for one in given):
        return tuple(map(_positive, given))
    layers = list(given[0]) if isinstance(given[0], Mapping) else []
    return tuple(_of_layers(one, layers) for one in given)


def _of_layers(c: C, layers: Sequence[str]) -> Mapping[str, float]:
    if not isinstance(c, Mapping) or not c or set(c) != set(layers):
        raise ValueError(
            f"c holds {brief(c)}, but its first candidate has the layers {list(layers)}: give "
            "numbers, or mappings with the same layers"
        )
    return {layer: _positive(c[layer]) for layer in layers}


def _positive(c: Any) -> float:
    try:
        number = np.nan if isinstance(c, str) else float(c)
    except (TypeError, ValueError):
        number = np.nan
    if not number > 0:
        raise ValueError(f"c holds {brief(c)}: give positive numbers, inf for no constraint")
    return number


def _lane(fold: int, c: C) -> Lane:
    # Of patterns the first match wins, and JAX would sort the keys of a plain dictionary.
    return Lane(fold, OrderedDict(c) if isinstance(c, Mapping) else c)


def _folds(cv: Any, y: np.ndarray, seed: int) -> list[Fold]:
    """Rows to train on and rows to validate on."""
    if isinstance(cv, int | np.integer):
        if not 2 <= cv <= len(y):
            raise ValueError(f"cv is {cv}: give from 2 to {len(y)} folds for {len(y)} examples")
        from sklearn.model_selection import KFold, StratifiedKFold  # takes a second to import

        classes = y.ndim == 1 and y.dtype.kind in "biu"
        if classes and np.unique(y, return_counts=True)[1].max() < cv:
            raise ValueError(
                f"y holds whole numbers, which are taken for classes, but none of them occurs "
                f"{cv} times, once for each fold: if they are numbers to predict, give "
                "y.astype(float)"
            )
        cv = (StratifiedKFold if classes else KFold)(cv, shuffle=True, random_state=seed)
    pairs = cv.split(np.arange(len(y)), y) if hasattr(cv, "split") else cv
    folds = [(np.asarray(rows), np.asarray(unseen)) for rows, unseen in pairs]
    if len(folds) < 2:
        raise ValueError(f"cv makes {len(folds)} folds: give at least 2 (and no used-up iterator)")
    for i, fold in enumerate(folds):
        for rows in fold:
            if rows.ndim != 1 or rows.dtype.kind not in "iu" or not rows.size:
                raise ValueError(
                    f"fold {i} of cv has rows of dtype {rows.dtype} and shape {rows.shape}: give "
                    "two integer arrays, neither of them empty"
                )
            if rows.min() < 0 or rows.max() >= len(y):
                raise ValueError(f"fold {i} of cv has rows outside 0 to {len(y) - 1}: give others")
        both = np.intersect1d(*fold)
        if both.size:
            raise ValueError(f"fold {i} of cv trains on row {both[0]} and validates on it: drop it")
    return folds


def _stacked(folds: Sequence[np.ndarray]) -> np.ndarray:
    """As one array, in which shorter folds end in -1."""
    longest = max(map(len, folds))
    return np.stack([np.pad(f, (0, longest - len(f)), constant_values=-1) for f in folds])


def _check_per_example(
    name: str, function: Metric, task: Task, c: C, x: jax.Array, y: jax.Array
) -> None:
    def of_two(key: jax.Array, c: Any) -> jax.Array:
        return function(task.apply(task.init(key, c), x[:2]), y[:2])

    radii = jax.tree.map(np.float32, _lane(0, c).c)
    shape = jnp.shape(jax.eval_shape(of_two, jax.random.key(0), radii))
    if shape != (2,):
        raise ValueError(
            f"{name} returns shape {shape} for two examples: return one number per example, (2,), "
            "and no mean"
        )


def _check_finite(
    metrics: Mapping[str, Metric], task: Task, c: C, x: jax.Array, y: jax.Array
) -> None:
    """Finds examples that no training can score, unless the metrics know what to do with NaN."""
    for given, values in {"x": x, "y": y}.items():
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            continue
        bad = np.flatnonzero(~np.isfinite(np.asarray(values)).reshape(len(values), -1).all(1))
        if not bad.size:
            continue
        rows = bad[:1].repeat(2)
        radii = jax.tree.map(np.float32, _lane(0, c).c)
        outputs = task.apply(task.init(jax.random.key(0), radii), x[rows])
        for name, metric in metrics.items():
            if not np.isfinite(np.asarray(metric(outputs, y[rows]))).all():
                raise ValueError(
                    f"{given} has entries that are NaN or infinite in {bad.size} of {len(values)} "
                    f"examples, the first of them row {bad[0]}, and {name} is not finite there: "
                    "leave these rows out, or fill the entries in"
                )


@partial(jax.jit, static_argnums=(0, 1))
def _means(
    apply: Apply,
    metric: Metric,
    lanes: tuple[Params, jax.Array],
    common: tuple[jax.Array, ...],
) -> jax.Array:
    """``(lanes,)`` means of the metric over the examples of each lane's fold."""

    def one(lane: tuple[Params, jax.Array], common: tuple[jax.Array, ...]) -> jax.Array:
        params, fold = lane
        folds, x, y = common
        rows = folds[fold]
        return metric(apply(params, x[rows]), y[rows]).mean(where=rows >= 0)

    return map_lanes(one, lanes, common)


def _check_search(
    bounds: Mapping[str, tuple[float, float]],
    start: Sequence[Mapping[str, float]],
    rounds: int,
    candidates_per_round: int,
) -> None:
    if not bounds:
        raise ValueError("bounds is empty: give (smallest, largest) for at least one layer")
    for layer, (low, high) in bounds.items():
        if not 0 < low <= high < np.inf:
            raise ValueError(
                f"bounds of {layer!r} are {low} and {high}: give two positive, finite numbers, the "
                "smaller first"
            )
    for name, value in {"rounds": rounds, "candidates_per_round": candidates_per_round}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    if len(start) > candidates_per_round:
        raise ValueError(
            f"start holds {len(start)} candidates: give at most candidates_per_round, which is "
            f"{candidates_per_round}"
        )
    for candidate in start:
        if set(candidate) != set(bounds) or not all(
            low <= candidate[layer] <= high for layer, (low, high) in bounds.items()
        ):
            raise ValueError(
                f"start holds {dict(candidate)}: give every layer of bounds a c within them"
            )
