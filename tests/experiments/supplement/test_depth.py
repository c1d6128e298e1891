"""The command from its arguments to the files it writes, with few steps; its networks."""

import json

import matplotlib.image
import pytest

from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.supplement import depth


def test_the_files_hold_every_number_of_hidden_layers(tmp_path):
    arguments = ["--depths", "2", "1", "--c", "inf", "0.5", "--epochs", "1", "--trials", "1"]
    assert main(["depth", *arguments, "--starts", "1", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["experiment"] == "depth"
    assert document["settings"]["depths"] == [2, 1]
    keys = [(row["hidden_layers"], row["c"]) for row in document["rows"]]
    assert keys == [(1, None), (1, 0.5), (2, None), (2, 0.5)]
    for row in document["rows"]:
        assert 0 < row["test_accuracy"] < 100
        assert row["generalization_error"] == pytest.approx(
            abs(row["test_error"] - row["train_error"])
        )
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "depth.png"}
    pixels = matplotlib.image.imread(tmp_path / "depth.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("hidden_layers", "widths"),
    [
        (1, (100,)),
        (2, (100, 50)),
        (3, (100, 50, 20)),
        (4, (100, 50, 20, 20)),
        (6, (100, 50, 20, 20, 20, 20)),
    ],
)
def test_deeper_networks_have_further_layers_of_20(hidden_layers, widths):
    assert depth.widths(hidden_layers) == widths
