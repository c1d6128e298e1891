"""High-dimensional regression with a 1000-300-1 ReLU network (Section 5.1, Table 1, Figure 1).

500 samples of 1000 inputs to train on, 1,500 to test on; 100 inputs matter. The hidden layer's
columns stay in the L1 ball of radius c, the output layer is free, the error is the squared error.
Every trial draws new coefficients, data and initial weights. For comparison scikit-learn's LassoCV
is fitted to the same data. Writes results.json and trials.png (Figure 1) to the output folder.

The paper does not say how it trained. This recipe is the same for every c; it was chosen on data of
seed 0, so report another seed:

- Adam, inside l1inf.constrain, on full batches; the learning rate rises over the first 5% of the
  steps and falls to zero along a cosine. At its highest it is 0.03, and 0.03 sqrt(c) for the hidden
  layer if c is below 1;
- for 40% of the steps c falls from 1.8 times its value, geometrically; then weights that are
  exactly zero stay zero, while the others are fitted: the two stages of the relaxed lasso;
- every unit starts on the boundary of its ball, with a bias that takes half of the radius;
- the output layer starts from LeCun's initialisation times 14 / c^1.7, but at least times 1: the
  smaller the ball, the larger the output layer has to grow.
"""

import argparse
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.typing import ArrayLike
from rich.console import Console

import l1inf_optax as l1inf
from l1inf_optax._lanes import Data, Lane, Params, Task, train
from l1inf_optax.experiments.command import options, report
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.experiments.networks import recipes
from l1inf_optax.experiments.networks.evaluation import measure, squared_error
from l1inf_optax.experiments.paper import figures
from l1inf_optax.linen import AugmentedMLP

# Table 1 of the paper: test error, and sparsity in percent.
PAPER = {
    np.inf: (69.520, 3.02),
    10.0: (35.571, 41.58),
    2.0: (8.129, 61.42),
    1.0: (2.424, 84.69),
    0.9: (2.424, 87.62),
    0.8: (2.384, 89.80),
    0.7: (2.334, 91.09),
    0.6: (2.247, 91.78),
    0.5: (2.140, 93.33),
    0.4: (2.209, 93.88),
    0.3: (2.526, 94.18),
}


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do: options of the command, which explains them."""

    c: tuple[float, ...] = tuple(PAPER)
    epochs: int = 600
    trials: int = 10
    seed: int = 1


DEFAULTS = Settings()
QUICK = Settings(c=(np.inf, 1.0, 0.5), epochs=300, trials=2)

RATE = 0.03
RISE = 0.05  # share of the steps over which the learning rate rises
FALL = 0.4  # share of the steps over which c falls; after them zeros are held
FIRST = 1.8  # the first radius, as a multiple of c
BIAS_SHARE = 0.5  # of a unit's radius, at the start

NETWORK = AugmentedMLP((300, 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_training_options(parser, DEFAULTS, QUICK)
    options.add_output_option(parser, "results/regression")


def run(args: argparse.Namespace) -> None:
    """Train, measure, report."""
    matplotlib.use("Agg")
    console = Console()
    settings = options.settings(args, DEFAULTS, QUICK)
    out = options.make_folder(args.out)
    radii, trials = list(dict.fromkeys(settings.c)), settings.trials
    lanes = [Lane(t, c) for t in range(trials) for c in radii]
    train_data, test_data = synthetic.trials(synthetic.regression_trial, settings.seed, trials)

    steps = settings.epochs
    task = make_task(steps)
    with report.training_bar(console, steps) as watch:
        params = train(
            task,
            lanes,
            train_data,
            epochs=steps,
            batch_size=synthetic.SAMPLES,
            seed=settings.seed,
            steps_per_call=10,
            watch=watch,
        ).params
    measured = measure(task, params, lanes, train_data, test_data)
    table = [
        report.beside_the_paper(row, PAPER, "test_error", "sparsity")
        for row in report.rows(lanes, measured)
    ]
    lasso = _lasso(train_data, test_data)

    report.print_table(console, f"1000-300-1, {trials} trials, squared error", table)
    console.print(
        f"LassoCV on the same data: test error {lasso['test_error']:.3f} "
        f"± {lasso['std']['test_error']:.3f}, {lasso['sparsity']:.1f} % zeros"
    )
    report.write_json(out / "results.json", "regression", settings, table, lasso_cv=lasso)
    figures.trials_figure(radii, measured, error="squared").savefig(out / "trials.png", dpi=150)
    console.print(f"wrote results.json and trials.png to {out}")


@cache  # the training loop compiles once for each task it has not seen
def make_task(steps: int) -> Task:
    """The network, its loss and its optimizer, for a run of ``steps`` full batches."""
    fall = max(1, round(FALL * steps))

    def init(key: jax.Array, c: jax.Array) -> Params:
        params = NETWORK.init(key, jnp.zeros((1, synthetic.REGRESSION_INPUTS)))
        readout = jnp.maximum(14 / c**1.7, 1.0)
        return recipes.start_on_boundary(params, FIRST * c, BIAS_SHARE, readout)

    def optimizer(c: jax.Array) -> optax.GradientTransformation:
        hidden = RATE * jnp.sqrt(jnp.minimum(c, 1.0))
        rates: dict[str, ArrayLike] = {"hidden_0": hidden, "readout": RATE}
        adams = {
            layer: optax.adam(recipes.warm_up_and_decay(rate, RISE, steps))
            for layer, rate in rates.items()
        }
        return l1inf.constrain(
            optax.partition(adams, lambda params: {"params": {name: name for name in rates}}),
            {"hidden_*": recipes.falling_radius(c, FIRST, fall), "readout": None},
            stickiness=0.0,  # zeros are held
            hold_zeros_from=fall,
        )

    return Task(init, NETWORK.apply, squared_error, optimizer)


def _lasso(train_data: Data, test_data: Data) -> dict[str, Any]:
    """scikit-learn's LassoCV, five folds: test error and share of zero coefficients."""
    from sklearn.linear_model import LassoCV  # takes a second to import

    found = []
    for x, y, x_test, y_test in zip(*map(np.asarray, (*train_data, *test_data)), strict=True):
        model = LassoCV(cv=5, n_jobs=-1).fit(x, y)
        error = np.mean((model.predict(x_test) - y_test) ** 2)
        found.append((error, 100 * np.mean(model.coef_ == 0)))
    errors, sparsity = np.array(found).T
    return report.summary({"test_error": errors, "sparsity": sparsity})
