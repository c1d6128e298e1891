"""The command from its arguments to the files it writes, with few steps."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest

from l1inf_optax.experiments import bounds
from l1inf_optax.experiments.__main__ import main

ARGUMENTS = ["bounds", "--trials", "2", "--regression-epochs", "5", "--classification-epochs", "1"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "bounds"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), out


def test_every_study_has_a_row_for_every_c(result):
    document, _ = result
    expected = [(name, c) for name, study in bounds.STUDIES.items() for c in study.c]
    assert [(row["problem"], row["c"]) for row in document["rows"]] == expected
    for row in document["rows"]:
        assert row["trials"] == 2
        assert set(row["std"]) == {
            *("train_risk", "test_risk", "trivial_risk", "gap", "bound_by_c", "bound_by_norms"),
            *("output_norm", "sample_size"),
        }


def test_the_bounds_are_above_what_is_measured(result):
    for row in result[0]["rows"]:
        assert abs(row["test_risk"] - row["train_risk"]) <= row["gap"] * (1 + 1e-6)
        assert row["gap"] < min(row["bound_by_c"], row["bound_by_norms"])


def test_guessing_costs_the_targets_variance_or_the_logarithm_of_2(result):
    rows = {row["problem"]: row for row in result[0]["rows"]}
    assert 80 < rows["regression"]["trivial_risk"] < 300
    assert rows["classification"]["trivial_risk"] == pytest.approx(np.log(2))


def test_hardly_any_input_is_clipped():
    for study in bounds.STUDIES.values():
        (x, _), _ = study.sample(jax.random.key(0))
        assert (np.abs(x) > study.input_bound).mean() < 1e-6


def test_residuals_count_as_much_as_the_certificate_lets_them():
    outputs, y = np.array([[0.0], [0.0], [0.0]]), np.array([29.0, -31.0, 1e6])
    np.testing.assert_allclose(bounds._truncated_error(outputs, y), [841, 900, 900])


def test_the_figure_is_written_and_not_blank(result):
    _, out = result
    assert {path.name for path in out.iterdir()} == {"results.json", "gaps.png"}
    pixels = matplotlib.image.imread(out / "gaps.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05
