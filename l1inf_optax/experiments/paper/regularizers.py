"""L1,inf-weight normalization beside L1, L2 and dropout (Section 5.5, Table 3).

The same networks, minibatches and numbers of steps for all:

- classification: 500-100-50-20-2 on the simulated data of Section 5.2, as the command
  classification has it, c = 0.3. Every trial draws new data;
- mnist: 784-900-10 on digits, as the command mnist has it, c = 2. --mnist names a file with all of
  MNIST, then with batches of 128 and 20 epochs; the default digits are 5,000 of its training set;
- cifar10: VGG-16 on the images that --cifar10 names, as the command cifar10 has it, c = 25. Meant
  for a GPU.

L1 and L2 are penalties in the loss, lambda ||W||_1 and lambda ||W||_2^2 / 2 over all weight
matrices and no bias, with the paper's four strengths each; dropout drops half of the units of every
hidden dense layer. These and the network without regularization start from the network's own
initialisation and are trained with an optimizer that suits them: for the classification Adam, with
the learning rate that is best for each on data of seed 0, for the images the command's momentum. Of
a trial's starts, as many for each method, the one with the lowest training error is kept.

Writes results.json and accuracy.png to the output folder.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from l1inf_optax import plotting
from l1inf_optax._lanes import Data, Lane, Params, Task, steps_per_epoch
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.data.digits import load_digits
from l1inf_optax.experiments.data.images import load_cifar10
from l1inf_optax.experiments.networks import recipes
from l1inf_optax.experiments.networks.evaluation import measure, right_percent, train_best_starts
from l1inf_optax.experiments.networks.vgg16 import VGG16
from l1inf_optax.experiments.paper import cifar10, classification, mnist
from l1inf_optax.linen import AugmentedMLP

STRENGTHS = (0.1, 0.01, 0.001, 0.0001)
# The strengths of the penalties of all methods but ours.
RIVALS = {
    "none": {"l1": 0.0, "l2": 0.0},
    **{f"L1, {strength:g}": {"l1": strength, "l2": 0.0} for strength in STRENGTHS},
    **{f"L2, {strength:g}": {"l1": 0.0, "l2": strength} for strength in STRENGTHS},
    "dropout, 0.5": {"l1": 0.0, "l2": 0.0},
}
METHODS = (*RIVALS, "L1,inf ball")
CLASSIFICATION_RATES = dict.fromkeys(RIVALS, 3e-4) | {
    "L1, 0.01": 1e-2,
    "L1, 0.001": 3e-2,
    "L1, 0.0001": 3e-2,
    "L2, 0.1": 3e-2,
    "L2, 0.01": 3e-2,
}
# Table 3 of the paper: test accuracy in percent, in the order of METHODS.
PAPER = {
    "classification": (71.6, 50.0, 50.0, 81.6, 73.2, 70.8, 73.4, 73.2, 71.8, 73.5, 91.0),
    "mnist": (97.85, 13.87, 11.35, 97.33, 97.99, 80.30, 92.30, 94.43, 97.90, 98.11, 98.03),
    "cifar10": (93.34, 48.32, 92.53, 93.43, 93.64, 80.41, 90.38, 91.41, 93.72, 93.42, 93.75),
}


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    data_sets: tuple[str, ...] = ("classification", "mnist")
    trials: int = 3
    starts: int = 4
    seed: int = 1
    mnist: str | None = None
    cifar10: str | None = None


DEFAULTS = Settings()
QUICK = Settings(data_sets=("classification",), trials=1, starts=1)


class DataSet(NamedTuple):
    """A data set, a column of Table 3, and the network that learns it.

    Attributes:
        train_data: as for `_lanes.train`.
        test_data: alike.
        epochs: passes over the training data.
        batch_size: examples per step.
        c: the normalization constant.
        task: from a number of steps, the command's own.
        optimizer: from a number of steps and a rate, that of the other methods.
        rates: a learning rate for each of them.
        dropped: the network's ``apply``, with dropout.
        together: how many lanes a step computes together, as `_lanes.train` has it.
        source: where the data came from, if from a file.
    """

    train_data: Data
    test_data: Data
    epochs: int
    batch_size: int
    c: float
    task: Callable[[int], Task]
    optimizer: Callable[[int, ArrayLike], optax.GradientTransformation]
    rates: dict[str, float]
    dropped: Callable[..., Any]
    together: int | None = None
    source: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--data-sets",
        nargs="+",
        choices=PAPER,
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"of {', '.join(PAPER)} (default: {' '.join(DEFAULTS.data_sets)})",
    )
    options.add_training_options(parser, DEFAULTS, QUICK)
    for name, what in {"mnist": "mnist.npz or a folder of IDX files", "cifar10": "images"}.items():
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar="PATH",
            help=f"{what}, as the command {name} reads with --data",
        )
    options.add_output_option(parser, "results/regularizers")


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    data_sets = {name: DATA_SETS[name](settings) for name in dict.fromkeys(settings.data_sets)}
    sources = {name: data_set.source for name, data_set in data_sets.items()}
    settings = replace(
        settings,
        mnist=sources.get("mnist", settings.mnist),
        cifar10=sources.get("cifar10", settings.cifar10),
    )
    out = options.make_folder(args.out)
    rows = [
        row
        for name, data_set in data_sets.items()
        for row in _compare(console, name, data_set, settings)
    ]
    for name in data_sets:
        console.print(_table(name, [row for row in rows if row["data_set"] == name]))
    report.write_json(out / "results.json", "regularizers", settings, rows, device=report.device())
    _figure(rows).savefig(out / "accuracy.png", dpi=150)
    console.print(f"wrote results.json and accuracy.png to {out}")


def _compare(
    console: Console, name: str, data_set: DataSet, settings: Settings
) -> list[report.Row]:
    """All methods on one data set: a row for each."""
    examples = np.shape(data_set.train_data[1])[1]
    steps = data_set.epochs * steps_per_epoch(examples, data_set.batch_size)
    *penalized, dropout, ball = METHODS
    found: dict[str, dict[str, np.ndarray]] = {}
    for task, methods in (
        (_rival(data_set, steps, dropout=False), penalized),
        (_rival(data_set, steps, dropout=True), [dropout]),
        (data_set.task(steps), [ball]),
    ):
        console.print(f"{name}: {', '.join(methods)}")
        with report.training_bar(console, steps) as watch:
            measured = _measure(data_set, task, methods, settings, watch)
        for i, method in enumerate(methods):
            found[method] = {key: values[:, i] for key, values in measured.items()}
    return [
        {
            "data_set": name,
            "method": method,
            "trials": settings.trials,
            **report.summary(found[method]),
            "paper_test_accuracy": accuracy,
        }
        for method, accuracy in zip(METHODS, PAPER[name], strict=True)
    ]


def _measure(
    data_set: DataSet, task: Task, methods: Sequence[str], settings: Settings, watch: Callable
) -> dict[str, np.ndarray]:
    """The columns of `evaluation.measure`, ``(trials, methods)`` each."""
    trials = settings.trials
    rivals = {name: {**RIVALS[name], "rate": rate} for name, rate in data_set.rates.items()}
    lanes = [Lane(t, rivals.get(name, data_set.c)) for t in range(trials) for name in methods]
    lanes, params = train_best_starts(
        task,
        lanes,
        data_set.train_data,
        trials=trials,
        starts=settings.starts,
        epochs=data_set.epochs,
        batch_size=data_set.batch_size,
        seed=settings.seed,
        lanes_at_once=data_set.together,
        watch=watch,
    )
    measured = measure(
        task,
        params,
        lanes,
        data_set.train_data,
        data_set.test_data,
        batch_size=data_set.batch_size,
        test_accuracy=right_percent,
    )
    return {name: values.reshape(trials, -1) for name, values in measured.items()}


def _rival(data_set: DataSet, steps: int, *, dropout: bool) -> Task:
    """The data set's network with penalties for a ball, and dropout if asked for."""
    own = data_set.task(steps)

    def init(key: jax.Array, chosen: dict[str, jax.Array]) -> Params:
        return own.init(key, jnp.array(jnp.inf))

    def apply(params: Params, inputs: Any) -> Any:
        if not isinstance(inputs, tuple):  # to be measured
            return own.apply(params, inputs)
        x, key = inputs
        return data_set.dropped(params, x, rngs={"dropout": key})

    def with_key(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        own_key, dropout_key = jax.random.split(key)
        return (own.augment(own_key, x) if own.augment else x), dropout_key

    def optimizer(chosen: dict[str, jax.Array]) -> optax.GradientTransformation:
        penalties = add_penalties(chosen["l1"], chosen["l2"])
        return optax.chain(penalties, data_set.optimizer(steps, chosen["rate"]))

    return own._replace(
        init=init, apply=apply, optimizer=optimizer, augment=with_key if dropout else own.augment
    )


def add_penalties(l1: jax.Array, l2: jax.Array) -> optax.GradientTransformation:
    """Add the gradients of ``l1 ||W||_1 + l2 ||W||_2^2 / 2`` over all weight matrices W.

    A bias, and the row of an ``augmented_kernel`` that holds it, has no penalty.
    """

    def add(grads: Params, params: Params) -> Params:
        def leaf(path: tuple, grad: jax.Array, param: jax.Array) -> jax.Array:
            slope = l1 * jnp.sign(param) + l2 * param
            if path[-1].key == "bias":
                return grad
            if path[-1].key == "augmented_kernel":
                slope = slope.at[0].set(0)
            return grad + slope

        return jax.tree_util.tree_map_with_path(leaf, grads, params)

    return optax.stateless(add)


def relu_with_dropout(x: jax.Array) -> jax.Array:
    """The activation of a Linen module whose ``apply`` is given a key for dropout."""
    return nn.Dropout(0.5, deterministic=False)(nn.relu(x))


# --- the three columns ----------------------------------------------------------------------------


def _classification(settings: Settings) -> DataSet:
    train_data, test_data = synthetic.trials(
        synthetic.classification_trial, settings.seed, settings.trials
    )
    widths = (*classification.HIDDEN, 2)
    return DataSet(
        train_data,
        test_data,
        epochs=classification.DEFAULTS.epochs,
        batch_size=classification.BATCH_SIZE,
        c=0.3,
        task=classification.make_task,
        optimizer=lambda steps, rate: optax.adam(recipes.warm_up_and_decay(rate, 0.1, steps)),
        rates=CLASSIFICATION_RATES,
        dropped=AugmentedMLP(widths, activation=relu_with_dropout).apply,
        together=classification.LANES_AT_ONCE,
    )


def _mnist(settings: Settings) -> DataSet:
    digits = load_digits(settings.mnist)
    rate = mnist.LEARNING_RATES["momentum"]
    full = len(digits.y_train) >= mnist.MANY
    return DataSet(
        (digits.x_train[None], digits.y_train[None]),
        (digits.x_test[None], digits.y_test[None]),
        epochs=20 if full else mnist.DEFAULTS.epochs,
        batch_size=128 if full else mnist.DEFAULTS.batch_size,
        c=2.0,
        task=lambda steps: mnist.make_task("momentum", rate, steps, len(digits.y_train)),
        optimizer=lambda steps, rate: recipes.OPTIMIZERS["momentum"](
            lambda step: rate * optax.cosine_decay_schedule(1.0, steps)(step)
        ),
        rates=dict.fromkeys(RIVALS, rate),
        dropped=AugmentedMLP(mnist.NETWORK.features, activation=relu_with_dropout).apply,
        source=digits.source,
    )


def _cifar10(settings: Settings) -> DataSet:
    images = load_cifar10(settings.cifar10)
    precision, rate = cifar10.default_precision(), cifar10.DEFAULTS.learning_rate
    return DataSet(
        (images.x_train[None], images.y_train[None]),
        (images.x_test[None], images.y_test[None]),
        epochs=cifar10.DEFAULTS.epochs,
        batch_size=cifar10.DEFAULTS.batch_size,
        c=25.0,
        task=lambda steps: cifar10.make_task(precision, rate, steps),
        optimizer=lambda steps, rate: recipes.OPTIMIZERS["momentum"](
            recipes.warm_up_and_decay(rate, cifar10.RISE, steps)
        ),
        rates=dict.fromkeys(RIVALS, rate),
        dropped=VGG16(jnp.dtype(precision), relu_with_dropout).apply,
        together=1,
        source=images.source,
    )


DATA_SETS = {"classification": _classification, "mnist": _mnist, "cifar10": _cifar10}


# --- the report -----------------------------------------------------------------------------------


def _table(name: str, rows: Sequence[report.Row]) -> Table:
    title = f"{name}, {rows[0]['trials']} trials"
    out = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    columns = ("test_accuracy", "paper_test_accuracy", "generalization_error", "sparsity")
    out.add_column("regularizer")
    for column in columns:
        out.add_column(report.COLUMNS[column][0], justify="right")
    for row in rows:
        cells = []
        for column in columns:
            number = report.COLUMNS[column][1].format
            spread = row["std"].get(column)
            cells.append(number(row[column]) + (f"±{number(spread)}" if spread else ""))
        out.add_row(row["method"], *cells)
    return out


def _figure(rows: Sequence[report.Row]) -> Figure:
    """Test accuracy of every method beside the paper's: a panel for each data set."""
    names = list(dict.fromkeys(row["data_set"] for row in rows))
    figure = Figure(figsize=(4.6 * len(names), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    places = np.arange(len(METHODS))
    for ax, name in zip(panels, names, strict=True):
        own = [row for row in rows if row["data_set"] == name]
        ax.errorbar(
            [row["test_accuracy"] for row in own],
            places,
            xerr=[row["std"]["test_accuracy"] for row in own],
            fmt="o",
            color=plotting.BLUE,
            capsize=3,
            label="measured, mean and standard deviation",
        )
        paper = [row["paper_test_accuracy"] for row in own]
        ax.plot(paper, places, "D", color=plotting.ORANGE, markersize=4, label="Table 3")
        ax.set(title=name, xlabel="test accuracy (%)")
        ax.grid(alpha=0.3)
    panels[0].set_yticks(places, METHODS)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
