"""Optimizers and projections compared on the simulated data of Sections 5.1 and 5.2.

Every optimizer trains twice: with the Euclidean projection chained after it (chain), and inside
l1inf.constrain, which projects in the metric the optimizer steps in (constrain). Lion steps by
signs and has no such metric, so it has no second result. For SGD and momentum the two are the same
projection.

- regression: 1000-300-1, c = 1, 500 samples, full batch, squared error;
- classification: 500-100-50-20-2, c = 1 and c = 0.3, 500 samples, batches of 50, cross entropy.

The recipe is the same for all of them. While the learning rate is high, c falls; then the zeros are
held (``hold_zeros_from``), which keeps a network of more weights than samples from interpolating.
For the first half of the steps c falls geometrically, from 1.4 times its final value for the
regression and 3 times for the classification. Every unit starts on the boundary of its ball, with a
bias that takes 0.5 or 0.2 of it; weights get the rest. The output layer is free; it starts from
LeCun's initialisation, times 10 for the regression and 3 / c for the classification, whose signal
shrinks with c in every hidden layer. The learning rate rises from zero over the first tenth of the
steps and falls back to it along a cosine. There is no early stopping, and everything else of an
optimizer is as Optax has it (momentum: 0.9). All this was chosen while looking at trials of seed 0:
report another seed.

Each result is a mean and a standard deviation over trials, with new data and new initial weights in
each. Its learning rate is the one of a common grid with the lowest validation error, on the average
of separate trials, whose data serve nothing else.

Writes results.json and errors.png to the output folder.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

import l1inf_optax as l1inf
from l1inf_optax._lanes import (
    Data,
    Lane,
    Metric,
    Params,
    Task,
    share_of_zeros,
    steps_per_epoch,
    train,
)
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.networks import recipes
from l1inf_optax.experiments.networks.evaluation import evaluate, squared_error
from l1inf_optax.linen import AugmentedMLP

Split = tuple[Data, Data]


def _sm3(rate: optax.Schedule) -> optax.GradientTransformation:
    """Optax's SM3, which takes no schedule."""
    return optax.chain(optax.sm3(1.0), optax.scale_by_schedule(rate))


OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "amsgrad": optax.amsgrad,
    "adabelief": optax.adabelief,
    "radam": optax.radam,
    "yogi": optax.yogi,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "adafactor": optax.adafactor,
    "lamb": optax.lamb,
    "sm3": _sm3,
    "lion": optax.lion,
}
WITHOUT_METRIC = ("lion",)
PROJECTIONS = ("chain", "constrain")

RISE = 0.1  # share of the steps over which the learning rate rises
FALL = 0.5  # share of the steps over which c falls; after them zeros are held


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    trials: int = 10
    selection_trials: int = 2
    regression_epochs: int = 400
    classification_epochs: int = 120
    seed: int = 1

    def epochs(self, problem: str) -> int:
        """Passes over the data of a problem."""
        return {
            "regression": self.regression_epochs,
            "classification": self.classification_epochs,
        }[problem]


DEFAULTS = Settings()
QUICK = Settings(
    optimizers=("adam", "lion"),
    rates=(3e-3, 3e-2),
    trials=2,
    selection_trials=1,
    regression_epochs=50,
    classification_epochs=10,
)


class Problem(NamedTuple):
    """What is learned, and how it is measured.

    Attributes:
        network: hidden layers and a free readout.
        inputs: their number.
        c: the normalization constants to train with.
        sample: from a key, training data and data to measure the error on.
        loss: ``(outputs, y) -> (batch,)``, for training.
        error: ``(outputs, y) -> (batch,)``, for the table.
        error_name: what the error's axis and column say.
        batch_size: examples per step.
        first: the first radius, as a multiple of c.
        bias_share: what a unit's bias takes of its budget at the start.
        readout: ``c -> factor`` for the initial readout.
    """

    network: AugmentedMLP
    inputs: int
    c: tuple[float, ...]
    sample: Callable[[jax.Array], synthetic.Trial]
    loss: Metric
    error: Metric
    error_name: str
    batch_size: int
    first: float
    bias_share: float
    readout: Callable[[jax.Array], Any]


def _wrong_percent(logits: jax.Array, y: jax.Array) -> jax.Array:
    return 100.0 * (logits.argmax(-1) != y)


PROBLEMS = {
    "regression": Problem(
        network=AugmentedMLP((300, 1)),
        inputs=synthetic.REGRESSION_INPUTS,
        c=(1.0,),
        sample=synthetic.regression_trial,
        loss=squared_error,
        error=squared_error,
        error_name="test MSE",
        batch_size=synthetic.SAMPLES,
        first=1.4,
        bias_share=0.5,
        readout=lambda c: 10.0,
    ),
    "classification": Problem(
        network=AugmentedMLP((100, 50, 20, 2)),
        inputs=synthetic.CLASSIFICATION_INPUTS,
        c=(1.0, 0.3),
        sample=synthetic.classification_trial,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        error=_wrong_percent,
        error_name="test error (%)",
        batch_size=50,
        first=3.0,
        bias_share=0.2,
        readout=lambda c: 3.0 / c,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = partial(options.add_option, parser, DEFAULTS)
    count = {"type": options.positive_int, "metavar": "N"}
    add("--optimizers", "what to compare", nargs="+", choices=OPTIMIZERS, metavar="NAME")
    add("--rates", "learning rates", nargs="+", type=options.positive_float, metavar="R")
    add("--trials", "trials behind each result", **count)
    add("--selection-trials", "trials that choose each learning rate", **count)
    add("--regression-epochs", "steps of the regression, full batches", **count)
    add("--classification-epochs", "passes over the data of the classification", **count)
    add("--seed", "of data and initial weights", type=options.natural_int, metavar="N")
    instead = "; ".join(
        f"{name.replace('_', ' ')} {list(value) if isinstance(value, tuple) else value}"
        for name, value in options.changes(DEFAULTS, QUICK).items()
    )
    parser.add_argument("--quick", action="store_true", help=f"a first look: {instead}")
    options.add_output_option(parser, "results/optimizers")


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    out = options.make_folder(args.out)
    data = {name: _all_data(problem, settings) for name, problem in PROBLEMS.items()}
    jobs = [
        (problem, optimizer, projection)
        for problem in PROBLEMS
        for optimizer in dict.fromkeys(settings.optimizers)
        for projection in PROJECTIONS
        if projection == "chain" or optimizer not in WITHOUT_METRIC
    ]

    def compare(job: tuple[str, str, str]) -> list[report.Row]:
        return _compare(*job, data[job[0]], settings)

    # While one thread compiles the next job, which takes one core, the other trains.
    with ThreadPoolExecutor(2) as pool:
        done = track(pool.map(compare, jobs), "training", total=len(jobs), console=console)
        table = [row for rows in done for row in rows]

    print(markdown(table))
    report.write_json(out / "results.json", "optimizers", settings, table)
    _figure(table).savefig(out / "errors.png", dpi=150)
    console.print(f"wrote results.json and errors.png to {out}")


@cache  # the training loop compiles once for each task it has not seen
def make_task(problem_name: str, optimizer_name: str, projection: str, steps: int) -> Task:
    """The network, its loss and its optimizer, for a run of ``steps`` minibatches."""
    problem = PROBLEMS[problem_name]
    fall = max(1, round(FALL * steps))

    def init(key: jax.Array, c: jax.Array) -> Params:
        params = problem.network.init(key, jnp.zeros((1, problem.inputs)))
        return recipes.start_on_boundary(
            params, problem.first * c, problem.bias_share, problem.readout(c)
        )

    def optimizer(c: jax.Array, rate: jax.Array) -> optax.GradientTransformation:
        inner = OPTIMIZERS[optimizer_name](recipes.warm_up_and_decay(rate, RISE, steps))
        radii = {"hidden_*": recipes.falling_radius(c, problem.first, fall), "readout": None}
        if projection == "constrain":
            return l1inf.constrain(inner, radii, stickiness=0.0, hold_zeros_from=fall)
        project = l1inf.keep_params_in_l1inf_ball(radii, stickiness=0.0, hold_zeros_from=fall)
        return optax.chain(inner, project)

    return Task(init, problem.network.apply, problem.loss, optimizer)


def _all_data(problem: Problem, settings: Settings) -> Split:
    """A data set for every trial; those of the selection come last."""
    trials = settings.trials + settings.selection_trials
    return synthetic.trials(problem.sample, settings.seed, trials)


def _compare(
    problem_name: str,
    optimizer: str,
    projection: str,
    data: Split,
    settings: Settings,
) -> list[report.Row]:
    """Choose the learning rate for every c, train with it, measure: one row for every c."""
    radii, rates = PROBLEMS[problem_name].c, settings.rates
    trials, selection = settings.trials, settings.selection_trials
    task = make_task(problem_name, optimizer, projection, _steps(problem_name, settings))
    fit = partial(_fit, task, problem_name, data, settings)
    candidates = [
        Lane(trials + t, c, rate) for rate in rates for t in range(selection) for c in radii
    ]
    validation = fit(candidates)["test_error"].reshape(len(rates), selection, -1).mean(axis=1)
    best = np.where(np.isfinite(validation), validation, np.inf).argmin(axis=0)
    chosen = {c: rates[i] for c, i in zip(radii, best, strict=True)}
    lanes = [Lane(t, c, chosen[c]) for t in range(trials) for c in radii]
    rows = report.rows(lanes, fit(lanes))
    about = {"problem": problem_name, "optimizer": optimizer, "projection": projection}
    return [
        {**about, "rate": chosen[row["c"]], "validation_errors": errors.tolist(), **row}
        for row, errors in zip(rows, validation.T, strict=True)
    ]


def _steps(problem_name: str, settings: Settings) -> int:
    per_epoch = steps_per_epoch(synthetic.SAMPLES, PROBLEMS[problem_name].batch_size)
    return settings.epochs(problem_name) * per_epoch


def _fit(
    task: Task, problem_name: str, data: Split, settings: Settings, lanes: Sequence[Lane]
) -> dict[str, np.ndarray]:
    """Train and measure."""
    problem = PROBLEMS[problem_name]
    # Always as many at once: another number of lanes takes another compilation.
    size = settings.selection_trials * len(problem.c)
    groups = [
        train(
            task,
            lanes[first : first + size],
            data[0],
            epochs=settings.epochs(problem_name),
            batch_size=problem.batch_size,
            seed=settings.seed,
            # Steps on small batches are too short to keep the cores busy one by one.
            lanes_at_once=1 if problem.batch_size == synthetic.SAMPLES else size,
        ).params
        for first in range(0, len(lanes), size)
    ]
    params = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)
    error = evaluate(task.apply, {"test_error": problem.error}, params, lanes, data[1])
    return {**error, "sparsity": np.asarray(jax.vmap(share_of_zeros)(params))}


def markdown(table: Sequence[report.Row]) -> str:
    """The test errors as a Markdown table, one line for each optimizer."""
    columns = _columns(table)
    heads = [f"{_title(*column[:2])}, {column[2]}" for column in columns]
    lines = [["optimizer", *heads], ["---"] * (1 + len(heads))]
    cells = {
        (row["problem"], row["c"], row["projection"], row["optimizer"]): _cell(row) for row in table
    }
    for optimizer in dict.fromkeys(row["optimizer"] for row in table):
        lines.append([optimizer, *(cells.get((*column, optimizer), "-") for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(table: Sequence[report.Row]) -> list[tuple[str, float, str]]:
    tasks = dict.fromkeys((row["problem"], row["c"]) for row in table)
    return [(*task, projection) for task in tasks for projection in PROJECTIONS]


def _title(problem: str, c: float) -> str:
    return f"{problem}, c = {c:g}: {PROBLEMS[problem].error_name}"


def _cell(row: report.Row) -> str:
    if not np.isfinite(row["test_error"]):
        return "diverged"
    return f"{row['test_error']:.2f} ± {row['std']['test_error']:.2f}"


def _figure(table: Sequence[report.Row]) -> Figure:
    """Test errors with standard deviations: one panel for each problem and c."""
    tasks = list(dict.fromkeys((row["problem"], row["c"]) for row in table))
    names = list(dict.fromkeys(row["optimizer"] for row in table))
    size = (4.2 * len(tasks), 1.8 + 0.28 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for ax, task in zip(panels, tasks, strict=True):
        _panel(ax, [row for row in table if (row["problem"], row["c"]) == task], names)
        problem, c = task
        ax.set(title=f"{problem}, c = {c:g}", xlabel=PROBLEMS[problem].error_name)
        ax.set_xscale("log" if problem == "regression" else "linear")
    panels[0].set(yticks=range(len(names)), yticklabels=names, ylabel="optimizer")
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _panel(ax: Axes, rows: Sequence[report.Row], names: Sequence[str]) -> None:
    labels = {"chain": "Euclidean projection chained after", "constrain": "l1inf.constrain"}
    for offset, marker, projection in zip((-0.15, 0.15), "so", PROJECTIONS, strict=True):
        own = [row for row in rows if row["projection"] == projection]
        ax.errorbar(
            [row["test_error"] for row in own],
            [names.index(row["optimizer"]) + offset for row in own],
            xerr=[row["std"]["test_error"] for row in own],
            fmt=marker,
            markersize=5,
            capsize=2,
            label=labels[projection],
        )
    ax.grid(axis="x", which="both", alpha=0.3)
