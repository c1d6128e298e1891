"""CIFAR-10 with a VGG-16 whose first two windows are 21 x 21 (Section 5.3, Figure 4).

The two wide convolutions and the hidden dense layers stay in the L1 ball of radius c; the 3 x 3
convolutions and the output layer are free, the loss is the cross entropy. Zeros are counted in the
constrained layers. Writes results.json and trials.png (Figure 4) to the output folder.

The data are not included: name them with --data (what cs.toronto.edu/~kriz/cifar.html offers as
binary or Python version, packed or unpacked, or an archive of JPEG files), or say --download to
have scikit-learn fetch them from openml.org.

The paper says VGG-16, and Simonyan and Zisserman's has no batch normalization: there is none here.
(It would divide c out again.) What is made for images of 224 x 224 is smaller, as usual for
32 x 32: hidden layers of 512 units, no dropout. The paper prints no recipe. This one is meant for a
GPU and has not been tuned:

- momentum inside l1inf.constrain, minibatches of 128; the step size rises over the first 5% of the
  steps and falls to zero along a cosine;
- images are shifted by up to four pixels and mirrored, anew in every epoch;
- columns start scaled down onto the boundary of a ball four times as wide as asked; it shrinks to
  c, geometrically, over 70% of the steps; then weights that are exactly zero stay zero;
- on an accelerator activations are bfloat16, parameters float32. The wide convolutions are taken
  in Fourier space, in float32, where they are a small part of the work.

With --quick a few steps on a few images: that everything runs, not what it reaches.
"""

import argparse
import time
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

import l1inf_optax as l1inf
from l1inf_optax._lanes import Lane, Params, Task, steps_per_epoch, train
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data.images import SHAPE, load_cifar10
from l1inf_optax.experiments.networks import recipes
from l1inf_optax.experiments.networks.evaluation import measure, right_percent
from l1inf_optax.experiments.networks.vgg16 import VGG16
from l1inf_optax.experiments.paper import figures


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    c: tuple[float, ...] = (np.inf, 45.0, 35.0, 25.0, 15.0)
    epochs: int = 100
    batch_size: int = 128
    trials: int = 3
    seed: int = 0
    learning_rate: float = 0.02
    images: int | None = None  # all
    precision: str | None = None  # `default_precision`
    data: str | None = None
    download: bool = False


DEFAULTS = Settings()
QUICK = Settings(c=(np.inf, 15.0), epochs=1, batch_size=16, trials=1, images=64)

RISE = 0.05  # share of the steps over which the step size rises
START_WIDTH = 4.0  # the ball's first radius, as a multiple of c
SETTLED = 0.7  # share of the steps after which the radius is c and zeros are held
SHIFT = 4  # pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_training_options(parser, DEFAULTS, QUICK)
    parser.add_argument(
        "--learning-rate",
        type=options.positive_float,
        default=argparse.SUPPRESS,
        metavar="R",
        help=f"the highest step size (default: {DEFAULTS.learning_rate})",
    )
    parser.add_argument(
        "--images",
        type=options.positive_int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="how many images to train and how many to test on, at most (default: all)",
    )
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default=argparse.SUPPRESS,
        help="of the activations (default: bfloat16, but float32 on a CPU)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="a folder of binary or Python batches, their .tar.gz, or an .npz of JPEG files",
    )
    source.add_argument(
        "--download",
        action="store_true",
        help="fetch the images from openml.org instead, once: scikit-learn keeps a copy",
    )
    options.add_output_option(parser, "results/cifar10")


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    precision = settings.precision or default_precision()
    images = load_cifar10(settings.data, download=settings.download)
    out = options.make_folder(args.out)
    settings = replace(settings, precision=precision, data=images.source)
    radii = list(dict.fromkeys(settings.c))
    lanes = [Lane(t, c) for t in range(settings.trials) for c in radii]

    epochs, batch_size, most = settings.epochs, settings.batch_size, settings.images
    train_data = images.x_train[None, :most], images.y_train[None, :most]
    test_data = images.x_test[None, :most], images.y_test[None, :most]
    steps = epochs * steps_per_epoch(train_data[1].size, batch_size)
    task = make_task(precision, settings.learning_rate, steps)
    start = time.perf_counter()
    with report.training_bar(console, steps) as watch:
        params = train(
            task,
            lanes,
            train_data,
            epochs=epochs,
            batch_size=batch_size,
            seed=settings.seed,
            lanes_at_once=1,  # one such network keeps a device busy
            watch=watch,
        ).params
    seconds = time.perf_counter() - start
    measured = measure(
        task,
        params,
        lanes,
        train_data,
        test_data,
        batch_size=batch_size,
        test_accuracy=right_percent,
    )
    table = report.rows(lanes, measured)
    title = f"VGG-16 with 21 x 21 windows on {train_data[1].size:,} images ({images.source})"
    report.print_table(console, title, table)
    console.print(f"trained {len(lanes)} networks in {seconds:.0f} s on {report.device()}")

    report.write_json(
        out / "results.json",
        "cifar10",
        settings,
        table,
        device=report.device(),
        training_seconds=round(seconds, 1),
    )
    _figure(radii, measured).savefig(out / "trials.png", dpi=150)
    console.print(f"wrote results.json and trials.png to {out}")


def default_precision() -> str:
    """Of the activations: 16 bits where there is hardware for them."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@cache  # the training loop compiles once for each task it has not seen
def make_task(precision: str, learning_rate: float, steps: int) -> Task:
    """The network, its loss and its optimizer, for a run of ``steps`` minibatches."""
    network = VGG16(jnp.dtype(precision))
    settled = max(1, round(SETTLED * steps))
    rate = recipes.warm_up_and_decay(learning_rate, RISE, steps)

    def init(key: jax.Array, c: jax.Array) -> Params:
        params = network.init(key, jnp.zeros((1, *SHAPE)))
        return recipes.shrink_into_ball(params, START_WIDTH * c)

    def optimizer(c: jax.Array) -> optax.GradientTransformation:
        radius = recipes.falling_radius(c, START_WIDTH, settled)
        return l1inf.constrain(
            optax.sgd(rate, momentum=0.9, nesterov=True),
            {"wide_*": radius, "hidden_*": radius},
            stickiness=0.0,  # zeros are held
            hold_zeros_from=settled,
        )

    loss = optax.softmax_cross_entropy_with_integer_labels
    return Task(init, network.apply, loss, optimizer, shift_and_mirror, constrained_layers)


def shift_and_mirror(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each of ``(batch, height, width, channels)`` shifted, mirrored half the time.

    By up to four pixels along either axis; what comes in from beyond the edge is black.
    """
    corner_key, mirror_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (len(images), 2), 0, 2 * SHIFT + 1)
    mirrored = jax.random.bernoulli(mirror_key, shape=(len(images),))
    padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))

    def one(image: jax.Array, corner: jax.Array, mirror: jax.Array) -> jax.Array:
        window = jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
        return jnp.where(mirror, window[:, ::-1], window)

    return jax.vmap(one)(padded, corners, mirrored)


def constrained_layers(params: Params) -> Params:
    """The layers whose zeros the paper can have counted: the free ones are 6 of 7 parameters."""
    return {name: layer for name, layer in params["params"].items() if "augmented_kernel" in layer}


def _figure(radii: list[float], measured: dict[str, np.ndarray]) -> Figure:
    """Figure 4: generalization error and sparsity over the trials, for every c."""
    zeros = "exact zeros in constrained layers (%)"
    return figures.trials_figure(
        radii, measured, error="cross entropy", zeros=zeros, scale="linear"
    )
