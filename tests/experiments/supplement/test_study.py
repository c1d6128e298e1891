"""Rows and figures of the studies."""

import numpy as np

from l1inf_optax._lanes import Lane
from l1inf_optax.experiments.supplement import study

LANES = [Lane(t, c) for t in range(4) for c in (np.inf, 0.5)]
SIZES = [10, 10, 10, 10, 30, 30, 30, 30]
MEASURED = {
    "generalization_error": np.array([1.0, 0.1, 3.0, 0.1, 0.5, 0.2, 0.5, 0.4]),
    "test_accuracy": np.array([50.0, 60.0, 70.0, 60.0, 80.0, 90.0, 80.0, 90.0]),
}


def test_there_is_a_row_for_every_value_and_every_c():
    table = study.rows("samples", SIZES, LANES, MEASURED)
    keys = [(row["samples"], row["c"], row["trials"]) for row in table]
    assert keys == [(10, np.inf, 2), (10, 0.5, 2), (30, np.inf, 2), (30, 0.5, 2)]
    means = [row["generalization_error"] for row in table]
    np.testing.assert_allclose(means, [2.0, 0.1, 0.5, 0.3])
    spread = [row["std"]["generalization_error"] for row in table]
    np.testing.assert_allclose(spread, [np.sqrt(2), 0, 0, np.sqrt(0.02)], atol=1e-12)


def test_a_figure_has_a_panel_for_every_column_and_a_line_for_every_c():
    table = study.rows("samples", SIZES, LANES, MEASURED)
    figure = study.figure(table, "samples", "n", list(MEASURED), scale="log")
    study.add_legend(figure)
    errors, accuracies = figure.axes
    lines = [container.lines[0].get_xydata() for container in errors.containers]
    np.testing.assert_allclose(lines, [[[10, 2.0], [30, 0.5]], [[10, 0.1], [30, 0.3]]])
    lines = [container.lines[0].get_xydata() for container in accuracies.containers]
    np.testing.assert_allclose(lines, [[[10, 60], [30, 80]], [[10, 60], [30, 90]]])
    assert (errors.get_xlabel(), accuracies.get_ylabel()) == ("n", "test accuracy (%)")
    assert [text.get_text() for text in errors.get_xticklabels()] == ["10", "30"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["no constraint", "c = 0.5"]


def test_an_error_bar_is_the_standard_deviation_and_never_leaves_a_logarithmic_axis():
    measured = {"generalization_error": np.array([0.0, 1.0, 10.0, 1.0, 0, 4.0, 0, 6.0])}
    table = study.rows("samples", SIZES, LANES, measured)
    (ax,) = study.figure(table[:2], "samples", "n", ["generalization_error"], scale="log").axes
    (_, _, (bars,)), _ = ax.containers
    low, high = bars.get_segments()[0][:, 1]
    assert 0 < low < 5
    np.testing.assert_allclose(high, 5 + np.sqrt(50))
