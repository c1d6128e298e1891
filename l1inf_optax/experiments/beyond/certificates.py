"""Measured generalization errors of trained networks beside what the theory promises.

The networks of Section 5.1 (1000-300-1, squared error) and of Section 5.2 (500-100-50-20-2, cross
entropy) are trained for several c. Of each, l1inf.bounds.certificate gives two bounds on the gap
between the errors on training data and on new ones, one by c (Theorems 2 and 3) and one by the
norms the weights have reached; the gap itself is measured on test data. A bound above the error of
guessing, the mean target or all classes alike, says nothing: the figure and the table show where.

The theorems want bounded inputs and losses. So a network's inputs are clipped, beyond 5.6 standard
deviations, which hardly ever happens, and a residual of the regression counts 30 at most.

Writes results.json and gaps.png to the output folder.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from l1inf_optax import bounds, plotting
from l1inf_optax._lanes import Lane, Metric, Params, Task, steps_per_epoch, train
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.networks.evaluation import evaluate, squared_error
from l1inf_optax.experiments.paper import classification, regression

TRUNCATION = 30.0  # of the regression's residuals, whose targets have a standard deviation of 12
DELTA = 0.05


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    trials: int = 5
    regression_epochs: int = 600
    classification_epochs: int = 80
    seed: int = 1

    def epochs(self, problem: str) -> int:
        """Passes over the data of a problem."""
        return {
            "regression": self.regression_epochs,
            "classification": self.classification_epochs,
        }[problem]


DEFAULTS = Settings()
QUICK = Settings(trials=1, regression_epochs=50, classification_epochs=20)


class Problem(NamedTuple):
    """An experiment whose networks are certified.

    Attributes:
        sample: from a key, training and test data.
        make_task: from a number of steps, what is trained.
        batch_size: examples per step.
        c: the normalization constants.
        loss: the bounded loss, or the cross entropy: ``(outputs, y) -> (batch,)``.
        loss_name: what the axis says.
        input_bound: where inputs are clipped.
    """

    sample: Callable[[jax.Array], synthetic.Trial]
    make_task: Callable[[int], Task]
    batch_size: int
    c: Sequence[float]
    loss: Metric
    loss_name: str
    input_bound: float


def _truncated_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.minimum(squared_error(outputs, y), TRUNCATION**2)


PROBLEMS = {
    "regression": Problem(
        sample=synthetic.regression_trial,
        make_task=regression.make_task,
        batch_size=synthetic.SAMPLES,
        c=(10.0, 2.0, 1.0, 0.5, 0.3),
        loss=_truncated_error,
        loss_name="truncated squared error",
        input_bound=6.0,
    ),
    "classification": Problem(
        sample=synthetic.classification_trial,
        make_task=classification.make_task,
        batch_size=classification.BATCH_SIZE,
        c=(1.0, 0.5, 0.3, 0.1, 0.01),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        loss_name="cross entropy",
        input_bound=4.0,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_training_options(parser, DEFAULTS, QUICK)
    for name in PROBLEMS:
        text = f"passes over the data of the {name}"
        options.add_option(
            parser, DEFAULTS, f"--{name}-epochs", text, type=options.positive_int, metavar="N"
        )
    options.add_output_option(parser, "results/bounds")


def run(args: argparse.Namespace) -> None:
    """Train, certify, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    out = options.make_folder(args.out)
    rows = [row for name in PROBLEMS for row in _rows(name, settings, console)]
    for name, problem in PROBLEMS.items():
        console.print(_table(name, problem, [row for row in rows if row["problem"] == name]))
    report.write_json(out / "results.json", "bounds", settings, rows)
    _figure(rows).savefig(out / "gaps.png", dpi=150)
    console.print(f"wrote results.json and gaps.png to {out}")


def _rows(name: str, settings: Settings, console: Console) -> list[report.Row]:
    """Networks of every c and trial: a row for every c."""
    problem, trials, epochs = PROBLEMS[name], settings.trials, settings.epochs(name)
    clip = partial(jnp.clip, min=-problem.input_bound, max=problem.input_bound)
    train_data, test_data = (
        (clip(x), y) for x, y in synthetic.trials(problem.sample, settings.seed, trials)
    )
    pairs = [(t, c) for t in range(trials) for c in problem.c]
    lanes = [Lane(t, c) for t, c in pairs]
    steps = epochs * steps_per_epoch(synthetic.SAMPLES, problem.batch_size)
    task = problem.make_task(steps)
    with report.training_bar(console, steps) as watch:
        params = train(
            task,
            lanes,
            train_data,
            epochs=epochs,
            batch_size=problem.batch_size,
            seed=settings.seed,
            steps_per_call=max(10, steps // 60),
            watch=watch,
        ).params
    risks = [
        evaluate(task.apply, {"risk": problem.loss}, params, lanes, data)["risk"]
        for data in (train_data, test_data)
    ]
    x, y = train_data
    certificates = [
        _certify(problem, task, jax.tree.map(itemgetter(i), params), c, x[t], y[t])
        for i, (t, c) in enumerate(pairs)
    ]
    measured = {
        "train_risk": risks[0],
        "test_risk": risks[1],
        "gap": np.abs(risks[1] - risks[0]),
        "bound_by_c": np.array([found.for_c.total for found in certificates]),
        "bound_by_norms": np.array([found.reached.total for found in certificates]),
        "output_norm": np.array([found.norm_1_1 for found in certificates]),
        "trivial_risk": np.array([found.trivial for found in certificates]),
        "sample_size": np.array([found.sample_size(found.trivial / 10) for found in certificates]),
    }
    return [{"problem": name, **row} for row in report.rows(lanes, measured)]


def _certify(
    problem: Problem, task: Task, params: Params, c: float, x: jax.Array, y: jax.Array
) -> bounds.Certificate:
    """The certificate of one network."""
    return bounds.certificate(
        params,
        x,
        y,
        apply=task.apply,
        c={"hidden_*": c},
        delta=DELTA,
        input_bound=problem.input_bound,
        truncation=TRUNCATION,
    )


def _table(name: str, problem: Problem, rows: Sequence[report.Row]) -> Table:
    trivial = rows[0]["trivial_risk"]
    title = f"{name}: {problem.loss_name}; {trivial:.3g} is had for nothing"
    out = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    columns = {
        "gap": "measured gap",
        "bound_by_norms": "bound by norms",
        "bound_by_c": "bound by c",
        "sample_size": "samples for a tenth of that",
    }
    for heading in ("c", *columns.values()):
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(f"{row['c']:g}", *(f"{row[column]:.3g}" for column in columns))
    return out


def _figure(rows: Sequence[report.Row]) -> Figure:
    """Gaps and bounds against c: a panel for each experiment."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(PROBLEMS))
    for ax, (name, problem) in zip(panels, PROBLEMS.items(), strict=True):
        _panel(ax, [row for row in rows if row["problem"] == name])
        ax.set(title=name, ylabel=f"gap ({problem.loss_name})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _panel(ax: Axes, rows: Sequence[report.Row]) -> None:
    names = {"bound by c": "bound_by_c", "bound by the norms reached": "bound_by_norms"}
    plotting.plot_bounds(
        [row["c"] for row in rows],
        [row["gap"] for row in rows],
        {name: [row[column] for row in rows] for name, column in names.items()},
        ax,
        trivial=rows[0]["trivial_risk"],
        spread={
            name: [row["std"][column] for row in rows]
            for name, column in {**names, "measured": "gap"}.items()
        },
    )
