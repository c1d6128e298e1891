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


def test_columns_are_drawn_before_and_after_their_projection():
    columns = np.array([[2.0, 0.2, -0.9, 0.0], [0.5, -0.3, 0.7, -3.0]])
    nearest = np.array([[1.0, 0.2, -0.6, 0.0], [0.0, -0.3, 0.4, -1.0]])  # by hand, c = 1
    ax = plotting.plot_projection(columns, 1.0)
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_array_equal(lines["column"], columns.T)
    np.testing.assert_allclose(lines["projection"], nearest.T[[1, 2]], atol=1e-6)
    np.testing.assert_allclose(
        lines["projection, one weight exactly 0"], nearest.T[[0, 3]], atol=1e-6
    )
    joined = [line.get_xydata() for line in ax.lines if line.get_label().startswith("_")]
    np.testing.assert_allclose(joined, np.stack([columns.T, nearest.T], 1), atol=1e-6)
    (ball,) = ax.patches
    assert ball.contains_point(ax.transData.transform([0.49, 0.49]))
    assert not ball.contains_point(ax.transData.transform([0.51, 0.51]))


def test_bars_are_divided_at_the_threshold():
    ax = plotting.plot_threshold([0.5, -3.0, 1.0], 0.75)
    below, above = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert (below, above) == ([0.75, 0.75, 0.5], [2.25, 0.25, 0.0])
    assert set(ax.lines[0].get_ydata()) == {0.75}
    assert "2.5" in ax.get_title()


@pytest.mark.parametrize("seed", range(3))
def test_the_passes_climb_to_the_threshold_that_projects(seed):
    column = np.random.default_rng(seed).standard_cauchy(40)
    c = 0.1 * np.abs(column).sum()
    ax = plotting.plot_newton(column, c)
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    thetas, norms = lines["Newton's passes"].T
    assert (np.diff(thetas) > 0).all()
    assert norms[-1] == pytest.approx(c)
    for label in ("Newton's passes", r"norm of what $\theta$ leaves"):
        for theta, norm in lines[label]:
            assert norm == pytest.approx(sum(max(abs(v) - theta, 0) for v in column))


def test_a_column_inside_the_ball_has_no_passes_to_show():
    with pytest.raises(ValueError, match="nothing to project"):
        plotting.plot_newton([0.5, 0.5], 1.0)


def test_a_row_of_pictures_is_one_unit_over_training():
    kernels = np.stack([KERNEL, 2 * KERNEL, 0 * KERNEL])
    ax = plotting.plot_receptive_fields_over_training(kernels, [0, 5, 10], (2, 3), units=2)
    _, pixels = shown(ax)
    assert pixels.shape == (2 + 1 + 2, 3 * 3 + 2)
    for unit, top in enumerate([0, 3]):
        for time, left in enumerate([0, 4, 8]):
            field = pixels[top : top + 2, left : left + 3]
            np.testing.assert_array_equal(field, kernels[time, 1:, unit].reshape(2, 3))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "5", "10"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1", "2"]


def test_the_path_names_the_weights_that_get_the_largest():
    c = np.array([1.0, 0.1, 0.5])
    weights = np.array([[0.0, -3.0, 1.0, 0.2], [0.0, 0.0, 0.5, 0.0], [0.1, -1.0, 0.0, 0.0]])
    ax = plotting.plot_path(c, weights, names=["a", "b", "c", "d"], named=2)
    lines = [line for line in ax.lines if len(line.get_xdata()) == 3]
    for line, (label, column) in zip(
        lines, [("b", 1), ("c", 2), ("others", 3), (None, 0)], strict=True
    ):
        np.testing.assert_array_equal(line.get_xdata(), [0.1, 0.5, 1.0])
        np.testing.assert_array_equal(line.get_ydata(), weights[[1, 2, 0], column])
        assert label is None or line.get_label() == label
    assert len({line.get_color() for line in lines}) == 3


def test_bounds_are_drawn_beside_the_gap_with_what_is_had_for_nothing():
    ax = plotting.plot_bounds(
        [10, 100],
        [0.2, 0.1],
        {"by c": [3, 1], "by norms": [2, 0.5]},
        trivial=0.7,
        spread={"measured": [0.1, 0.5], "by c": [0, 0], "by norms": [0, 0]},
    )
    drawn = {bars.get_label(): bars for bars in ax.containers}
    for name, values in {"measured": [0.2, 0.1], "by c": [3, 1], "by norms": [2, 0.5]}.items():
        np.testing.assert_array_equal(drawn[name][0].get_xydata().T, [[10, 100], values])
    ends = [bar[:, 1] for bar in drawn["measured"][2][0].get_segments()]
    np.testing.assert_allclose(ends, [[0.1, 0.3], [0.01, 0.6]])
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines["above it a bound says nothing"].get_ydata()) == {0.7}
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plotting.plot_projection(np.ones((3, 4)), 1.0), r"\(3, 4\): give \(2, n\)"),
        (lambda: plotting.plot_threshold(np.ones((3, 4)), 1.0), "give one column"),
        (lambda: plotting.plot_newton(np.ones((3, 4)), 1.0), "give one column"),
        (
            lambda: plotting.plot_receptive_fields_over_training([KERNEL], [0, 1], (2, 3)),
            "for m times",
        ),
        (lambda: plotting.plot_path([1.0], np.ones((2, 4))), "for m radii"),
        (lambda: plotting.plot_path([1.0], np.ones((1, 2)), names=["a"]), "name each"),
    ],
)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_pictures_go_where_they_are_told():
    figure, axes = plt.subplots(2, 2)
    assert plotting.plot_weight_matrix(KERNEL, axes[0, 0]) is axes[0, 0]
    assert plotting.plot_receptive_fields(KERNEL, (2, 3), axes[0, 1]) is axes[0, 1]
    assert plotting.plot_tradeoff([1], [90], [95], axes=axes[1])[0] is axes[1, 0]
    assert len(plt.get_fignums()) == 1
    assert figure.axes[0].images
