"""What the projection costs on a GPU, as a multiple of copying the same matrix.

`python -m tests.benchmarks.bench_gpu` prints Markdown: Newton's method from no thresholds and from
those of the last training step, and sorting.
"""

from __future__ import annotations

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import l1inf_optax as l1inf
from tests.benchmarks.bench_projection import columns, ours, radius
from tests.benchmarks.timing import Step, interleaved

SIZES = ((4097, 4096), (16385, 4096))
DTYPES = (jnp.float32, jnp.bfloat16)
ZEROS = 0.9


def contenders(x: jax.Array, c: float) -> dict[str, Step]:
    """A copy of the matrix first, then its projections."""
    copy = jax.jit(jnp.copy)
    sort = jax.jit(functools.partial(l1inf.projection_l1inf_ball, c=c, method="sort"))
    return {
        "copy": lambda: copy(x),
        **ours(x, c),
        "sort": lambda: sort(x),
    }


def table(sizes: tuple[tuple[int, int], ...], budget: float, least: int = 20) -> None:
    names: list[str] = []
    for shape in sizes:
        host = columns("Gaussian", shape)
        c = radius(host, ZEROS)
        for dtype in DTYPES:
            x = jnp.asarray(host, dtype)
            steps = contenders(x, c)
            if not names:
                names = [name for name in steps if name != "copy"]
                print("| matrix | dtype | copy, ms | " + " | ".join(names) + " |")
                print("| --- " * (3 + len(names)) + "|")
            times = np.median(interleaved(list(steps.values()), budget, least), axis=0)
            cells = " | ".join(f"{ratio:.1f}" for ratio in times[1:] / times[0])
            print(
                f"| {shape[0]} x {shape[1]} | {jnp.dtype(dtype).name} | {1e3 * times[0]:.3f} "
                f"| {cells} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds for each row")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("No GPU was found: JAX runs on the " + jax.default_backend().upper() + " here.")
    print(f"### {jax.devices()[0].device_kind}, JAX {jax.__version__}\n")
    print(f"Gaussian columns projected to {ZEROS:.0%} zeros; multiples of the copy.\n")
    table(SIZES, options.seconds)


if __name__ == "__main__":
    main()
