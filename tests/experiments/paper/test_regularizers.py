"""Penalties against their definition, dropout against what it drops, and the command."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.networks import vgg16
from l1inf_optax.experiments.paper import classification, regularizers


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "regularizers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "DEFAULTS", classification.Settings(epochs=2))
        arguments = ["--data-sets", "classification", "--trials", "2", "--starts", "1"]
        assert main(["regularizers", *arguments, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), out


def test_the_json_has_a_row_for_every_method_beside_the_papers(result):
    document, _ = result
    rows = document["rows"]
    assert [row["method"] for row in rows] == list(regularizers.METHODS)
    papers = [row["paper_test_accuracy"] for row in rows]
    assert (papers[0], papers[3], papers[-1]) == (71.6, 81.6, 91.0)
    assert all(0 < row["test_accuracy"] < 100 for row in rows)
    assert rows[-1]["sparsity"] > 10
    assert all(row["sparsity"] < 1 for row in rows[:-1])
    # Strengths and dropout reach the training: no two methods end alike.
    assert len({row["test_error"] for row in rows}) == len(rows)


def test_the_figure_is_written_and_not_blank(result):
    _, out = result
    assert {path.name for path in out.iterdir()} == {"results.json", "accuracy.png"}
    pixels = matplotlib.image.imread(out / "accuracy.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


def test_the_penalties_are_those_of_the_loss():
    rng = np.random.default_rng(0)
    shapes = {"augmented_kernel": (4, 3), "kernel": (3, 2), "bias": (2,)}
    params = {k: jnp.asarray(rng.normal(size=s).astype(np.float32)) for k, s in shapes.items()}
    grads = jax.tree.map(jnp.ones_like, params)

    def penalty(params):
        weights = [params["augmented_kernel"][1:], params["kernel"]]
        return sum(0.3 * jnp.abs(w).sum() + 0.2 * (w**2).sum() / 2 for w in weights)

    got, _ = regularizers.add_penalties(0.3, 0.2).update(grads, (), params)
    expected = jax.tree.map(lambda g, p: g + p, grads, jax.grad(penalty)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_dropout_drops_half_of_the_hidden_units_and_doubles_the_others():
    network = regularizers.AugmentedMLP((2000, 1), activation=regularizers.relu_with_dropout)
    plain = regularizers.AugmentedMLP((2000, 1))
    x = jnp.ones((50, 3))
    params = plain.init(jax.random.key(0), x)
    units = params["params"]["readout"]["kernel"]
    alone = jax.tree.map(lambda leaf: leaf, params)
    alone["params"]["readout"]["kernel"] = jnp.zeros_like(units).at[0].set(1.0)
    alone["params"]["hidden_0"]["augmented_kernel"] = jnp.ones((4, 2000))
    got = network.apply(alone, x, rngs={"dropout": jax.random.key(1)})[:, 0]
    assert set(np.unique(got)) == {0.0, 8.0}  # of a unit whose output is 4
    assert 10 < (np.asarray(got) == 0).sum() < 40
    np.testing.assert_array_equal(plain.apply(alone, x)[:, 0], 4.0)


def test_vgg16_drops_units_of_its_hidden_layers(monkeypatch):
    monkeypatch.setattr(vgg16, "BLOCKS", ((2, 2), (3,), (3,), (3,), (4,)))
    monkeypatch.setattr(vgg16, "HIDDEN", (64, 64))
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    params = vgg16.VGG16().init(jax.random.key(0), x)
    network = vgg16.VGG16(activation=regularizers.relu_with_dropout)
    first, second = (
        network.apply(params, x, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)
    )
    assert not np.allclose(first, second)


def test_a_data_set_without_its_file_is_one_clear_sentence(tmp_path, capsys):
    arguments = ["--data-sets", "cifar10", "--cifar10", str(tmp_path / "none")]
    with pytest.raises(SystemExit):
        main(["regularizers", *arguments, "--out", str(tmp_path / "out")])
    assert "no such file or folder" in capsys.readouterr().err
