"""A trained network is made sparse: `prune` against pruning by magnitude and a ball that shrinks.

`python -m tests.benchmarks.bench_pruning digits` prints a Markdown table for 64-256-128-10 on
scikit-learn's digits; `... mnist --data mnist.npz` one for LeNet-300-100. All start from the same
trained network and take as many steps again, of Adam with a rate that falls to zero. Each has its
own rate for each share of zeros, chosen on a seed of its own, whose test data are not used.
`... scores --data mnist.npz` compares scores that weights may be ranked by, on one seed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l1inf_optax as l1inf
from tests.benchmarks import training
from tests.benchmarks.training import Data, Program, apply_mlp, hidden

SHARES = (0.9, 0.95, 0.98)
RATES = (1e-3, 3e-3, 6e-3)
SEEDS = range(5)
TUNED_ON = 100


class Task(NamedTuple):
    """A network, its data by the seed, and how long it trains."""

    data: Callable[[int], Data]
    widths: tuple[int, ...]
    batch: int
    steps: int


def tasks(path: str | None) -> dict[str, Task]:
    return {
        "digits": Task(training.small_digits, (64, 256, 128, 10), 64, 2400),
        "mnist": Task(lambda seed: training.mnist(str(path)), (784, 300, 100, 10), 128, 4680),
    }


def smallest_to_zero(params: Any, share: float) -> Any:
    """The weights of hidden layers that are smallest in magnitude, all layers together, zeroed."""
    sizes = np.concatenate([np.abs(params[name]["kernel"]).ravel() for name in hidden(params)])
    least = np.sort(sizes)[round(share * len(sizes))]
    return {
        name: {**layer, "kernel": jnp.where(jnp.abs(layer["kernel"]) < least, 0, layer["kernel"])}
        if name != "readout"
        else layer
        for name, layer in params.items()
    }


def unchanged(params: Any, share: float) -> Any:
    return params


class Method(NamedTuple):
    """How zeros come about: before further training, and in it, given the share and the steps."""

    before: Callable[[Any, float], Any]
    c: Callable[[float, int], Any]
    options: dict[str, Any]


def _cubic(share: float, steps: int) -> Any:
    return l1inf.prune(share, over=round(0.6 * steps))


def _released(share: float, steps: int) -> Any:
    return l1inf.shrink(zeros=share, over=round(0.6 * steps), release=jnp.inf)


def _no_ball(share: float, steps: int) -> float:
    return jnp.inf


METHODS = {
    "one-shot magnitude": Method(smallest_to_zero, _no_ball, {"hold_zeros_from": 0}),
    "gradual magnitude": Method(unchanged, _cubic, {"metric": "euclidean"}),
    "ball that shrinks, released": Method(unchanged, _released, {}),
    "`prune`": Method(unchanged, _cubic, {}),
}


# Scores are d w^2: powers of nu, or the shares that weights have of their columns and rows.
Metric = Callable[[Any, Any], Any]


def _power(power: float) -> Metric:
    def metric(state: Any, params: Any) -> Any:
        return jax.tree.map(lambda nu: (nu + 1e-30) ** power, optax.tree.get(state, "nu"))

    return metric


def _shares(state: Any, params: Any) -> Any:
    def share(w: jax.Array) -> jax.Array:
        axes = range(w.ndim)
        sums = (jnp.sum(jnp.abs(w), axis, keepdims=True) + 1e-30 for axis in axes)
        return sum(1 / x for x in sums) ** 2

    return jax.tree.map(share, params)


SCORES: dict[str, Metric] = {
    "$w^2$": _power(0.0),
    "$w^2$ as shares of column and row": _shares,
    "$\\sqrt\\nu w^2$": _power(0.5),
    "$\\nu w^2$": _power(1.0),
}


def scores(task: Task, data: Data, params: Any) -> None:
    print("| score | ranked | zeros asked, % | test accuracy, % |")
    print("| --- | --- | --- | --- |")
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, task.steps))
    for share in SHARES:
        for name, metric in SCORES.items():
            alone = {f"hidden_{i}": _cubic(share, task.steps) for i in range(2)}
            together = {"hidden_*": _cubic(share, task.steps)}
            for ranked, c in (("by layer", alone), ("together", together)):
                tx = l1inf.constrain(adam, c, metric=metric)
                after = Program(apply_mlp, tx, task.batch, task.steps).train(params, data, 0)
                right = training.accuracy(apply_mlp, after, data)
                print(f"| {name} | {ranked} | {100 * share:g} | {right:.2f} |", flush=True)


def program(task: Task, method: Method, share: float, rate: float) -> Program:
    c = {"hidden_*": method.c(share, task.steps)}
    tx = l1inf.constrain(
        optax.adam(optax.cosine_decay_schedule(rate, task.steps)), c, **method.options
    )
    return Program(apply_mlp, tx, task.batch, task.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["digits", "mnist", "scores"])
    parser.add_argument("--data", help="MNIST: an .npz file or a folder of IDX files")
    options = parser.parse_args()
    watch = training.Watch()
    task = tasks(options.data)["digits" if options.task == "digits" else "mnist"]
    dense_program = Program(
        apply_mlp, optax.adam(optax.cosine_decay_schedule(3e-3, task.steps)), task.batch, task.steps
    )

    @functools.cache
    def dense(seed: int) -> tuple[Data, Any]:
        data = task.data(seed)
        data = data.held_out() if seed == TUNED_ON else data
        start = training.mlp(task.widths, jax.random.key(seed))
        return data, dense_program.train(start, data, seed)

    def trial(trained: Program, method: Method, share: float, seed: int) -> tuple[float, float]:
        data, params = dense(seed)
        params = trained.train(method.before(params, share), data, seed)
        return (
            training.accuracy(apply_mlp, params, data),
            training.zeros(params, hidden(params)),
        )

    if options.task == "scores":
        scores(task, *dense(0))
        print(f"\n{watch}")
        return
    accuracies = [training.accuracy(apply_mlp, dense(seed)[1], dense(seed)[0]) for seed in SEEDS]
    print(f"Trained without constraint: {training.mean_and_spread(accuracies)}\n")
    print("| zeros asked, % | method | rate | test accuracy, % | zeros, % |")
    print("| --- | --- | --- | --- | --- |")
    for share in SHARES:
        for name, method in METHODS.items():
            programs = {rate: program(task, method, share, rate) for rate in RATES}
            rate = max(RATES, key=lambda rate: trial(programs[rate], method, share, TUNED_ON)[0])
            found = [trial(programs[rate], method, share, seed) for seed in SEEDS]
            cells = " | ".join(map(training.mean_and_spread, zip(*found, strict=True)))
            print(f"| {100 * share:g} | {name} | {rate:g} | {cells} |", flush=True)
    print(f"\n{watch}")


if __name__ == "__main__":
    main()
