"""The command from its arguments to the files it writes, with few steps; its data and slopes."""

import json
from functools import partial

import matplotlib.image
import numpy as np
import pytest

from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.paper import classification
from l1inf_optax.experiments.supplement import sample_size


def test_the_files_hold_every_number_of_samples_and_the_fitted_slopes(tmp_path, monkeypatch):
    shallow = partial(classification.make_task, hidden=(20,))  # compiles faster
    monkeypatch.setattr(classification, "make_task", shallow)
    arguments = ["--samples", "100", "50", "--c", "inf", "0.5", "--epochs", "2", "--trials", "2"]
    assert main(["sample-size", *arguments, "--starts", "1", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["experiment"] == "sample-size"
    assert document["settings"]["samples"] == [100, 50]
    rows = document["rows"]
    keys = [(row["samples"], row["c"], row["trials"]) for row in rows]
    assert keys == [(50, None, 2), (50, 0.5, 2), (100, None, 2), (100, 0.5, 2)]
    for row in rows:
        assert 0 < row["test_accuracy"] < 100
        assert row["generalization_error"] >= 0
    for slope, few, many in zip(document["slopes"], rows[:2], rows[2:], strict=True):
        ratio = many["generalization_error"] / few["generalization_error"]
        assert slope == {"c": few["c"], "slope": pytest.approx(np.log2(ratio))}

    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "sample_size.png"}
    pixels = matplotlib.image.imread(tmp_path / "sample_size.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


def test_small_training_sets_are_repeated_and_no_two_sets_share_a_sample():
    sizes, trials = [4, 12], 2
    (x, y), (test_x, test_y) = (
        tuple(map(np.asarray, part)) for part in sample_size.make_data(3, sizes, trials)
    )
    assert (x.shape, y.shape, test_x.shape) == ((4, 12, 500), (4, 12), (2, 1000, 500))
    own = []
    for s, n in enumerate(np.repeat(sizes, trials)):
        for copy in range(0, 12, n):
            np.testing.assert_array_equal(x[s, copy : copy + n], x[s, :n])
            np.testing.assert_array_equal(y[s, copy : copy + n], y[s, :n])
        assert y[s, :n].sum() == n // 2
        own.append(x[s, :n])
    every = np.concatenate([*own, *test_x])
    assert len(np.unique(every, axis=0)) == len(every) == 2 * (4 + 12 + 1000)
    assert (test_y.sum(axis=1) == 500).all()


def test_a_power_law_has_its_exponent_as_slope():
    laws = {np.inf: (3.0, -0.5), 0.1: (0.2, -1.25)}
    table = [
        {"c": c, "samples": n, "generalization_error": factor * n**slope}
        for n in (125, 500, 2000)
        for c, (factor, slope) in laws.items()
    ]
    found = {row["c"]: row["slope"] for row in sample_size.fit_slopes(table)}
    assert found == {c: pytest.approx(slope) for c, (_, slope) in laws.items()}


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [(("60", "100"), "--samples 60 100: give"), (("0", "100"), "'0' is not a whole number")],
)
def test_wrong_numbers_of_samples_end_in_one_line(numbers, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sample-size", "--samples", *numbers])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
