"""Choosing c by cross-validation (Section 5.4, Figure 5), then a c for each layer (Section 6).

- Figure 5: five folds of the data of the classification (500-100-50-20-2, batches of 50; accuracy)
  and of the regression (1000-300-1, full batches; squared error), for the paper's values of c.
- The question that the paper leaves open: does a c for each layer beat a single c? In every trial,
  with data of its own, Optuna proposes candidates for the three hidden layers of the classification
  network in rounds, from the best single c for each to a factor of six above and below it; all are
  validated on the same folds.
  Then networks with the best single c, with that of the one-standard-error rule and with the best c
  of each layer are trained on all of the trial's training data and compared on its test data, which
  had no part in the choice.

The same recipe trains all of them; c is all that is chosen. Writes results.json, figure_5.png and
layers.png to the output folder.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from l1inf_optax import plotting
from l1inf_optax._lanes import Data, Lane, steps_per_epoch, train
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.networks.evaluation import measure, right_percent
from l1inf_optax.experiments.paper import classification, regression
from l1inf_optax.selection import CrossValidation, cross_validate, search_layer_c

FOLDS = 5
FACTOR = 6.0  # each layer's c is sought from the best single c over it to the same times it

HIDDEN = ("hidden_0", "hidden_1", "hidden_2")
CHOICES = ("single c", "one-SE c", "c by layer")


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    c: tuple[float, ...] = tuple(classification.PAPER)
    regression_c: tuple[float, ...] = tuple(regression.PAPER)
    epochs: int = 80
    regression_epochs: int = 600
    trials: int = 10
    rounds: int = 6
    candidates: int = 10
    seed: int = 1


DEFAULTS = Settings()
QUICK = Settings(
    c=(1.0, 0.5),
    regression_c=(1.0, 0.5),
    epochs=10,
    regression_epochs=20,
    trials=2,
    rounds=2,
    candidates=2,
)


class Selection(NamedTuple):
    """What cross-validation found in one trial.

    Attributes:
        single: scores of the values of c, each for all layers.
        layered: scores of what the search for a c of each layer proposed.
    """

    single: CrossValidation
    layered: CrossValidation

    def choices(self) -> list[Mapping[str, float]]:
        """The c of each layer, by each of `CHOICES`."""
        everywhere = (self.single.best_c, self.single.one_standard_error_c)
        return [*(dict.fromkeys(HIDDEN, c) for c in everywhere), self.layered.best_c]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_training_options(parser, DEFAULTS, QUICK)
    parser.add_argument(
        "--regression-c",
        nargs="+",
        type=options.radius,
        default=argparse.SUPPRESS,
        metavar="C",
        help="normalization constants of the regression (default: those of Table 1)",
    )
    for flag, text in {
        "--regression-epochs": "steps of the regression, full batches",
        "--rounds": "rounds of the search for a c of each layer",
        "--candidates": "candidates in each round",
    }.items():
        options.add_option(parser, DEFAULTS, flag, text, type=options.positive_int, metavar="N")
    options.add_output_option(parser, "results/select-c")


def run(args: argparse.Namespace) -> None:
    """Choose, train, measure, report."""
    import optuna  # takes a second to import

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    out = options.make_folder(args.out)
    train_data, test_data = synthetic.trials(
        synthetic.classification_trial, settings.seed, settings.trials
    )

    linear = _validate_regression(console, settings)
    selections = _select(console, settings, train_data)
    measured = _refit(console, settings, selections, train_data, test_data)
    difference = _difference(measured["test_accuracy"])

    table = [
        {
            "choice": choice,
            "trials": settings.trials,
            **report.summary({name: values[:, i] for name, values in measured.items()}),
        }
        for i, choice in enumerate(CHOICES)
    ]
    _print(console, table, selections, difference)
    report.write_json(
        out / "results.json",
        "select-c",
        settings,
        table,
        difference=difference,
        classification=[
            {"single": _as_json(single), "layered": _as_json(layered)}
            for single, layered in selections
        ],
        regression=_as_json(linear),
    )
    _figure_5(selections[0].single, linear).savefig(out / "figure_5.png", dpi=150)
    _layers_figure(selections[0], measured["test_accuracy"]).savefig(out / "layers.png", dpi=150)
    console.print(f"wrote results.json, figure_5.png and layers.png to {out}")


def _validate_regression(console: Console, settings: Settings) -> CrossValidation:
    """Figure 5(b): scores of c on one trial's data."""
    console.print("regression, cross-validation")
    steps = settings.regression_epochs
    (x, y), _ = synthetic.regression_trial(jax.random.key(settings.seed))
    with report.training_bar(console, steps) as watch:
        return cross_validate(
            *regression.make_task(steps)[:4],
            x,
            y,
            settings.regression_c,
            epochs=steps,
            batch_size=len(y),
            cv=FOLDS,
            seed=settings.seed,
            watch=watch,
        )


def _select(console: Console, settings: Settings, data: Data) -> list[Selection]:
    """The search for a single c, and from there for one of each layer, in every trial."""
    console.print("classification, cross-validation")
    epochs, seed = settings.epochs, settings.seed
    x, y = map(jnp.asarray, data)
    largest = max((c for c in settings.c if np.isfinite(c)), default=1.0)
    kept = synthetic.SAMPLES * (FOLDS - 1) // FOLDS
    steps = epochs * steps_per_epoch(kept, classification.BATCH_SIZE)
    total = settings.trials * (1 + settings.rounds) * steps
    taken = itertools.count(0, steps)
    with report.training_bar(console, total) as watch:

        def select(trial: int) -> Selection:
            def validate(candidates: Sequence[Mapping[str, float]]) -> CrossValidation:
                before = next(taken)
                return cross_validate(
                    *classification.make_task(steps)[:4],
                    x[trial],
                    y[trial],
                    candidates,
                    epochs=epochs,
                    batch_size=classification.BATCH_SIZE,
                    cv=FOLDS,
                    score=right_percent,
                    seed=seed + trial,
                    lanes_at_once=2 * FOLDS,
                    watch=lambda progress: watch(progress._replace(step=before + progress.step)),
                )

            single = validate([dict.fromkeys(HIDDEN, c) for c in settings.c])
            single = single._replace(c=settings.c)
            start = min(single.best_c, largest)
            layered = search_layer_c(
                validate,
                dict.fromkeys(HIDDEN, (start / FACTOR, start * FACTOR)),
                rounds=settings.rounds,
                candidates_per_round=settings.candidates,
                start=[dict.fromkeys(HIDDEN, start)],
                seed=seed + trial,
            )
            return Selection(single, layered)

        return [select(trial) for trial in range(settings.trials)]


def _refit(
    console: Console,
    settings: Settings,
    selections: Sequence[Selection],
    train_data: Data,
    test_data: Data,
) -> dict[str, np.ndarray]:
    """What the chosen c measure after training on all training data: ``(trials, choices)`` each."""
    console.print("classification, training with what was chosen")
    lanes = [Lane(t, c) for t, selection in enumerate(selections) for c in selection.choices()]
    epochs = settings.epochs
    steps = epochs * steps_per_epoch(synthetic.SAMPLES, classification.BATCH_SIZE)
    task = classification.make_task(steps)
    with report.training_bar(console, steps) as watch:
        params = train(
            task,
            lanes,
            train_data,
            epochs=epochs,
            batch_size=classification.BATCH_SIZE,
            seed=settings.seed,
            lanes_at_once=2 * FOLDS,
            watch=watch,
        ).params
    measured = measure(task, params, lanes, train_data, test_data, test_accuracy=right_percent)
    return {name: value.reshape(-1, len(CHOICES)) for name, value in measured.items()}


def _difference(accuracy: np.ndarray) -> dict[str, Any]:
    """What a c for each layer gains over the best single c, in percentage points of accuracy."""
    single, _, layered = accuracy.T
    gains, n = layered - single, len(accuracy)
    return {
        "mean": float(gains.mean()),
        "standard_error": float(gains.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "better": int((gains > 0).sum()),
        "worse": int((gains < 0).sum()),
    }


def _as_json(result: CrossValidation) -> dict[str, Any]:
    return {"c": list(result.c), "scores": result.scores.tolist(), "best_c": result.best_c}


def _print(
    console: Console,
    rows: Sequence[report.Row],
    selections: Sequence[Selection],
    difference: Mapping[str, Any],
) -> None:
    names = ("test_accuracy", "test_error", "generalization_error", "sparsity")
    title = f"500-100-50-20-2, {len(selections)} trials"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("choice", "median c", *(report.COLUMNS[name][0] for name in names)):
        table.add_column(head)
    for row, radii in zip(rows, _medians(selections), strict=True):
        cells = [
            f"{report.COLUMNS[name][1].format(row[name])}±"
            f"{report.COLUMNS[name][1].format(row['std'][name])}"
            for name in names
        ]
        table.add_row(row["choice"], " ".join(f"{c:.2g}" for c in radii), *cells)
    console.print(table)
    error = difference["standard_error"]
    console.print(
        f"A c for each layer instead of a single c: {difference['mean']:+.2f} points of test "
        f"accuracy{'' if error is None else f' (standard error {error:.2f})'}, better in "
        f"{difference['better']} and worse in {difference['worse']} of {len(selections)} trials"
    )


def _medians(selections: Sequence[Selection]) -> np.ndarray:
    """``(choices, layers)`` medians of c over the trials."""
    chosen = [[[c[layer] for layer in HIDDEN] for c in s.choices()] for s in selections]
    return np.median(chosen, axis=0)


def _figure_5(classes: CrossValidation, linear: CrossValidation) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    classes.plot(left, label="validation accuracy (%)").set_title("classification")
    linear.plot(right, label="minus validation error (squared)").set_title("regression")
    return figure


def _layers_figure(selection: Selection, accuracy: np.ndarray) -> Figure:
    """How one trial's search went, and what all trials' choices are worth on test data."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    scores = selection.layered.mean
    proposals = np.arange(1, 1 + len(scores))
    left.plot(proposals, scores, "o", color=plotting.BLUE, label="candidate")
    best = np.fmax.accumulate(scores)
    left.step(proposals, best, where="post", color=plotting.ORANGE, label="best so far")
    single = np.nanmax(selection.single.mean)
    left.axhline(single, color="0.3", linestyle="--", label="best single c")
    left.set(xlabel="candidate, in the order proposed", ylabel="validation accuracy (%)")
    left.set_title("search for a c of each layer, first trial")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    places = range(len(CHOICES))
    right.plot(places, accuracy.T, color="0.75", marker="o", markersize=4)
    right.plot(places, accuracy.mean(axis=0), "D", color=plotting.ORANGE, label="mean")
    right.set_xticks(places, CHOICES)
    right.set(ylabel="test accuracy (%)", title="trained with what was chosen, one line per trial")
    right.margins(x=0.15)
    right.legend()
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return figure
