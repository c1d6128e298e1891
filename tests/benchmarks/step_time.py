"""Draws docs/images/step_time.png: what the constraint adds to a step on up to 10,000 chips.

`python -m tests.benchmarks.step_time`, from the project's root; two minutes. It measures here, on
one CPU, how many times a projection reads and writes its matrix, and reads off the compiled program
of eight virtual devices what they send; chips and network are those of data sheets. Nothing of it
was measured on such chips.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import l1inf_optax as l1inf
from l1inf_optax.plotting import BLUE, ORANGE
from tests.benchmarks.bench_projection import columns, multiply, project, radius
from tests.benchmarks.timing import interleaved
from tests.support import children
from tests.support.collectives import collectives

IMAGES = children.ROOT / "docs" / "images"
GREEN = "#009E73"  # of Okabe and Ito, too

# NVIDIA's data sheet of the H100 SXM, and of Quantum-2 InfiniBand (400 Gb/s a port).
PEAK = 989e12  # bfloat16, dense, operations a second
MEMORY = 3.35e12  # bytes a second
NVLINK, INFINIBAND = 450e9, 50e9  # bytes a second and direction, of one chip
A_HOST = 8  # chips that NVLink joins
# Assumed, of the order that is usual: of a kernel, of a small all-reduce within a host, and of each
# doubling of the hosts that take part.
LAUNCH, WITHIN, BETWEEN = 5e-6, 10e-6, 10e-6
USED = 0.4  # of the peak, by the network itself

# A transformer of the size of GPT-3 175B (Brown et al. 2020, Table 2.1), a step of 3.2 M tokens.
BLOCKS, D, TOKENS = 96, 12288, 3.2e6
SHAPES = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
WEIGHTS = BLOCKS * sum(n * m for n, m in SHAPES.values())
PASSES = 4  # of a warm search


class Measured(NamedTuple):
    """What a projection costs beside reading and writing its matrix, and what is sent for it.

    Attributes:
        a_pass: of the search, as a multiple of reading the matrix.
        once: the rest, as a multiple of V * c: of reading and writing it.
        sent: numbers a column in the all-reduce of a pass.
        sent_once: the same, of each other all-reduce of a search.
    """

    a_pass: float
    once: float
    sent: int
    sent_once: list[int]


def measure(shape: tuple[int, int] = (4097, 4096)) -> Measured:
    """Fit seconds = once + a_pass * passes to columns that need few and many; read the program."""
    sums = jax.jit(lambda x: jnp.abs(x).sum(axis=0))
    passes, seconds = [], []
    for kind in ("Gaussian", "heavy-tailed"):
        host = columns(kind, shape)
        x = jnp.asarray(host)
        radii = [radius(host, zeros) for zeros in (0.5, 0.9, 0.99)]
        steps = [partial(project, x, c, None) for c in radii]
        times = np.median(interleaved([partial(sums, x), multiply(x), *steps], 8.0, 10), axis=0)
        seconds.append(times)
        passes += [int(project(x, c, None).passes) for c in radii]
        print(f"{kind}: read, V * c, projections {1e3 * times} ms, {passes[-3:]} passes")
    read, v_times_c = np.mean(seconds, axis=0)[:2]
    slope, intercept = np.polyfit(passes, np.ravel([times[2:] for times in seconds]), 1)
    return Measured(slope / read, intercept / v_times_c, *sent_sizes())


def sent_sizes() -> tuple[int, list[int]]:
    """Numbers a column in a pass's all-reduce of an update whose rows are sharded; in the others.

    Every pass has one. Some of the others are rare: the model counts each once a search.
    """
    units = 32
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    kernel = NamedSharding(mesh, PartitionSpec("rows"))
    params = {"kernel": jax.device_put(jnp.ones((64, units)), kernel), "bias": jnp.zeros(units)}
    tx = optax.chain(optax.sgd(0.1), l1inf.keep_params_in_l1inf_ball(1.0))
    update = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    sent = [len(sizes) for _, sizes in collectives(update)]
    first, *others = sorted(sent, reverse=True)
    return first, others


def step(chips: np.ndarray) -> np.ndarray:
    """Seconds of the network's own arithmetic: six operations a weight and token."""
    return 6 * WEIGHTS * TOKENS / (chips * PEAK * USED)


def projection(chips: np.ndarray, sharers: np.ndarray, measured: Measured) -> np.ndarray:
    """Seconds of the projection, on chips that share every column with ``sharers - 1`` others."""
    read = 4 * WEIGHTS / chips / MEMORY
    memory = read * (2 * measured.once + PASSES * measured.a_pass)
    launches = LAUNCH * (4 * PASSES * len(SHAPES) + BLOCKS * len(SHAPES))
    hosts = np.ceil(sharers / A_HOST)
    latency = np.where(sharers > 1, WITHIN, 0) + BETWEEN * np.ceil(np.log2(hosts))
    bandwidth = np.where(hosts > 1, INFINIBAND, NVLINK)
    own = BLOCKS * sum(m for _, m in SHAPES.values()) * sharers / chips  # columns of a chip
    all_sent = PASSES * measured.sent + sum(measured.sent_once)
    calls = len(SHAPES) * (PASSES + len(measured.sent_once))
    sending = calls * latency + 2 * 4 * own * all_sent / bandwidth * (sharers > 1)
    return memory + launches + sending


def main() -> None:
    """Measure, and draw."""
    jax.config.update("jax_num_cpu_devices", 8)
    measured = measure()
    print(measured)
    chips, few = np.logspace(np.log10(8), 4, 200), np.array([8, 1000, 10_000])
    layouts = {
        "by columns": (np.ones_like, BLUE, "-"),
        "by rows over a host, by columns over hosts": (
            lambda chips: np.full_like(chips, A_HOST),
            ORANGE,
            "--",
        ),
        "by rows over all chips": (np.copy, GREEN, "-."),
    }
    figure, (time, share) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    time.loglog(chips, step(chips), "k", label="the step without the projection")
    for name, (sharers, colour, line) in layouts.items():
        seconds = projection(chips, sharers(chips), measured)
        time.loglog(chips, seconds, line, color=colour, label=f"the projection: weights {name}")
        share.loglog(chips, 100 * seconds / step(chips), line, color=colour)
        shown = projection(few, sharers(few), measured)
        print(f"{name}: {1e3 * shown} ms, {100 * shown / step(few)} % on {few} chips")
    time.set(xlabel="chips", ylabel="time a step, s", title="Model of a step, 175 B weights")
    share.set(xlabel="chips", ylabel="% of the step", title="What the projection adds")
    for axes in (time, share):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(IMAGES / "step_time.png", dpi=150)


if __name__ == "__main__":
    main()
