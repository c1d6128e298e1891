"""The command from its arguments to the files it writes, with few steps."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest

from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.beyond import certificates

ARGUMENTS = ["bounds", "--trials", "1", "--regression-epochs", "5", "--classification-epochs", "1"]
MEASURES = {
    *("train_risk", "test_risk", "trivial_risk", "gap", "bound_by_c", "bound_by_norms"),
    *("output_norm", "sample_size"),
}


def test_the_files_hold_measured_gaps_and_bounds_above_them(tmp_path):
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    expected = [(name, c) for name, problem in certificates.PROBLEMS.items() for c in problem.c]
    assert [(row["problem"], row["c"]) for row in rows] == expected
    for row in rows:
        assert set(row) == {"problem", "c", "trials", "std", *MEASURES}
        assert row["gap"] == pytest.approx(abs(row["test_risk"] - row["train_risk"]))
        assert row["gap"] < min(row["bound_by_c"], row["bound_by_norms"])
    guesses = {row["problem"]: row["trivial_risk"] for row in rows}
    assert 80 < guesses["regression"] < 300  # the targets' variance
    assert guesses["classification"] == pytest.approx(np.log(2))

    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "gaps.png"}
    pixels = matplotlib.image.imread(tmp_path / "gaps.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


def test_hardly_any_input_is_clipped():
    for problem in certificates.PROBLEMS.values():
        (x, _), _ = jax.jit(problem.sample)(jax.random.key(0))
        assert (np.abs(x) > problem.input_bound).mean() < 1e-6


def test_residuals_count_as_much_as_the_certificate_lets_them():
    outputs, y = np.array([[0.0], [0.0], [0.0]]), np.array([29.0, -31.0, 1e6])
    np.testing.assert_allclose(certificates._truncated_error(outputs, y), [841, 900, 900])
