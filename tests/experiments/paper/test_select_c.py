"""The command from its arguments to the files it writes, with few steps."""

import json

import matplotlib.image
import numpy as np
import pytest

from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.paper import select_c
from l1inf_optax.selection import CrossValidation

LAYERS = ["hidden_0", "hidden_1", "hidden_2"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "select-c"
    counts = {"epochs": 2, "regression-epochs": 4, "trials": 2, "rounds": 1, "candidates": 2}
    arguments = [text for name, n in counts.items() for text in (f"--{name}", str(n))]
    assert (
        main(
            [
                "select-c",
                "--c",
                "inf",
                "1",
                "--regression-c",
                "1",
                "0.5",
                *arguments,
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return json.loads((out / "results.json").read_text()), out


def test_the_json_has_every_score_and_what_was_chosen(result):
    document, out = result
    assert document["experiment"] == "select-c"
    assert document["settings"]["c"] == [None, 1.0]
    assert document["settings"]["rounds"] == 1
    assert len(document["classification"]) == 2
    for trial in document["classification"]:
        assert trial["single"]["c"] == [None, 1.0]
        assert np.shape(trial["single"]["scores"]) == (2, 5)
        assert np.shape(trial["layered"]["scores"]) == (2, 5)
        means = np.mean(trial["layered"]["scores"], axis=1)
        assert trial["layered"]["best_c"] == trial["layered"]["c"][int(means.argmax())]
        assert sorted(trial["layered"]["best_c"]) == LAYERS
        assert all(0 <= score <= 100 for score in np.ravel(trial["single"]["scores"]))
    assert document["regression"]["c"] == [1.0, 0.5]
    assert np.shape(document["regression"]["scores"]) == (2, 5)
    assert (np.array(document["regression"]["scores"]) < 0).all()
    assert str(out) not in json.dumps(document)


def test_the_search_starts_from_the_best_single_c(result):
    for trial in result[0]["classification"]:
        best = trial["single"]["best_c"] or 1.0  # the largest that is finite
        assert trial["layered"]["c"][0] == dict.fromkeys(LAYERS, best)
        if trial["single"]["best_c"]:
            np.testing.assert_allclose(
                trial["layered"]["scores"][0], trial["single"]["scores"][1], atol=1.5
            )


def test_each_choice_is_measured_on_the_test_data(result):
    document, _ = result
    assert [row["choice"] for row in document["rows"]] == list(select_c.CHOICES)
    for row in document["rows"]:
        assert row["trials"] == 2
        assert 0 <= row["test_accuracy"] <= 100
        assert 0 <= row["sparsity"] <= 100
    single, _, layered = (row["test_accuracy"] for row in document["rows"])
    assert document["difference"]["mean"] == pytest.approx(layered - single, abs=1e-4)


def test_the_figures_are_written_and_not_blank(result):
    _, out = result
    figures = {"figure_5.png", "layers.png"}
    assert {path.name for path in out.iterdir()} == {"results.json", *figures}
    for name in figures:
        pixels = matplotlib.image.imread(out / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_each_choice_gives_every_layer_a_c():
    scores = np.array([[80.0, 82], [90, 94], [91, 91]])
    layered = [{"hidden_0": 0.1, "hidden_1": 1.0, "hidden_2": 2.0}]
    selection = select_c.Selection(
        CrossValidation((1.0, 0.5, 0.3), scores), CrossValidation(tuple(layered), scores[:1])
    )
    assert selection.choices() == [
        dict.fromkeys(LAYERS, 0.5), dict.fromkeys(LAYERS, 0.3), layered[0],
    ]  # fmt: skip


def test_the_difference_is_paired():
    accuracy = np.array([[80.0, 0, 81], [90, 0, 93], [85, 0, 84]])
    got = select_c._difference(accuracy)
    assert (got["mean"], got["better"], got["worse"]) == (1.0, 2, 1)
    assert got["standard_error"] == pytest.approx(2 / 3**0.5)
    assert select_c._difference(accuracy[:1])["standard_error"] is None
