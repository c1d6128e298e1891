"""The network and its convolutions against plain sums."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l1inf_optax.experiments.networks import vgg16

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.fixture
def narrow(monkeypatch):
    """Fewer layers with few units: what takes time is compiling them."""
    monkeypatch.setattr(vgg16, "BLOCKS", ((2, 2), (3,), (3,), (3,), (4,)))
    monkeypatch.setattr(vgg16, "HIDDEN", (4, 4))


def plain_convolution(x, kernel):
    """Sums over the window, in float64."""
    window = kernel.shape[:2]
    margins = [(length // 2,) * 2 for length in window]
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), *margins, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(1, 2))
    return np.einsum("bhwirs,rsio->bhwo", windows, np.asarray(kernel, np.float64))


CONVOLUTIONS = {"fourier": vgg16.fourier_convolution, "patch": vgg16.patch_convolution}


@pytest.mark.parametrize(
    ("name", "size", "window"),
    [
        ("fourier", (32, 32), (21, 21)),
        ("fourier", (7, 10), (5, 3)),
        ("fourier", (9, 4), (1, 7)),
        ("patch", (2, 2), (3, 3)),
        ("patch", (7, 10), (5, 3)),
        ("patch", (9, 4), (1, 7)),
    ],
)
def test_a_convolution_adds_up_the_window(name, size, window):
    x = RNG.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = RNG.normal(size=(*window, 3, 4)).astype(np.float32)
    got = jax.jit(CONVOLUTIONS[name], static_argnums=(2, 3))(x, kernel, (1, 1), "SAME")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, plain_convolution(x, kernel), atol=1e-4)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_its_gradients_are_those_of_jax(name):
    x, kernel, weights = (
        RNG.normal(size=size).astype(np.float32)
        for size in ((2, 6, 7, 3), (5, 3, 3, 4), (2, 6, 7, 4))
    )

    def of_jax(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def gradients(convolution, *more):
        return jax.grad(lambda *a: (weights * convolution(*a, *more)).sum(), (0, 1))(x, kernel)

    for got, expected in zip(
        gradients(CONVOLUTIONS[name], (1, 1), "SAME"), gradients(of_jax), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_network_is_vgg_16_with_two_wide_windows():
    shapes = jax.eval_shape(vgg16.VGG16().init, jax.random.key(0), IMAGES)["params"]
    shapes = {name: jax.tree.map(lambda leaf: leaf.shape, layer) for name, layer in shapes.items()}
    constrained = {
        name: layer["augmented_kernel"]
        for name, layer in shapes.items()
        if "augmented_kernel" in layer
    }
    assert constrained == {
        "wide_0": (1 + 21 * 21 * 3, 64),
        "wide_1": (1 + 21 * 21 * 64, 64),
        "hidden_0": (513, 512),
        "hidden_1": (513, 512),
    }
    assert shapes["readout"]["kernel"] == (512, 10)
    small = [layer["kernel"] for name, layer in shapes.items() if name.startswith("block")]
    assert small == [
        (3, 3, d_in, d_out)
        for d_in, d_out in itertools.pairwise([64, 128, 128, *[256] * 3, *[512] * 6])
    ]
    assert len(constrained) + len(small) + 1 == 16


def test_the_network_computes_what_its_layers_say(narrow):
    network = vgg16.VGG16()
    params = jax.jit(network.init)(jax.random.key(1), IMAGES)["params"]
    x = IMAGES / 127.5 - 1
    for index, block in enumerate(vgg16.BLOCKS):
        for position in range(len(block)):
            if index == 0:
                matrix = np.asarray(params[f"wide_{position}"]["augmented_kernel"])
                bias, kernel = matrix[0], matrix[1:].reshape(21, 21, -1, matrix.shape[1])
            else:
                layer = params[f"block_{index}_{position}"]
                bias, kernel = layer["bias"], layer["kernel"]
            x = np.maximum(plain_convolution(x, kernel) + bias, 0)
        n, height, width, d = x.shape
        x = x.reshape(n, height // 2, 2, width // 2, 2, d).max((2, 4))
    x = x.reshape(len(x), -1)
    for name in ("hidden_0", "hidden_1"):
        matrix = np.asarray(params[name]["augmented_kernel"], np.float64)
        x = np.maximum(x @ matrix[1:] + matrix[0], 0)
    expected = x @ params["readout"]["kernel"] + params["readout"]["bias"]
    got = jax.jit(network.apply)({"params": params}, IMAGES)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_mixed_precision_keeps_parameters_and_logits_in_float32(narrow):
    exact, mixed = (vgg16.VGG16(jnp.dtype(name)) for name in ("float32", "bfloat16"))
    params = jax.jit(mixed.init)(jax.random.key(1), IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    expected = jax.jit(exact.apply)(params, IMAGES)
    capture = jax.jit(lambda p: mixed.apply(p, IMAGES, capture_intermediates=True))
    logits, found = capture(params)
    assert logits.dtype == np.float32
    assert (logits != expected).any()
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())
    for name in ("wide_1", "block_4_0", "hidden_1"):
        assert found["intermediates"][name]["__call__"][0].dtype == jnp.bfloat16
