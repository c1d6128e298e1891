"""Generalization against the number of hidden layers, for several c (after the supplement).

The data and the recipe of Section 5.2 (see `classification`). Its network has hidden layers of 100,
50 and 20 units; a shallower one has the first of these, a deeper one further layers of 20. Theorem
3's bound grows with the number of hidden layers k as c^k sqrt(k), where c is 1 or more.

The recipe was chosen for three hidden layers and takes no account of their number but for the
readout, which starts and moves in inverse proportion to the product of their c. The supplement was
not at hand: the set-up is this package's.

Writes results.json and depth.png to the output folder.
"""

import argparse
from dataclasses import dataclass

import matplotlib
import numpy as np
from rich.console import Console

from l1inf_optax._lanes import Lane, steps_per_epoch
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.paper import classification
from l1inf_optax.experiments.supplement import study


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    depths: tuple[int, ...] = (1, 2, 3, 4, 6)
    c: tuple[float, ...] = (np.inf, 1.0, 0.1)
    epochs: int = 80
    trials: int = 5
    starts: int = 2
    seed: int = 1


DEFAULTS = Settings()
QUICK = Settings(depths=(1, 3), c=(np.inf, 0.1), epochs=40, trials=2, starts=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    text = "numbers of hidden layers"
    study.add_arguments(parser, "depths", options.positive_int, text, DEFAULTS, QUICK)
    options.add_output_option(parser, "results/depth")


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    out = options.make_folder(args.out)
    trials = settings.trials
    train_data, test_data = synthetic.trials(synthetic.classification_trial, settings.seed, trials)
    lanes = [Lane(t, c) for t in range(trials) for c in dict.fromkeys(settings.c)]
    steps = settings.epochs * steps_per_epoch(synthetic.SAMPLES, classification.BATCH_SIZE)

    table: list[report.Row] = []
    for depth in sorted(set(settings.depths)):
        console.print(f"hidden layers of {' '.join(map(str, widths(depth)))} units")
        measured = study.train_and_measure(
            console,
            classification.make_task(steps, widths(depth)),
            lanes,
            train_data,
            test_data,
            steps=steps,
            epochs=settings.epochs,
            starts=settings.starts,
            seed=settings.seed,
        )
        table += study.rows("hidden_layers", [depth] * len(lanes), lanes, measured)

    report.print_table(console, f"classification, {trials} trials", table)
    report.write_json(out / "results.json", "depth", settings, table)
    columns = ("generalization_error", "test_accuracy")
    figure = study.figure(
        table, "hidden_layers", "number of hidden layers", columns, scale="linear"
    )
    study.add_legend(figure)
    figure.savefig(out / "depth.png", dpi=150)
    console.print(f"wrote results.json and depth.png to {out}")


def widths(depth: int) -> tuple[int, ...]:
    """Of that many hidden layers: those of Section 5.2, then as many units as its last."""
    hidden = classification.HIDDEN
    return (*hidden, *hidden[-1:] * (depth - len(hidden)))[:depth]
