"""Every picture shows the numbers it was given, labelled."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from l1inf_optax import plotting

KERNEL = np.random.default_rng(0).normal(size=(7, 5))


@pytest.fixture(autouse=True)
def _close_figures():
    plt.close("all")
    yield
    plt.close("all")


def shown(ax):
    (image,) = ax.images
    return image, np.ma.filled(image.get_array(), np.nan)


def test_the_heat_map_shows_the_first_columns_with_zero_in_the_middle():
    ax = plotting.plot_weight_matrix(KERNEL, columns=3)
    image, pixels = shown(ax)
    np.testing.assert_array_equal(pixels, KERNEL[:, :3])
    low, high = image.get_clim()
    assert low == -high < 0
    assert image.norm(0.0) == 0.5
    assert ax.get_xlabel()
    assert "bias" in ax.get_ylabel()


def test_receptive_fields_are_the_columns_without_their_bias():
    ax = plotting.plot_receptive_fields(KERNEL, (2, 3), units=4)
    _, pixels = shown(ax)
    assert pixels.shape == (2 + 1 + 2, 3 + 1 + 3)
    for unit, (top, left) in enumerate([(0, 0), (0, 4), (3, 0), (3, 4)]):
        field = pixels[top : top + 2, left : left + 3]
        np.testing.assert_array_equal(field, KERNEL[1:, unit].reshape(2, 3))
    assert np.isnan(pixels[2]).all()
    assert np.isnan(pixels[:, 3]).all()


def test_missing_units_leave_blank_fields():
    _, pixels = shown(plotting.plot_receptive_fields(KERNEL, (2, 3)))
    assert np.isfinite(pixels).sum() == 5 * 6


def test_boxes_span_the_quartiles_of_the_trials_of_each_radius():
    values = np.array([[1.0, 10], [2, 20], [3, 30], [4, 40], [5, 90]])
    ax = plotting.plot_trials([np.inf, 0.5], values, label="error")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["∞", "0.5"]
    assert ax.get_ylabel() == "error"
    drawn = [np.unique(line.get_ydata()) for line in ax.lines]
    for quartiles, median in (([2, 4], 3), ([20, 40], 30)):
        assert any(np.array_equal(y, quartiles) for y in drawn)
        assert any(np.array_equal(y, [median]) for y in drawn)
    assert any(np.array_equal(y, [90]) for y in drawn)  # beyond 40 + 1.5 * 20


@pytest.mark.parametrize("values", [np.ones(2), np.ones((5, 3))])
def test_trials_need_a_column_for_each_radius(values):
    with pytest.raises(ValueError, match=r"values has shape .* give \(trials, m\)"):
        plotting.plot_trials([1.0, 2.0], values)


def test_exact_zeros_are_drawn_in_the_colour_of_the_middle():
    ax = plotting.plot_receptive_fields(np.zeros((7, 4)), (2, 3))
    image, _ = shown(ax)
    colors = image.to_rgba(np.zeros(1))[0]
    assert min(colors) > 0.95


def test_a_diverged_network_can_be_drawn():
    image, _ = shown(plotting.plot_weight_matrix(np.full((7, 4), np.nan)))
    assert np.isfinite(image.get_clim()).all()


@pytest.mark.parametrize("plot", [plotting.plot_weight_matrix, plotting.plot_receptive_fields])
@pytest.mark.parametrize("array", [np.zeros(7), np.zeros((7, 2, 2))])
def test_an_array_that_is_no_matrix_is_refused(plot, array):
    arguments = () if plot is plotting.plot_weight_matrix else ((2, 3),)
    with pytest.raises(ValueError, match="give a matrix"):
        plot(array, *arguments)


def test_a_shape_that_does_not_hold_the_inputs_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\), 8 pixels, .* 7 rows"):
        plotting.plot_receptive_fields(KERNEL, (2, 4))


def test_the_tradeoff_shows_means_spread_and_reference():
    left, right = plotting.plot_tradeoff(
        [5, 1], [93, 90], [70, 95], accuracy_std=[1, 2], unconstrained=(94, 3)
    )
    for ax, values, reference in ((left, [90, 93], 94), (right, [95, 70], 3)):
        curve, *_ = ax.containers[0]
        np.testing.assert_array_equal(curve.get_xdata(), [1, 5])
        np.testing.assert_array_equal(curve.get_ydata(), values)
        (line,) = [line for line in ax.lines if line.get_label() == "no constraint"]
        assert set(line.get_ydata()) == {reference}
        assert "%" in ax.get_ylabel()
        assert ax.get_xlabel()
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert sorted(labels) == ["inside the ball", "no constraint"]
    bars = left.containers[0][2][0].get_segments()
    np.testing.assert_array_equal([bar[:, 1] for bar in bars], [[88, 92], [92, 94]])
    assert not right.containers[0][2]


def test_the_selection_shows_scores_errors_and_choices():
    c, mean, error = [1, np.inf, 0.1, 0.3], [82, 70, 88, 90], [1, 2, 3, 4]
    ax = plotting.plot_selection(c, mean, error, best=0.3, one_standard_error=0.1, label="right")
    curve, _, (bars,) = ax.containers[0]
    np.testing.assert_array_equal(curve.get_xdata(), [0.1, 0.3, 1])
    np.testing.assert_array_equal(curve.get_ydata(), [88, 90, 82])
    ends = [bar[:, 1] for bar in bars.get_segments()]
    np.testing.assert_array_equal(ends, [[85, 91], [86, 94], [81, 83]])
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines["no constraint"].get_ydata()) == {70}
    assert set(lines["one standard error below the best"].get_ydata()) == {86}
    for label, point in {
        "best: c = 0.3": (0.3, 90),
        "one standard error: c = 0.1": (0.1, 88),
    }.items():
        assert (*lines[label].get_xdata(), *lines[label].get_ydata()) == point
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.1", "0.3", "1"]
    assert ax.get_ylabel() == "right"


def test_no_constraint_may_be_the_best():
    ax = plotting.plot_selection(
        [1, np.inf], [70, 80], [1, 1], best=np.inf, one_standard_error=np.inf
    )
    ax.figure.canvas.draw()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "best: c = ∞" in labels


def test_pictures_go_where_they_are_told():
    figure, axes = plt.subplots(2, 2)
    assert plotting.plot_weight_matrix(KERNEL, axes[0, 0]) is axes[0, 0]
    assert plotting.plot_receptive_fields(KERNEL, (2, 3), axes[0, 1]) is axes[0, 1]
    assert plotting.plot_tradeoff([1], [90], [95], axes=axes[1])[0] is axes[1, 0]
    assert len(plt.get_fignums()) == 1
    assert figure.axes[0].images
