"""Training and test results against the initial step size, for several c (after the supplement).

The networks, data and recipe of Section 5.2 (see `classification`), with all learning rates
multiplied by a factor. They rise to their highest value over the first tenth of the steps and then
fall to zero, whatever the factor. The supplement was not at hand: the set-up is this package's.

Writes results.json and step_size.png to the output folder.
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

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    c: tuple[float, ...] = (np.inf, 1.0, 0.1)
    epochs: int = 80
    trials: int = 4
    starts: int = 2
    seed: int = 1


DEFAULTS = Settings()
QUICK = Settings(rates=(0.1, 1.0, 10.0), c=(np.inf, 0.1), epochs=40, trials=2, starts=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    text = "factors that multiply the recipe's learning rates"
    study.add_arguments(parser, "rates", options.positive_float, text, DEFAULTS, QUICK)
    options.add_output_option(parser, "results/step-size")


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    out = options.make_folder(args.out)
    trials = settings.trials
    train_data, test_data = synthetic.trials(synthetic.classification_trial, settings.seed, trials)
    lanes = [
        Lane(t, c, rate)
        for rate in sorted(set(settings.rates))
        for t in range(trials)
        for c in dict.fromkeys(settings.c)
    ]
    steps = settings.epochs * steps_per_epoch(synthetic.SAMPLES, classification.BATCH_SIZE)
    measured = study.train_and_measure(
        console,
        classification.make_task(steps),
        lanes,
        train_data,
        test_data,
        steps=steps,
        epochs=settings.epochs,
        starts=settings.starts,
        seed=settings.seed,
    )
    table = study.rows("rate", [lane.rate for lane in lanes], lanes, measured)

    title = f"500-100-50-20-2, {trials} trials; rate: a multiple of the recipe's"
    report.print_table(console, title, table)
    report.write_json(out / "results.json", "step-size", settings, table)
    columns = ("train_error", "test_accuracy")
    label = "initial step size (multiple of the recipe's)"
    figure = study.figure(table, "rate", label, columns, scale="log")
    study.add_legend(figure)
    figure.savefig(out / "step_size.png", dpi=150)
    console.print(f"wrote results.json and step_size.png to {out}")
