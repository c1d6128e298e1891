"""What the projection costs on a GPU, as a multiple of copying the same matrix.

`python -m tests.benchmarks.bench_gpu` prints Markdown: the compiled path of `_projection`, the
kernel of `_pallas`, each from no thresholds and from those of the last training step, and sorting.
"""

from __future__ import annotations

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import l1inf_optax as l1inf
from l1inf_optax import _pallas
from tests.benchmarks.bench_projection import columns, ours, radius, trained
from tests.benchmarks.timing import Step, interleaved

SIZES = ((4097, 4096), (16385, 4096))
DTYPES = (jnp.float32, jnp.bfloat16)
ZEROS = 0.9


def contenders(x: jax.Array, c: float, interpret: bool = False) -> dict[str, Step]:
    """A copy of the matrix first, then its projections."""
    moved, threshold = trained(x, c)
    copy = jax.jit(jnp.copy)
    kernel = jax.jit(lambda x, start: _pallas.project(x, c, start, interpret=interpret))
    sort = jax.jit(functools.partial(l1inf.projection_l1inf_ball, c=c, method="sort"))
    return {
        "copy": lambda: copy(x),
        **{name.replace("Newton", "XLA"): step for name, step in ours(x, c).items()},
        "Pallas, cold": lambda: kernel(x, None),
        "Pallas, warm": lambda: kernel(moved, threshold),
        "sort": lambda: sort(x),
    }


def undecided(x: jax.Array, c: float, interpret: bool = False) -> int:
    """How many columns the kernel leaves to XLA, from no thresholds and from the last ones."""
    moved, threshold = trained(x, c)
    cases = (x, None), (moved, threshold)
    return sum(
        int(_pallas.attempt(y, c, start, interpret=interpret).undecided.sum()) for y, start in cases
    )


def table(
    sizes: tuple[tuple[int, int], ...], budget: float, least: int = 20, interpret: bool = False
) -> None:
    names: list[str] = []
    for shape in sizes:
        host = columns("Gaussian", shape)
        c = radius(host, ZEROS)
        for dtype in DTYPES:
            x = jnp.asarray(host, dtype)
            steps = contenders(x, c, interpret)
            if not names:
                names = [name for name in steps if name != "copy"]
                print("| matrix | dtype | copy, ms | " + " | ".join(names) + " | undecided |")
                print("| --- " * (4 + len(names)) + "|")
            times = np.median(interleaved(list(steps.values()), budget, least), axis=0)
            cells = " | ".join(f"{ratio:.1f}" for ratio in times[1:] / times[0])
            print(
                f"| {shape[0]} x {shape[1]} | {jnp.dtype(dtype).name} | {1e3 * times[0]:.3f} "
                f"| {cells} | {undecided(x, c, interpret)} |",
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
