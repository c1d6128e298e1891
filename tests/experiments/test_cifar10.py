"""The network, its recipe, and the command from its arguments to the files it writes.

The command runs on a network with few units and images that are easy to tell apart.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import l1inf_optax as l1inf
from l1inf_optax.experiments import cifar10
from l1inf_optax.experiments.__main__ import main

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.fixture
def narrow(monkeypatch):
    """Fewer layers with few units: what takes time is compiling them."""
    monkeypatch.setattr(cifar10, "BLOCKS", ((2, 2), (3,), (3,), (3,), (4,)))
    monkeypatch.setattr(cifar10, "HIDDEN", (4, 4))
    cifar10.make_task.cache_clear()


def plain_convolution(x, kernel):
    """Sums over the window, in float64."""
    window = kernel.shape[:2]
    margins = [(length // 2,) * 2 for length in window]
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), *margins, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(1, 2))
    return np.einsum("bhwirs,rsio->bhwo", windows, np.asarray(kernel, np.float64))


CONVOLUTIONS = {"fourier": cifar10.fourier_convolution, "patch": cifar10.patch_convolution}


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
    shapes = jax.eval_shape(cifar10.VGG16().init, jax.random.key(0), IMAGES)["params"]
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
    network = cifar10.VGG16()
    params = jax.jit(network.init)(jax.random.key(1), IMAGES)["params"]
    x = IMAGES / 127.5 - 1
    for index, block in enumerate(cifar10.BLOCKS):
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
    exact, mixed = (cifar10.VGG16(jnp.dtype(name)) for name in ("float32", "bfloat16"))
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


def test_images_are_shifted_by_up_to_four_pixels_and_mirrored_half_the_time():
    image = RNG.integers(1, 256, (32, 32, 3), np.uint8)
    padded = np.pad(image, [(4, 4), (4, 4), (0, 0)])
    windows = {
        window[:, ::step].tobytes(): (top, left, step)
        for top in range(9)
        for left in range(9)
        for step in (1, -1)
        for window in [padded[top : top + 32, left : left + 32]]
    }
    changed = cifar10.shift_and_mirror(jax.random.key(0), jnp.tile(image, (400, 1, 1, 1)))
    assert (changed.shape, changed.dtype) == ((400, 32, 32, 3), np.uint8)
    found = [windows[np.asarray(one).tobytes()] for one in changed]
    tops, lefts, steps = (set(values) for values in zip(*found, strict=True))
    assert tops == lefts == set(range(9))
    assert steps == {1, -1}
    assert 150 < sum(step == 1 for *_, step in found) < 250
    assert len(set(found)) > 100


STEPS = 10


def test_the_ball_shrinks_from_four_times_c_and_then_zeros_stay(narrow):
    task, c = cifar10.make_task("float32", 0.1, STEPS), np.float32(0.5)
    params = jax.jit(task.init)(jax.random.key(0), c)
    layers = cifar10.constrained_layers(params)
    assert set(layers) == {"wide_0", "wide_1", "hidden_0", "hidden_1"}
    norms = [l1inf.l1inf_norm(layer["augmented_kernel"]) for layer in layers.values()]
    assert max(norms) <= 4 * c * 1.0001
    tx = task.optimizer(c)
    state, update, kernels = tx.init(params), jax.jit(tx.update), []
    for step in range(STEPS):
        grads = jax.tree.map(
            lambda p, s=step: np.sin(np.arange(p.size) + s).reshape(p.shape), params
        )
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        layers = cifar10.constrained_layers(params)
        kernels.append([np.asarray(layer["augmented_kernel"]) for layer in layers.values()])
    assert all(l1inf.l1inf_norm(kernel) > 2 * c for kernel in kernels[0][:2])
    assert all((kernel == 0).any() for kernel in kernels[-1])
    for before, after in itertools.pairwise(kernels[8:]):
        for old, new in zip(before, after, strict=True):
            assert np.abs(new.astype(np.float64)).sum(axis=0).max() <= c
            assert (new[old == 0] == 0).all()


def striped(n):
    """Ten classes: the hue and the direction of stripes."""
    y = np.arange(n) % 10
    x = RNG.integers(0, 60, (n, 32, 32, 3))
    for image, label in zip(x, y, strict=True):
        lines = image if label % 2 else image.swapaxes(0, 1)
        lines[::2, :, label // 2 % 3] += 190
        lines[:, :, (label // 2 + 1) % 3] += 60 * (label > 5)
    return x.astype(np.uint8), y.astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "batches"
    path.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        x, y = striped(10)
        records = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(10, -1)], axis=1)
        (path / f"{name}.bin").write_bytes(records.tobytes())
    return path


def test_the_command_writes_table_json_and_figure_four(narrow, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--c", "inf", "0.5", "--trials", "2", "--epochs", "2", "--batch-size", "10"]
    common = ["cifar10", *arguments, "--images", "40", "--data", str(folder)]
    assert main([*common, "--out", str(out)]) == 0
    document = json.loads((out / "results.json").read_text())
    assert document["settings"] == {
        "c": [None, 0.5],
        "epochs": 2,
        "batch_size": 10,
        "trials": 2,
        "seed": 0,
        "learning_rate": 0.02,
        "images": 40,
        "precision": "float32" if jax.default_backend() == "cpu" else "bfloat16",
        "data": "batches",
        "download": False,
    }
    assert document["device"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    assert document["training_seconds"] > 0
    assert str(tmp_path) not in json.dumps(document)
    for row in document["rows"]:
        assert row["trials"] == 2
        assert 0 <= row["test_accuracy"] <= 100
        assert row["train_error"] > 0
    free, inside = document["rows"]
    assert free["sparsity"] < 1
    assert 10 < inside["sparsity"] <= inside["sparsity_1e-3"] <= 100
    pixels = matplotlib.image.imread(out / "trials.png")
    assert pixels[..., :3].std() > 0.05
    printed = capsys.readouterr().out
    assert "test acc %" in printed
    assert "40 images (batches)" in printed


def test_figure_four_shows_the_error_and_the_zeros_of_every_trial():
    radii = [np.inf, 45.0, 15.0]
    gaps, zeros = RNG.uniform(size=(4, 3)), RNG.uniform(0, 100, (4, 3))
    figure = cifar10._figure(radii, {"generalization_error": gaps, "sparsity": zeros})
    labels = "generalization error (cross entropy)", "exact zeros in constrained layers (%)"
    for ax, values, label in zip(figure.axes, (gaps, zeros), labels, strict=True):
        assert ax.get_ylabel() == label
        assert ax.get_xlabel() == "normalization constant c"
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["∞", "45", "15"]
        drawn = [line.get_ydata() for line in ax.lines]
        for median in np.median(values, axis=0):
            assert any(np.allclose(y, median) for y in drawn)


def test_without_images_the_command_says_how_to_get_them(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["cifar10", "--quick", "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in ("--data", "--download", "cs.toronto.edu"):
        assert word in error
    assert not (tmp_path / "out").exists()
