"""Draws docs/images/bounds_*.png: how far Theorem 1 is from the truth, and from earlier bounds.

`python -m tests.programs.check_bounds`, from the project's root; two to four minutes. It stops if a
bound is below what ascent finds. For 300 random settings per depth it prints the smallest, the
median and the largest ratio.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from l1inf_optax import bounds
from l1inf_optax.plotting import BLUE, ORANGE
from tests.support import children, complexity

IMAGES = children.ROOT / "docs" / "images"
SETTINGS = 300
N, M1 = 8, 5


def settings(k: int) -> tuple[np.ndarray, ...]:
    """Random samples, constants, output norms and activations."""
    rng = np.random.default_rng(k)
    x = rng.uniform(-1, 1, (SETTINGS, N, M1))
    x[::2] = np.sign(x[::2])
    c = np.exp(rng.uniform(np.log(0.2), np.log(3), SETTINGS))
    o = np.exp(rng.uniform(np.log(0.1), np.log(10), SETTINGS))
    kinds = np.array(list(complexity.ACTIVATIONS.values()))
    return x, c, o, kinds[np.arange(SETTINGS) % len(kinds)]


def compare(k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Complexities from below, then the bound and the smallest of the paper's displays."""
    x, c, o, kinds = settings(k)
    if k == 0:
        lower = np.array([complexity.linear(*setting) for setting in zip(x, o, strict=True)])
    else:
        arrays = map(jnp.asarray, (x, c, o, kinds))
        lower = np.asarray(
            complexity.ascended(jax.random.key(k), *arrays, k=k, restarts=16, steps=60, width=8)
        )
    rho = kinds.sum(axis=1)

    def bound(which: int | None) -> np.ndarray:
        each = jax.vmap(
            lambda c, o, rho: bounds.rademacher_bound(
                n=N, m1=M1, k=k, c=c, o=o, rho=rho, display=which
            )
        )
        return np.asarray(each(c, o, rho))

    best, paper = bound(None), np.minimum(bound(1), bound(2))
    ratios = best / lower
    print(f"k = {k}: ratios {ratios.min():.2f}, {np.median(ratios):.2f}, {ratios.max():.2f}")
    if not (ratios >= 1).all():
        raise AssertionError(f"{(ratios < 1).sum()} bounds are below the truth for k = {k}")
    return lower, best, paper


def draw_truth() -> None:
    """Bounds against complexities, one panel for each depth."""
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.8), layout="constrained")
    for k, axes in enumerate(panels):
        lower, best, paper = compare(k)
        axes.loglog(
            lower, paper, "s", color=ORANGE, markersize=3, alpha=0.5, label="the paper's displays"
        )
        axes.loglog(lower, best, "o", color=BLUE, markersize=3, alpha=0.5, label="rademacher_bound")
        ends = np.array([lower.min(), lower.max()])
        axes.loglog(ends, ends, "k-", linewidth=1, label="the complexity itself")
        truth = "exact" if k == 0 else "found by ascent"
        axes.set(title=f"k = {k}", xlabel=f"Rademacher complexity, {truth}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bound")
    panels[0].legend(fontsize="small")
    figure.savefig(IMAGES / "bounds_truth.png", dpi=130)


def peeled(k: int, n: int, m1: int) -> float:
    """Contraction layer by layer, with biases, c rho = 1 and o = 1: Bartlett's generation."""
    inputs = math.sqrt(2 * math.log(2 * m1))
    return (2**k * (1 + inputs) + 2**k - 1) / math.sqrt(n)


def neyshabur(k: int, n: int, m1: int) -> float:
    """Neyshabur, Tomioka and Srebro (2015), Theorem 1 for p = 1: no biases, ReLU."""
    return 2**k * math.sqrt(4 * math.log(2 * m1) / n)


def golowich(k: int, n: int, m1: int) -> float:
    """Golowich, Rakhlin and Shamir (2018), Theorem 2: no biases."""
    return 2 * math.sqrt((k + 2 + math.log(m1)) / n)


def draw_depth() -> None:
    """Earlier bounds over ours, against depth."""
    n, m1 = 500, 1000
    depths = np.arange(16)
    ours = [float(bounds.rademacher_bound(n=n, m1=m1, k=int(k), c=1.0, o=1.0)) for k in depths]
    lines: dict[str, tuple[Callable[[int, int, int], float], str]] = {
        "layer by layer, with biases": (peeled, "-s"),
        "Neyshabur et al. 2015, no biases": (neyshabur, "-^"),
        "Golowich et al. 2018, no biases": (golowich, "-v"),
        "Theorem 1, second display": (
            lambda k, n, m1: float(
                bounds.rademacher_bound(n=n, m1=m1, k=k, c=1.0, o=1.0, display=2)
            ),
            "-o",
        ),
    }
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for color, (label, (other, style)) in zip(
        (ORANGE, "#CC79A7", "#009E73", BLUE), lines.items(), strict=True
    ):
        ratios = [other(int(k), n, m1) / mine for k, mine in zip(depths, ours, strict=True)]
        axes.semilogy(depths, ratios, style, color=color, markersize=4, label=label)
        print(label, [round(ratio, 2) for ratio in ratios[::5]])
    axes.semilogy(depths, 2.0**depths, "k--", linewidth=1, label="$2^k$")
    axes.set(xlabel="hidden layers k", ylabel="bound / rademacher_bound")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(IMAGES / "bounds_depth.png", dpi=130)


if __name__ == "__main__":
    draw_depth()
    draw_truth()
