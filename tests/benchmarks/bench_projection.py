"""What the projection costs, as a multiple of multiplying the same matrix by a constant.

`pytest tests/benchmarks/bench_projection.py` times a few cases with pytest-benchmark.
`python -m tests.benchmarks.bench_projection` prints Markdown and writes figures:

- `peers`: this library's projections beside those of Optax, JAXopt, PyTorch and NumPy;
- `growth`: passes and time against the length and the number of the columns;
- `weighted`: the projection in a metric beside the Euclidean one;
- `training`: a training step of a 784-900-10 network with and without the constraint;
- `compile`: seconds and memory to compile the update of a 24-block transformer.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

import l1inf_optax as l1inf
from l1inf_optax._projection.requests import Request, project_all
from l1inf_optax._projection.shrink import Projected
from tests.benchmarks.timing import Step, interleaved, seconds

SIZES = ((501, 100), (785, 900), (1001, 300), (4097, 4096), (16385, 4096))
LARGE = 20_000_000  # entries above which the sorting peers are timed for one kind of column only
MOVED = 1e-3  # size of a training step, relative to the mean weight that is not zero
ENTRIES = 20_000_000  # of the largest matrix in the growth plot


@functools.partial(jax.jit, static_argnums=1)
def project(
    x: jax.Array, c: float, start: jax.Array | None, slope: jax.Array | None = None
) -> Projected:
    slopes = None if slope is None else (slope,)
    return project_all(lambda x: (x,), [Request((x,), c, (0,), start, slopes)])[0]


def columns(kind: str, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "heavy-tailed":
        return rng.standard_t(2, size=shape).astype(np.float32)
    x = rng.standard_normal(shape, np.float32)
    return x * (rng.random(shape) < 0.2) if kind == "already sparse" else x


def radius(x: np.ndarray, zeros: float) -> float:
    """The c that leaves this share of exact zeros, from the first hundred columns."""
    a = np.abs(x[:, :100]).astype(np.float64)
    return float(np.maximum(a - np.quantile(a, zeros), 0).sum(0).mean())


def trained(x: jax.Array, c: float, slope: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """A matrix after a training step that moved its weights, and the thresholds of the last one."""
    last = project(x, c, None, slope)
    for seed in range(2):
        weights, threshold = last.parts[0], last.threshold
        mean = jnp.sum(jnp.abs(weights)) / jnp.count_nonzero(weights)
        noise = jax.random.normal(jax.random.key(seed), x.shape, jnp.float32)
        moved = (weights + MOVED * mean * noise * (weights != 0)).astype(x.dtype)
        last = project(moved, c, None, slope)
    return moved, threshold


# --- peers ----------------------------------------------------------------------------------------


def over_columns(projection: Any) -> Any:
    """A projection of one vector, of every column, jitted; in float32, as 16 bits are an error."""
    every = jax.vmap(projection, in_axes=(1, None), out_axes=1)
    return jax.jit(lambda x, c: every(x.astype(jnp.float32), c).astype(x.dtype))


def numpy_sort(x: np.ndarray, c: float) -> np.ndarray:
    a = np.abs(x)
    mu = -np.sort(-a, axis=0)
    theta = (np.cumsum(mu, axis=0) - c) / np.arange(1, len(x) + 1)[:, None]
    p = np.count_nonzero(mu > theta, axis=0)
    theta = np.maximum(np.take_along_axis(theta, p[None] - 1, axis=0), 0)
    return np.sign(x) * np.maximum(a - theta, 0)


def torch_sort(torch: Any, x: Any, c: float) -> Any:
    a = x.abs()
    mu = a.sort(dim=0, descending=True).values
    theta = (mu.cumsum(0) - c) / torch.arange(1, len(x) + 1)[:, None]
    p = (mu > theta).sum(0)
    theta = theta.gather(0, p[None] - 1).clamp(min=0)
    return x.sign() * (a - theta).clamp(min=0)


def ours(x: jax.Array, c: float) -> dict[str, Step]:
    moved, threshold = trained(x, c)
    return {
        "Newton, cold": lambda: project(x, c, None),
        "Newton, warm": lambda: project(moved, c, threshold),
    }


def peers(x: jax.Array, c: float) -> dict[str, Step]:
    """The sorting projections; those whose library is not installed are left out."""
    own = jax.jit(functools.partial(l1inf.projection_l1inf_ball, c=c, method="sort"))
    theirs = over_columns(optax.projections.projection_l1_ball)
    steps = {"own sort": lambda: own(x), "Optax": lambda: theirs(x, c)}
    try:
        jaxopt = importlib.import_module("jaxopt.projection")
        jaxopts = over_columns(jaxopt.projection_l1_ball)
        steps["JAXopt"] = lambda: jaxopts(x, c)
    except ImportError:
        pass
    if x.dtype == jnp.float32:
        array = np.asarray(x)
        try:
            torch = importlib.import_module("torch")
            tensor = torch.from_numpy(array.copy())
            steps["PyTorch"] = lambda: torch_sort(torch, tensor, c)
        except ImportError:
            pass
        steps["NumPy"] = lambda: numpy_sort(array, c)
    return steps


def multiply(x: jax.Array) -> Step:
    times = jax.jit(lambda x: x * jnp.asarray(1.5, x.dtype))
    return lambda: times(x)


def compare_peers(sizes: list[tuple[int, int]], budget: float, out: Path) -> None:
    names = ["Newton, cold", "Newton, warm", "own sort", "Optax", "JAXopt", "PyTorch", "NumPy"]
    print("| matrix | dtype | columns | zeros | passes | V * c, ms | " + " | ".join(names) + " |")
    print("| --- " * (6 + len(names)) + "|")
    bars: dict[str, dict[str, float]] = {}
    for shape in sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            for kind in ("Gaussian", "heavy-tailed", "already sparse"):
                for zeros in (0.5, 0.9, 0.99) if kind != "already sparse" else (0.85, 0.9, 0.99):
                    host = columns(kind, shape)
                    x, c = jnp.asarray(host, dtype), radius(host, zeros)
                    usual = (kind, zeros) == ("Gaussian", 0.9)
                    ratios, base = ratios_of(x, c, budget, usual or x.size < LARGE)
                    moved, threshold = trained(x, c)
                    cold, warm = project(x, c, None).passes, project(moved, c, threshold).passes
                    cells = [f"{ratios[n]:.1f}" if n in ratios else "" for n in names]
                    print(
                        f"| {shape[0]} x {shape[1]} | {jnp.dtype(dtype).name} | {kind} "
                        f"| {zeros:.0%} | {cold}, {warm} | {1e3 * base:.2f} | "
                        + " | ".join(cells)
                        + " |",
                        flush=True,
                    )
                    if usual and dtype == jnp.float32:
                        bars[f"{shape[0]} x {shape[1]}"] = ratios
    draw_peers(bars, names, out / "projection_peers.png")


def ratios_of(
    x: jax.Array, c: float, budget: float, with_peers: bool
) -> tuple[dict[str, float], float]:
    """Medians as multiples of V * c, and V * c in seconds.

    The sorting projections take turns of their own, fewer, with the same V * c.
    """
    ratios: dict[str, float] = {}
    quick = ours(x, c)
    times = np.median(interleaved([multiply(x), *quick.values()], budget), axis=0)
    ratios.update(zip(quick, times[1:] / times[0], strict=True))
    if with_peers:
        slow = peers(x, c)
        slower = np.median(interleaved([multiply(x), *slow.values()], budget, least=3), axis=0)
        ratios.update(zip(slow, slower[1:] / slower[0], strict=True))
    return ratios, float(times[0])


def draw_peers(bars: dict[str, dict[str, float]], names: list[str], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    names = [name for name in names if any(name in ratios for ratios in bars.values())]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [ratios.get(name, np.nan) for ratios in bars.values()]
        axes.bar(np.arange(len(bars)) + i * width, heights, width, label=name)
    axes.set_xticks(np.arange(len(bars)) + 0.4 - width / 2, list(bars))
    axes.set_yscale("log")
    axes.set_ylabel("time, multiples of V * c")
    axes.set_title("Projection of Gaussian columns to 90% zeros, float32")
    axes.legend(ncols=4, fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- growth ---------------------------------------------------------------------------------------


def growth(budget: float, out: Path) -> None:
    lengths = [(n, max(1, min(1000, ENTRIES // n))) for n in np.logspace(2, 7, 11).astype(int)]
    numbers = [(max(200, min(1000, ENTRIES // m)), m) for m in np.logspace(0, 5, 11).astype(int)]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharey="row", layout="constrained")
    for (top, bottom), shapes, label in zip(
        axes.T, (lengths, numbers), ("length of a column", "number of columns"), strict=True
    ):
        across = [shape[label == "number of columns"] for shape in shapes]
        rows = []
        for shape in shapes:
            host = columns("Gaussian", (int(shape[0]), int(shape[1])))
            x, c = jnp.asarray(host), radius(host, 0.9)
            moved, threshold = trained(x, c)
            steps = [multiply(x), *ours(x, c).values()]
            each = 1e9 * np.median(interleaved(steps, budget), axis=0) / x.size
            passes = project(x, c, None).passes, project(moved, c, threshold).passes
            rows.append((*each, *map(int, passes)))
            print(f"{shape}: ns an entry {each.round(2)}, passes {rows[-1][3:]}", flush=True)
        multiplied, cold, warm, cold_passes, warm_passes = zip(*rows, strict=True)
        top.plot(across, cold_passes, "o-", label="cold")
        top.plot(across, warm_passes, "s-", label="warm")
        bottom.loglog(across, cold, "o-", label="cold")
        bottom.loglog(across, warm, "s-", label="warm")
        bottom.loglog(across, multiplied, "k:", label="V * c")
        top.set_ylim(0, 12)
        for axis in (top, bottom):
            axis.set_xscale("log")
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
            axis.legend()
    axes[0, 0].set_ylabel("passes over the entries")
    axes[1, 0].set_ylabel("time an entry, ns")
    figure.savefig(out / "projection_growth.png", dpi=150)
    plt.close(figure)


# --- with a metric --------------------------------------------------------------------------------


def weighted(budget: float) -> None:
    """The projection in a metric that spans a factor of a thousand, beside the Euclidean one."""

    names = ("cold", "warm", "with a metric, cold", "with a metric, warm")
    print("| matrix | V * c, ms | " + " | ".join(names) + " | passes |\n" + "| --- " * 7 + "|")
    for shape in SIZES[1:4]:
        host = columns("Gaussian", shape)
        x, c = jnp.asarray(host), radius(host, 0.9)
        steps, passes = [multiply(x)], []
        for slope in (None, jnp.exp(-7 * jax.random.uniform(jax.random.key(2), shape))):
            moved, threshold = trained(x, c, slope)
            for start in ((x, c, None, slope), (moved, c, threshold, slope)):
                passes.append(int(project(*start).passes))
                steps.append(functools.partial(project, *start))
        times = np.median(interleaved(steps, budget), axis=0)
        cells = " | ".join(f"{ratio:.1f}" for ratio in times[1:] / times[0])
        print(
            f"| {shape[0]} x {shape[1]} | {1e3 * times[0]:.2f} | {cells} | {passes} |", flush=True
        )


# --- in training ----------------------------------------------------------------------------------


def training_steps() -> dict[str, Step]:
    """Twenty consecutive training steps with each optimizer, which go on from call to call."""
    rng = np.random.default_rng(0)
    pixels = rng.random((128, 784)) * (rng.random((128, 784)) < 0.2)  # MNIST has 81% zeros
    x, y = jnp.asarray(pixels, jnp.float32), jnp.asarray(rng.integers(0, 10, 128))
    params = {
        "hidden": {"kernel": jnp.asarray(rng.normal(size=(784, 900)) / 28, jnp.float32)},
        "readout": {"kernel": jnp.asarray(rng.normal(size=(900, 10)) / 30, jnp.float32)},
    }
    for layer in params.values():
        layer["bias"] = jnp.zeros(layer["kernel"].shape[1])

    def loss(params: Any) -> jax.Array:
        hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        logits = hidden @ params["readout"]["kernel"] + params["readout"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def twenty(tx: optax.GradientTransformation) -> Step:
        @jax.jit
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        carry = [params, tx.init(params)]

        def run() -> Any:
            for _ in range(20):
                carry[:] = step(*carry)
            return carry

        return run

    adam = optax.adam(1e-3)
    steps = {"Adam": twenty(adam)}
    for c in (1.0, 3.0):
        constraint = l1inf.keep_params_in_l1inf_ball({"hidden": c})
        steps[f"Adam, c = {c:g}"] = twenty(optax.chain(adam, constraint))
        own = l1inf.constrain(adam, {"hidden": c})
        steps[f"Adam, c = {c:g}, its own metric"] = twenty(own)
    return steps


def training(budget: float) -> None:
    steps = training_steps()
    times = np.median(interleaved(list(steps.values()), budget), axis=0) / 20
    print("| 784-900-10, batch 128 | ms a step | ratio |\n| --- | --- | --- |")
    for name, each in zip(steps, times, strict=True):
        print(f"| {name} | {1e3 * each:.2f} | {each / times[0]:.2f} |")


# --- compilation ----------------------------------------------------------------------------------


def transformer(blocks: int = 24, d: int = 256) -> Any:
    """Shapes of a transformer's parameters, named as Flax names them."""

    def dense(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {"kernel": (*inputs, *outputs), "bias": outputs}
        return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}

    def block() -> dict[str, Any]:
        heads = (4, d // 4)
        attention = {name: dense((d,), heads) for name in ("query", "key", "value")}
        attention["out"] = dense(heads, (d,))
        return {"attention": attention, "up": dense((d,), (4 * d,)), "down": dense((4 * d,), (d,))}

    return {f"block_{i}": block() for i in range(blocks)}


def compilation() -> None:
    params = transformer()
    adam = optax.adam(1e-3)
    print(
        "| tx.update, 24 blocks | trace, s | compile, s | temporary, MB | in a donated step, MB |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, tx in {
        "Adam": adam,
        "Adam, c = 1": optax.chain(adam, l1inf.keep_params_in_l1inf_ball(1.0)),
        "Adam, c = 1, its own metric": l1inf.constrain(adam, 1.0),
    }.items():
        state = jax.eval_shape(tx.init, params)
        start = time.perf_counter()
        lowered = jax.jit(tx.update).lower(params, state, params)
        traced = time.perf_counter()
        memory = lowered.compile().memory_analysis().temp_size_in_bytes / 1e6
        done = time.perf_counter()
        whole = training_step(tx).lower(params, state, params).compile()
        step = whole.memory_analysis().temp_size_in_bytes / 1e6
        print(
            f"| {name} | {traced - start:.2f} | {done - traced:.2f} | {memory:.1f} | {step:.1f} |"
        )
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(params)) / 1e6
    every = sum(leaf.size * 4 for leaf in jax.tree.leaves(params)) / 1e6
    print(f"\nThe largest layer has {largest:.1f} MB, all parameters {every:.1f} MB.")


def training_step(tx: optax.GradientTransformation) -> Any:
    """A step that overwrites parameters and state."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


# --- pytest-benchmark and the command -------------------------------------------------------------


@pytest.mark.parametrize("shape", SIZES[:4], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", ["V * c", "Newton, cold", "Newton, warm"])
def test_projection(benchmark, shape, name):
    host = columns("Gaussian", shape)
    x, c = jnp.asarray(host), radius(host, 0.9)
    step = {"V * c": multiply(x), **ours(x, c)}[name]
    seconds(step)
    benchmark(seconds, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("peers", "growth", "weighted", "training", "compile"))
    parser.add_argument("--sizes", nargs="+", metavar="NxM", help="matrices of the peers' table")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds for each comparison")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="for figures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} cores, JAX {jax.__version__}\n")
    if options.what == "peers":
        sizes = [tuple(map(int, size.split("x"))) for size in options.sizes or ()]
        compare_peers(sizes or list(SIZES), options.seconds, options.out)
    elif options.what == "growth":
        growth(options.seconds, options.out)
    elif options.what == "weighted":
        weighted(options.seconds * 2)
    elif options.what == "training":
        training(options.seconds * 10)
    else:
        compilation()


if __name__ == "__main__":
    main()
