"""What one augmented matrix costs: forward and backward pass against the plain Flax layers.

`pytest tests/benchmarks/bench_modules.py` times each case with pytest-benchmark;
`python -m tests.benchmarks.bench_modules` prints the ratios as a Markdown table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from l1inf_optax import linen as l1inf_linen
from l1inf_optax import nnx as l1inf_nnx
from tests.benchmarks.timing import Step, interleaved, seconds

MLP = (784, 900, 10)
MLP_BATCH = (128, MLP[0])
CHANNELS = 64
CONV_BATCH = (32, 32, 32, CHANNELS)


class PlainLinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(MLP[2])(nn.relu(nn.Dense(MLP[1])(x)))


class PlainNNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(*MLP[:2], rngs=rngs)
        self.readout = nnx.Linear(*MLP[1:], rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.relu(self.hidden(x)))


def linen_step(model: nn.Module, shape: tuple[int, ...]) -> Step:
    """One compiled gradient in the parameters."""
    x = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    gradient = jax.jit(jax.grad(lambda v, x: jnp.sum(model.apply(v, x) ** 2)))
    return lambda: gradient(variables, x)


def nnx_step(model: nnx.Module, shape: tuple[int, ...]) -> Step:
    """As `linen_step`; split first, so that the traversal of the module is not timed."""
    x = jax.random.normal(jax.random.key(0), shape)
    graph, state = nnx.split(model)

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) ** 2)

    gradient = jax.jit(jax.grad(loss))
    return lambda: gradient(state, x)


def linen_mlp() -> list[Step]:
    models = l1inf_linen.AugmentedMLP(MLP[1:]), PlainLinenMLP()
    return [linen_step(model, MLP_BATCH) for model in models]


def linen_conv() -> list[Step]:
    layers = l1inf_linen.AugmentedConv, nn.Conv
    return [linen_step(layer(CHANNELS, (3, 3)), CONV_BATCH) for layer in layers]


def nnx_mlp() -> list[Step]:
    models = l1inf_nnx.AugmentedMLP(MLP[0], MLP[1:], rngs=nnx.Rngs(1)), PlainNNXMLP(nnx.Rngs(1))
    return [nnx_step(model, MLP_BATCH) for model in models]


def nnx_conv() -> list[Step]:
    layers = l1inf_nnx.AugmentedConv, nnx.Conv
    return [
        nnx_step(layer(CHANNELS, CHANNELS, (3, 3), rngs=nnx.Rngs(1)), CONV_BATCH)
        for layer in layers
    ]


CASES = {
    "Linen MLP 784-900-10, batch 128": linen_mlp,
    "NNX MLP 784-900-10, batch 128": nnx_mlp,
    "Linen Conv 3x3, 32 x 32x32x64 to 64": linen_conv,
    "NNX Conv 3x3, 32 x 32x32x64 to 64": nnx_conv,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["augmented", "plain"])
def test_forward_and_backward(benchmark, case, kind):
    step = CASES[case]()[["augmented", "plain"].index(kind)]
    seconds(step)
    benchmark(seconds, step)


def main() -> None:
    print("| forward and backward pass | augmented, ms | plain, ms | ratio |")
    print("| --- | --- | --- | --- |")
    for name, make in CASES.items():
        times = interleaved(make())
        augmented, plain = 1e3 * np.median(times, axis=0)
        print(f"| {name} | {augmented:.2f} | {plain:.2f} | {augmented / plain:.2f} |")


if __name__ == "__main__":
    main()
