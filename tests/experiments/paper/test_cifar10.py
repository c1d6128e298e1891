"""The recipe, and the command from its arguments to the files it writes.

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
from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.networks import vgg16
from l1inf_optax.experiments.paper import cifar10

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.fixture
def narrow(monkeypatch):
    """Fewer layers with few units: what takes time is compiling them."""
    monkeypatch.setattr(vgg16, "BLOCKS", ((2, 2), (3,), (3,), (3,), (4,)))
    monkeypatch.setattr(vgg16, "HIDDEN", (4, 4))
    cifar10.make_task.cache_clear()


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
