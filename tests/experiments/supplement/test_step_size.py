"""The command from its arguments to the files it writes, with few steps."""

import json
from functools import partial

import matplotlib.image

from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.paper import classification


def test_the_files_hold_every_step_size_and_a_tiny_one_learns_nothing(tmp_path, monkeypatch):
    shallow = partial(classification.make_task, hidden=(20,))  # compiles faster
    monkeypatch.setattr(classification, "make_task", shallow)
    arguments = ["--rates", "1", "1e-6", "--c", "inf", "0.5", "--epochs", "3", "--trials", "2"]
    assert main(["step-size", *arguments, "--starts", "1", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["experiment"] == "step-size"
    assert document["settings"]["rates"] == [1.0, 1e-6]
    keys = [(row["rate"], row["c"], row["trials"]) for row in document["rows"]]
    assert keys == [(1e-6, None, 2), (1e-6, 0.5, 2), (1.0, None, 2), (1.0, 0.5, 2)]
    still, _, trained, _ = document["rows"]
    assert trained["train_error"] < 0.9 * still["train_error"]

    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "step_size.png"}
    pixels = matplotlib.image.imread(tmp_path / "step_size.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05
