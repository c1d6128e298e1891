"""What the three studies of the paper's supplement share: options, training, rows and figures.

Each asks what one quantity does to the networks of Section 5.2: `sample_size`, `depth` and
`step_size`. The supplement itself was not at hand, only the paper's sentence about it, so the
set-ups are this package's.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console

from l1inf_optax import plotting
from l1inf_optax._lanes import Data, Lane, Task
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.networks.evaluation import measure, right_percent, train_best_starts
from l1inf_optax.experiments.paper import classification

PANELS = {
    "train_error": "training error (cross entropy)",
    "generalization_error": "generalization error (cross entropy)",
    "test_accuracy": "test accuracy (%)",
}
# Okabe and Ito's colours; lines that cover each other, or have none, can still be told apart.
STYLES = (
    (plotting.BLUE, "o-"),
    (plotting.ORANGE, "s-"),
    ("#009E73", "^--"),
    ("#CC79A7", "D:"),
)


def add_arguments(
    parser: argparse.ArgumentParser,
    name: str,
    kind: Callable[[str], Any],
    text: str,
    defaults: options.S,
    quick: options.S,
) -> None:
    """The options of a study: those of a training, and the values of what it varies.

    Args:
        parser: the experiment's parser.
        name: what is varied, a field of ``defaults`` with a tuple.
        kind: parses one value.
        text: help for it.
        defaults: the settings.
        quick: what ``--quick`` takes instead.
    """
    options.add_option(parser, defaults, f"--{name}", text, nargs="+", type=kind, metavar="X")
    options.add_training_options(parser, defaults, quick)


def train_and_measure(
    console: Console,
    task: Task,
    lanes: Sequence[Lane],
    train_data: Data,
    test_data: Data,
    *,
    steps: int,
    epochs: int,
    starts: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Train each lane from several starts, keep the best, measure it.

    Args:
        console: shows a progress bar.
        task: what to train.
        lanes: the networks wanted.
        train_data: a set for every trial that the lanes name.
        test_data: as many sets, or a number of them that divides it.
        steps: the minibatches that the epochs take.
        epochs: passes over the training data.
        starts: how many each lane is given.
        seed: of everything random.

    Returns:
        ``(lanes,)`` values by name, as `evaluation.measure` does, and test_accuracy in percent.
    """
    with report.training_bar(console, steps) as watch:
        kept, params = train_best_starts(
            task,
            lanes,
            train_data,
            trials=np.shape(train_data[1])[0],
            starts=starts,
            epochs=epochs,
            batch_size=classification.BATCH_SIZE,
            seed=seed,
            lanes_at_once=classification.LANES_AT_ONCE,
            watch=watch,
        )
    return measure(task, params, kept, train_data, test_data, test_accuracy=right_percent)


def rows(
    name: str, values: Sequence[Any], lanes: Sequence[Lane], measured: Mapping[str, np.ndarray]
) -> list[report.Row]:
    """A row for each value and each c, as `report.rows` makes them.

    Args:
        name: what was varied: the key of the value in the rows.
        values: that of every lane.
        lanes: what was trained.
        measured: name to ``(lanes,)`` values.
    """
    table = []
    for value in dict.fromkeys(values):
        own = [i for i, of_lane in enumerate(values) if of_lane == value]
        part = report.rows([lanes[i] for i in own], {k: v[own] for k, v in measured.items()})
        table += [{name: value, **row} for row in part]
    return table


def figure(
    table: Sequence[report.Row], name: str, label: str, columns: Sequence[str], *, scale: str
) -> Figure:
    """Means and standard deviations against what was varied: a panel a column, a line for each c.

    Axes of errors are logarithmic: there a bar goes down to a tenth of the mean at most.

    Args:
        table: as `rows` makes it.
        name: what was varied.
        label: of the horizontal axis.
        columns: of `PANELS`.
        scale: of the horizontal axis.

    Returns:
        The figure, which still lacks its legend: see `add_legend`.
    """
    out = Figure(figsize=(5 * len(columns), 4.2), layout="constrained")
    values = sorted({row[name] for row in table})
    panels = out.subplots(1, len(columns), squeeze=False)[0]
    for ax, column in zip(panels, columns, strict=True):
        _lines(ax, table, name, column)
        ax.set(xlabel=label, ylabel=PANELS[column], xscale=scale)
        ax.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        ax.xaxis.set_minor_locator(NullLocator())
    return out


def add_legend(figure: Figure) -> None:
    """Below the panels, of the lines in the first, which has them all."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _lines(ax: Axes, table: Sequence[report.Row], name: str, column: str) -> None:
    errors = column.endswith("error")
    radii = dict.fromkeys(row["c"] for row in table)
    for c, (color, line) in zip(radii, cycle(STYLES), strict=False):
        own = [row for row in table if row["c"] == c]
        means = np.array([row[column] for row in own])
        spread = np.array([row["std"][column] for row in own])
        below = np.minimum(spread, 0.9 * means) if errors else spread  # a logarithm has no zero
        ax.errorbar(
            [row[name] for row in own],
            means,
            (below.tolist(), spread.tolist()),
            fmt=line,
            color=color,
            markersize=5,
            capsize=3,
            label="no constraint" if np.isinf(c) else f"c = {c:g}",
        )
    if errors:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
