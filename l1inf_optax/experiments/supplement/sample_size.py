"""Generalization against the number of training samples, for several c (after the supplement).

The networks, data and recipe of Section 5.2 (see `classification`), with more or fewer samples to
train on. Theorem 3 bounds the generalization error by a multiple of 1 / sqrt(n): a straight line of
slope -1/2 where both axes are logarithmic. The figure draws one; the slopes of the measured errors
are fitted by least squares to the logarithms of their means over the trials.

Every network takes equally many steps on minibatches of 50, whatever its n: its samples are
repeated until they are as many as the largest n. So every n has to divide the largest. Every
trial and every n has new training data and initial weights; the 1,000 samples to test on are the
trial's. The supplement was not at hand: the set-up is this package's.

Writes results.json and sample_size.png to the output folder.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from l1inf_optax._lanes import Data, Lane, steps_per_epoch
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.paper import classification
from l1inf_optax.experiments.supplement import study

TEST_SAMPLES = 1000


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    samples: tuple[int, ...] = (125, 250, 500, 1000, 2000)
    c: tuple[float, ...] = (np.inf, 1.0, 0.1)
    epochs: int = 20
    trials: int = 5
    starts: int = 2
    seed: int = 1


DEFAULTS = Settings()
QUICK = Settings(samples=(125, 500, 1000), c=(np.inf, 0.1), trials=2, starts=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    text = "samples to train on; each a divisor of the largest, which --epochs counts passes over"
    study.add_arguments(parser, "samples", options.positive_int, text, DEFAULTS, QUICK)
    options.add_output_option(parser, "results/sample-size")


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    sizes, trials = sorted(set(settings.samples)), settings.trials
    if any(sizes[-1] % n for n in sizes):
        raise options.OptionError(
            f"--samples {' '.join(map(str, sizes))}: give numbers that divide the largest, so that "
            "repeating the samples makes all sets equally large"
        )
    out = options.make_folder(args.out)
    train_data, test_data = make_data(settings.seed, sizes, trials)

    wanted = [
        (n, Lane(i * trials + t, c))
        for i, n in enumerate(sizes)
        for t in range(trials)
        for c in dict.fromkeys(settings.c)
    ]
    lanes = [lane for _, lane in wanted]
    steps = settings.epochs * steps_per_epoch(sizes[-1], classification.BATCH_SIZE)
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
    table = study.rows("samples", [n for n, _ in wanted], lanes, measured)

    report.print_table(console, f"500-100-50-20-2, {trials} trials, {steps} steps each", table)
    slopes = fit_slopes(table) if len(sizes) > 1 else []
    for slope in slopes:
        console.print(
            f"c = {slope['c']:g}: generalization error in proportion to n^{slope['slope']:.2f}"
        )
    report.write_json(out / "results.json", "sample-size", settings, table, slopes=slopes)
    _figure(table).savefig(out / "sample_size.png", dpi=150)
    console.print(f"wrote results.json and sample_size.png to {out}")


def make_data(seed: int, sizes: Sequence[int], trials: int) -> tuple[Data, Data]:
    """Training sets of all sizes, repeated up to the largest, and the trials' test sets.

    Args:
        seed: fixes all.
        sizes: numbers of samples, ascending; each divides the last.
        trials: how many sets of each.

    Returns:
        The training data, inputs ``(len(sizes) * trials, sizes[-1], 500)`` and classes, with set
        ``i * trials + t`` of size i and trial t; and the test data, ``(trials, 1000, 500)``.
    """
    key_test, *keys = jax.random.split(jax.random.key(seed), 1 + len(sizes))

    def sets(key: jax.Array, n: int, copies: int) -> Data:
        draw = jax.jit(jax.vmap(partial(synthetic.classification, n=n)))
        x, y = draw(jax.random.split(key, trials))
        return jnp.tile(x, (1, copies, 1)), jnp.tile(y, (1, copies))

    drawn = [sets(key, n, sizes[-1] // n) for key, n in zip(keys, sizes, strict=True)]
    x, y = (jnp.concatenate(parts) for parts in zip(*drawn, strict=True))
    return (x, y), sets(key_test, TEST_SAMPLES, 1)


def fit_slopes(table: Sequence[report.Row]) -> list[dict[str, float]]:
    """The exponent of n that fits the mean generalization errors best, for each c."""
    slopes = []
    for c in dict.fromkeys(row["c"] for row in table):
        points = [(row["samples"], row["generalization_error"]) for row in table if row["c"] == c]
        log_n, log_error = np.log(points).T
        slopes.append({"c": c, "slope": float(np.polyfit(log_n, log_error, 1)[0])})
    return slopes


def _figure(table: Sequence[report.Row]) -> Figure:
    """Generalization error, with a line of slope -1/2 through the middle, and test accuracy."""
    columns = ("generalization_error", "test_accuracy")
    label = "number of training samples n"
    figure = study.figure(table, "samples", label, columns, scale="log")
    n = np.unique([row["samples"] for row in table])
    errors = [row["generalization_error"] for row in table]
    middle = np.exp(np.log(errors).mean())
    line = middle * np.sqrt(np.exp(np.log(n).mean()) / n)
    figure.axes[0].plot(n, line, color="0.3", linestyle=":", label="slope of $1/\\sqrt{n}$")
    study.add_legend(figure)
    return figure
