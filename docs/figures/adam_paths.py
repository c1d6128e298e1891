"""Draws docs/images/adam_paths.png: Adam on two weights, with the projection in two metrics.

`python docs/figures/adam_paths.py`, from the project's root.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import l1inf_optax as l1inf
from l1inf_optax import plotting

CURVATURE = np.array([1.0, 30.0])
TARGET = np.array([1.6, 0.9])
START = np.array([0.1, 0.2])
C = 1.0
STEPS = 400


def loss(w: jax.Array) -> jax.Array:
    """A quadratic bowl, thirty times as steep along the second weight."""
    return 0.5 * jnp.sum(CURVATURE * (w - TARGET) ** 2)


def path(tx: optax.GradientTransformation) -> np.ndarray:
    """The weights at every step, shape `(STEPS + 1, 2)`: one column of a kernel."""

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        grads = jax.grad(lambda p: loss(p["kernel"][:, 0]))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["kernel"][:, 0]

    params = {"kernel": jnp.asarray(START)[:, None]}
    _, history = jax.lax.scan(step, (params, tx.init(params)), None, STEPS)
    return np.vstack([START, history])


def optimum() -> np.ndarray:
    """Where the loss is least in the ball, among points of the edge in the first quadrant."""
    first = np.linspace(0, C, 100_001)
    edge = np.stack([first, C - first])
    return edge[:, np.argmin((CURVATURE[:, None] * (edge - TARGET[:, None]) ** 2).sum(0))]


def main() -> None:
    """Draws the picture."""
    adam = optax.adam(0.02)
    paths = {
        "chained: Euclidean projection": optax.chain(adam, l1inf.keep_params_in_l1inf_ball(C)),
        "constrain: Adam's own metric": l1inf.constrain(adam, C),
    }
    x, y = np.meshgrid(np.linspace(-0.1, 1.3, 200), np.linspace(-0.1, 1.15, 200))
    height = CURVATURE[0] * (x - TARGET[0]) ** 2 + CURVATURE[1] * (y - TARGET[1]) ** 2
    best = optimum()
    figure, every = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, (name, tx) in zip(every, paths.items(), strict=True):
        axes.contour(x, y, np.sqrt(height), levels=12, colors="0.8", linewidths=0.8)
        plotting.plot_ball(C, axes)
        walk = path(tx)
        axes.plot(*walk.T, ".-", color="tab:red", markersize=3, linewidth=1, label="Adam's path")
        axes.plot(*walk[-1], "o", color="tab:red", markersize=8, label="its end")
        axes.plot(*best, "k*", markersize=13, markerfacecolor="none", label="optimum in the ball")
        axes.set_title(name)
        axes.set(xlim=(-0.1, 1.3), ylim=(-0.1, 1.15))
    every[1].set_ylabel("")
    every[1].legend(fontsize="small", loc="upper right")
    figure.savefig(Path(__file__).parent.parent / "images" / "adam_paths.png", dpi=130)


if __name__ == "__main__":
    main()
