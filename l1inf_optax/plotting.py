"""Pictures of weights inside the L1,inf ball, and of what the ball's radius does to a network.

The only public module that imports matplotlib: ``pip install "l1inf-optax[experiments]"``.

Every function draws into axes that are given, or into the current ones, and returns them, so that a
figure can be put together from several. Colours are those of Okabe and Ito and a diverging map
centred on zero: both can be told apart by readers with any common colour vision.
"""

import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from l1inf_optax._projection import projection_l1inf_ball

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # more of theirs
DIVERGING = "RdBu_r"  # white at zero: an exact zero is blank


def plot_weight_matrix(
    augmented_kernel: ArrayLike, ax: Axes | None = None, *, columns: int = 20
) -> Axes:
    """Heat map of the first columns of an augmented matrix (Figure 3 of the paper).

    Args:
        augmented_kernel: ``(d_in + 1, d_out)``, bias in row 0.
        ax: where to draw; the current axes by default.
        columns: how many units to show.

    Returns:
        The axes.

    Raises:
        ValueError: if the array has not two axes.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> import numpy as np
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_weight_matrix(np.eye(5, 3), ax, columns=2)
        >>> ax.get_xlabel(), ax.images[0].get_array().shape
        ('hidden unit', (5, 2))
    """
    matrix = _matrix(augmented_kernel)[:, :columns]
    ax = plt.gca() if ax is None else ax
    limit = _limit(matrix)
    image = ax.imshow(
        matrix, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="hidden unit", ylabel="input (row 0: bias)")
    ax.figure.colorbar(image, ax=ax, label="weight")
    return ax


def plot_receptive_fields(
    augmented_kernel: ArrayLike,
    shape: tuple[int, int],
    ax: Axes | None = None,
    *,
    units: int = 25,
) -> Axes:
    """The weights of the first units as pictures: what each of them looks for.

    Args:
        augmented_kernel: ``(1 + height * width, d_out)``; the bias in row 0 is not drawn.
        shape: height and width of the input pictures, in pixels.
        ax: where to draw; the current axes by default.
        units: how many units to show, at most, in a square as far as possible.

    Returns:
        The axes. All pictures share one colour scale, white where a weight is zero.

    Raises:
        ValueError: if the array has not two axes or ``shape`` does not hold its inputs.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> import numpy as np
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_receptive_fields(np.ones((1 + 6, 4)), (2, 3), ax)
        >>> ax.images[0].get_array().shape  # 2 x 2 pictures of 2 x 3 pixels, 1 pixel apart
        (5, 7)
    """
    pictures = _pictures(augmented_kernel, shape, units)
    ax = _draw_pictures(pictures, int(np.ceil(np.sqrt(len(pictures)))), ax)
    ax.set(xticks=[], yticks=[])
    return ax


def plot_trials(
    c: ArrayLike, values: ArrayLike, ax: Axes | None = None, *, label: str = ""
) -> Axes:
    """Box plots over trials, one for each c (Figures 1, 2 and 4 of the paper).

    Args:
        c: ``(m,)`` radii, drawn at equal distances in the order given; ``inf`` is no constraint.
        values: ``(trials, m)``.
        ax: where to draw; the current axes by default.
        label: of the vertical axis.

    Returns:
        The axes. Boxes span the quartiles, whiskers at most 1.5 times as much beyond them, lines
        are medians and circles the trials further out.

    Raises:
        ValueError: if ``values`` has not one column for each c.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> import numpy as np
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_trials([1.0, np.inf], np.ones((10, 2)), ax, label="test error")
        >>> [tick.get_text() for tick in ax.get_xticklabels()]
        ['1', '∞']
    """
    radii, samples = np.asarray(c, np.float64), np.asarray(values)
    if samples.ndim != 2 or samples.shape[1:] != radii.shape:
        raise ValueError(
            f"values has shape {samples.shape}, for c of shape {radii.shape}: give (trials, m) "
            "values for m radii"
        )
    ax = plt.gca() if ax is None else ax
    names = ["∞" if np.isinf(radius) else f"{radius:g}" for radius in radii]
    line = {"color": ORANGE, "linewidth": 1.5}
    outliers = {"marker": "o", "markersize": 3, "markeredgecolor": BLUE}
    ax.boxplot(
        samples,
        medianprops=line,
        flierprops=outliers,
        boxprops={"color": BLUE},
        whiskerprops={"color": BLUE},
        capprops={"color": BLUE},
    )
    ax.set_xticks(range(1, len(radii) + 1), names)
    ax.set(xlabel="normalization constant c", ylabel=label)
    ax.grid(axis="y", alpha=0.3)
    return ax


def plot_tradeoff(
    c: ArrayLike,
    accuracy: ArrayLike,
    sparsity: ArrayLike,
    *,
    accuracy_std: ArrayLike | None = None,
    sparsity_std: ArrayLike | None = None,
    unconstrained: tuple[float, float] | None = None,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """Accuracy and sparsity of constrained networks against c, in two panels.

    Args:
        c: ``(n,)`` normalization constants, positive and finite.
        accuracy: ``(n,)`` test accuracy in percent.
        sparsity: ``(n,)`` zero weights in percent.
        accuracy_std: ``(n,)`` half lengths of the error bars, in percentage points.
        sparsity_std: the same for the sparsity.
        unconstrained: accuracy and sparsity of the network without constraint, a dashed line.
        axes: two axes; by default a new figure's.

    Returns:
        The two axes: accuracy, sparsity.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from l1inf_optax import plotting
        >>> left, right = plotting.plot_tradeoff(
        ...     [1, 2, 5], [90, 92, 93], [95, 88, 70], unconstrained=(93, 0)
        ... )
        >>> left.get_ylabel(), right.get_ylabel()
        ('test accuracy (%)', 'exact zeros (%)')
    """
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")[1]
    c = np.asarray(c, float)
    panels = (
        (axes[0], accuracy, accuracy_std, "test accuracy (%)", BLUE, "o"),
        (axes[1], sparsity, sparsity_std, "exact zeros (%)", ORANGE, "s"),
    )
    order = np.argsort(c)
    for panel, (ax, mean, std, label, color, marker) in enumerate(panels):
        bars = None if std is None else np.asarray(std, float)[order]
        ax.errorbar(
            c[order],
            np.asarray(mean, float)[order],
            bars,
            color=color,
            marker=marker,
            capsize=3,
            label="inside the ball",
        )
        if unconstrained is not None:
            ax.axhline(unconstrained[panel], color="0.3", linestyle="--", label="no constraint")
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(np.unique(c).tolist()))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlabel="normalization constant c", ylabel=label)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    return axes


def plot_selection(
    c: ArrayLike,
    mean: ArrayLike,
    standard_error: ArrayLike,
    ax: Axes | None = None,
    *,
    best: float,
    one_standard_error: float,
    label: str = "cross-validation score",
) -> Axes:
    """Cross-validation scores against c, with the c that they choose (Figure 5 of the paper).

    Args:
        c: ``(n,)`` normalization constants; the score of ``inf``, no constraint, is a dashed line.
        mean: ``(n,)`` mean scores over the folds; what is not finite is left out.
        standard_error: ``(n,)`` half lengths of the error bars.
        ax: where to draw; the current axes by default.
        best: the c with the best mean, marked with a star.
        one_standard_error: the c of the one-standard-error rule, marked with a hollow diamond; a
            dotted line is one standard error below the best mean.
        label: of the vertical axis.

    Returns:
        The axes.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_selection(
        ...     [0.1, 0.3, 1.0], [88, 90, 85], [3, 1, 1], ax, best=0.3, one_standard_error=0.3
        ... )
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('normalization constant c', 'cross-validation score')
    """
    ax = plt.gca() if ax is None else ax
    c, mean, error = (np.asarray(values, float) for values in (c, mean, standard_error))
    order = np.argsort(c)
    order = order[np.isfinite(c[order])]
    ax.errorbar(
        c[order],
        mean[order],
        error[order],
        color=BLUE,
        marker="o",
        capsize=3,
        label="mean and standard error over folds",
    )
    for value in mean[np.isinf(c)]:
        ax.axhline(value, color="0.3", linestyle="--", label="no constraint")
    chosen = int(np.flatnonzero(c == best)[0])
    ax.axhline(
        mean[chosen] - error[chosen],
        color=ORANGE,
        linestyle=":",
        label="one standard error below the best",
    )
    # They may be the same: the diamond is hollow, so that a star inside it shows.
    marks = (
        ("best", best, "*", 12, "full"),
        ("one standard error", one_standard_error, "D", 12, "none"),
    )
    for name, radius, marker, size, fill in marks:
        text = "∞" if np.isinf(radius) else f"{radius:g}"
        ax.plot(
            radius,
            mean[c == radius][0],
            color=ORANGE,
            marker=marker,
            markersize=size,
            fillstyle=fill,
            linestyle="none",
            zorder=3,
            label=f"{name}: c = {text}",
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(np.unique(c[order]).tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.tick_params(axis="x", labelrotation=90)
    ax.set(xlabel="normalization constant c", ylabel=label)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def plot_ball(c: float, ax: Axes | None = None) -> Axes:
    """The L1 ball of radius c in the plane of two weights, a square that stands on a corner.

    Args:
        c: the normalization constant.
        ax: where to draw; the current axes by default.

    Returns:
        The axes, with equal units on both.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_ball(2.0, ax)
        >>> ax.patches[0].get_xy().tolist()
        [[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0], [2.0, 0.0]]
    """
    c = float(c)  # an unsigned integer has no negative
    ax = plt.gca() if ax is None else ax
    label = f"$\\|v\\|_1 \\leq {c:g}$"
    ax.fill([c, 0, -c, 0], [0, c, 0, -c], facecolor=BLUE + "30", edgecolor=BLUE, label=label)
    ax.set(xlabel="first weight", ylabel="second weight", aspect="equal")
    ax.grid(alpha=0.3)
    return ax


def plot_projection(columns: ArrayLike, c: float, ax: Axes | None = None) -> Axes:
    """Columns of two weights, the L1 ball, and where the projection takes them.

    Args:
        columns: ``(2, n)``, as they are before the projection.
        c: the normalization constant.
        ax: where to draw; the current axes by default.

    Returns:
        The axes: hollow circles are the columns, lines lead to their projections. Those with an
        exact zero are squares.

    Raises:
        ValueError: if ``columns`` has not two rows.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_projection([[1.5, 1.0], [0.25, 1.0]], 1.0, ax)
        >>> [(line.get_label(), line.get_xydata().round(6).tolist()) for line in ax.lines[-2:]]
        [('projection', [[0.5, 0.5]]), ('projection, one weight exactly 0', [[1.0, 0.0]])]
    """
    before = np.asarray(columns, np.float64)
    if before.ndim != 2 or len(before) != 2:
        raise ValueError(f"columns has shape {before.shape}: give (2, n), two weights a column")
    ax = plot_ball(c, ax)
    after = np.asarray(projection_l1inf_ball(jnp.asarray(before, jnp.float32), c), np.float64)
    for start, end in zip(before.T, after.T, strict=True):
        ax.plot(*np.stack([start, end], 1), color="0.45", linewidth=1, zorder=1.5)
    ax.plot(*before, "o", color="0.25", markerfacecolor="white", label="column")
    corner = (after == 0).any(0)
    ax.plot(*after[:, ~corner], "o", color=BLUE, label="projection")
    label = "projection, one weight exactly 0"
    ax.plot(*after[:, corner], "s", color=ORANGE, label=label)
    return ax


def plot_threshold(column: ArrayLike, theta: float, ax: Axes | None = None) -> Axes:
    """What a threshold leaves of a column: its magnitudes, from the largest to the smallest.

    Args:
        column: ``(n,)`` weights.
        theta: the threshold, 0 or more. It projects onto the ball whose radius is the sum in the
            title.
        ax: where to draw; the current axes by default.

    Returns:
        The axes: the part of each bar above the threshold stays, the part below is taken off.

    Raises:
        ValueError: if ``column`` has not one axis.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_threshold([0.5, -2.0, 1.0], 0.75, ax)
        >>> [float(bar.get_height()) for bar in ax.containers[1]]  # of 2, 1 and 0.5
        [1.25, 0.25, 0.0]
    """
    sizes = np.sort(np.abs(_vector(column)))[::-1]
    rest = np.maximum(sizes - theta, 0)
    ax = plt.gca() if ax is None else ax
    places = np.arange(1, len(sizes) + 1)
    ax.bar(places, sizes - rest, color="0.8", label="taken off")
    ax.bar(places, rest, bottom=sizes - rest, color=BLUE, label="stays")
    ax.axhline(theta, color=ORANGE, label=r"threshold $\theta$")
    ax.set(xlabel="weight, by magnitude", ylabel="magnitude")
    ax.set_title(f"$\\theta$ = {theta:.3g}: {rest.sum():.3g} stays")
    return ax


def plot_newton(column: ArrayLike, c: float, ax: Axes | None = None) -> Axes:
    r"""Newton's passes to the threshold that projects a column.

    The norm of what a threshold leaves, ``sum max(|v| - theta, 0)``, is convex, decreasing and
    made of straight pieces. Newton's method follows its tangents down to c, from 0 on. Here it is
    the textbook's iteration, in float64; the library's starts closer and is safe from rounding.

    Args:
        column: ``(n,)`` weights, with an L1 norm of more than c.
        c: the normalization constant.
        ax: where to draw; the current axes by default.

    Returns:
        The axes: the curve, the level c, and the tangents, with a dot for each pass.

    Raises:
        ValueError: if ``column`` has not one axis, or is inside the ball.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_newton([4.0, 2.0, 1.0], 2.5, ax)
        >>> ax.lines[-1].get_xydata().tolist()  # a pass's threshold, and what it leaves
        [[0.0, 7.0], [1.5, 3.0], [1.75, 2.5]]
    """
    sizes, c = np.abs(_vector(column)), float(c)

    def left(theta: ArrayLike) -> NDArray[np.float64]:
        return np.maximum(sizes - np.asarray(theta)[..., None], 0).sum(-1)

    if not left(0.0) > c:
        raise ValueError(f"column has an L1 norm of {left(0.0):g}, c is {c:g}: nothing to project")
    passes: list[float] = [0.0]
    # Every pass but the last takes a weight out of the sum, so there are no more than weights.
    while len(passes) <= len(sizes) and left(passes[-1]) > c * (1 + 1e-12):
        passes.append(passes[-1] + float((left(passes[-1]) - c) / (sizes > passes[-1]).sum()))
    ax = plt.gca() if ax is None else ax
    end = min(2 * passes[-1], sizes.max())
    thetas = np.unique(np.concatenate([sizes[sizes < end], [0.0, end]]))
    ax.plot(thetas, left(thetas), color=BLUE, label=r"norm of what $\theta$ leaves")
    ax.axhline(c, color="0.3", linestyle="--", label=f"c = {c:g}")
    for theta, reached in itertools.pairwise(passes):
        tangent = np.array([left(theta), c, left(reached)], float)
        ax.plot([theta, reached, reached], tangent, color=ORANGE, linewidth=1)
    ax.plot(passes, left(passes), "o", color=ORANGE, label="Newton's passes")
    ax.set(xlabel=r"threshold $\theta$", ylabel="L1 norm")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def plot_receptive_fields_over_training(
    augmented_kernels: ArrayLike,
    steps: ArrayLike,
    shape: tuple[int, int],
    ax: Axes | None = None,
    *,
    units: int = 5,
) -> Axes:
    """The weights of the first units as pictures, a row for each unit and a column for each time.

    Args:
        augmented_kernels: ``(m, 1 + height * width, d_out)``, the matrix at m times; the biases in
            row 0 are not drawn.
        steps: ``(m,)`` how many steps had been taken.
        shape: height and width of the input pictures, in pixels.
        ax: where to draw; the current axes by default.
        units: how many units to show, at most.

    Returns:
        The axes. All pictures share one colour scale, white where a weight is zero.

    Raises:
        ValueError: if there is not one matrix for each time or ``shape`` does not hold its inputs.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> import numpy as np
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> kernels = np.ones((3, 1 + 6, 4))
        >>> ax = plotting.plot_receptive_fields_over_training(kernels, [0, 10, 20], (2, 3), ax)
        >>> ax.images[0].get_array().shape  # 4 x 3 pictures of 2 x 3 pixels, 1 pixel apart
        (11, 11)
    """
    kernels, times = np.asarray(augmented_kernels, np.float64), np.asarray(steps)
    if kernels.ndim != 3 or times.shape != kernels.shape[:1]:
        raise ValueError(
            f"augmented_kernels has shape {kernels.shape}, for steps of shape {times.shape}: give "
            "(m, d_in + 1, d_out) matrices for m times"
        )
    pictures = np.stack([_pictures(kernel, shape, units) for kernel in kernels], axis=1)
    ax = _draw_pictures(pictures.reshape(-1, *shape), len(times), ax)
    for axis, pixels, texts in (
        (ax.xaxis, shape[1], [f"{time:g}" for time in times]),
        (ax.yaxis, shape[0], [str(unit + 1) for unit in range(len(pictures))]),
    ):
        axis.set_ticks((pixels + 1) * np.arange(len(texts)) + (pixels - 1) / 2, texts)
    ax.tick_params(length=0)
    ax.set(xlabel="training step", ylabel="hidden unit")
    return ax


def plot_path(
    c: ArrayLike,
    weights: ArrayLike,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    named: int = 6,
    label: str = "weight",
) -> Axes:
    """Weights against c: how they enter as the ball grows, like a lasso path.

    Args:
        c: ``(m,)`` radii, positive and finite.
        weights: ``(m, d)`` for each c, for instance of each input.
        ax: where to draw; the current axes by default.
        names: of the d weights; numbers from 1 by default.
        named: so many, those that get the largest, are drawn in colour and named. The others are
            grey.
        label: of the vertical axis.

    Returns:
        The axes.

    Raises:
        ValueError: if ``weights`` has not one row for each c, or ``names`` not one for each weight.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> path = [[0.0, 0.1, 0.0], [0.0, 0.7, 0.3]]
        >>> ax = plotting.plot_path([0.1, 1.0], path, ax, names=["age", "sex", "bmi"], named=2)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['sex', 'bmi', 'others']
    """
    radii, values = np.asarray(c, np.float64), np.asarray(weights, np.float64)
    if values.ndim != 2 or radii.shape != values.shape[:1]:
        raise ValueError(
            f"weights has shape {values.shape}, for c of shape {radii.shape}: give (m, d) weights "
            "for m radii"
        )
    texts = [str(i + 1) for i in range(values.shape[1])] if names is None else list(names)
    if len(texts) != values.shape[1]:
        raise ValueError(f"names has {len(texts)} entries for {values.shape[1]} weights: name each")
    ax = plt.gca() if ax is None else ax
    order = np.argsort(radii)
    radii, values = radii[order], values[order]
    by_size = np.argsort(-np.abs(values).max(0), kind="stable")
    styles = zip(itertools.cycle(COLORS), itertools.cycle("os^vDP"), strict=False)
    for i, (color, marker) in zip(by_size[:named], styles, strict=False):
        ax.plot(radii, values[:, i], color=color, marker=marker, markersize=5, label=texts[i])
    others = values[:, by_size[named:]]
    if others.size:
        lines = ax.plot(radii, others, color="0.65", linewidth=0.8, zorder=1.5)
        lines[0].set_label("others")
    ax.axhline(0, color="0.3", linewidth=0.8, zorder=1)
    ax.set(xscale="log", xlabel="normalization constant c", ylabel=label)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def plot_bounds(
    x: ArrayLike,
    gap: ArrayLike,
    bounds: Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    trivial: float,
    spread: Mapping[str, ArrayLike] | None = None,
    xlabel: str = "normalization constant c",
) -> Axes:
    """Measured generalization errors beside what the theory promises, on logarithmic axes.

    Args:
        x: ``(m,)`` what was varied, positive: for instance c, or the size of the sample.
        gap: ``(m,)`` measured gaps between the risks on the sample and on new data.
        bounds: ``(m,)`` bounds on them, one or two, by name.
        ax: where to draw; the current axes by default.
        trivial: a risk that is had for nothing, a dashed line: in the grey above it a bound says
            nothing.
        spread: ``(m,)`` half lengths of error bars, by name; the gap's is ``"measured"``.
        xlabel: of the horizontal axis.

    Returns:
        The axes.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt
        >>> from l1inf_optax import plotting
        >>> figure, ax = plt.subplots()
        >>> ax = plotting.plot_bounds([0.1, 1], [0.1, 0.2], {"by c": [1, 2]}, ax, trivial=0.7)
        >>> ax.get_legend_handles_labels()[1]
        ['above it a bound says nothing', 'by c', 'measured']
    """
    ax = plt.gca() if ax is None else ax
    lines = {**bounds, "measured": gap}
    styles = dict(zip(bounds, ((ORANGE, "s"), ("0.25", "^")), strict=False))
    styles["measured"] = (BLUE, "o")
    for name, (color, marker) in styles.items():
        means = np.asarray(lines[name], np.float64)
        bars = np.zeros_like(means) if spread is None else np.asarray(spread[name], np.float64)
        below = np.minimum(bars, 0.9 * means)  # the axis is logarithmic
        ax.errorbar(x, means, (below, bars), color=color, marker=marker, capsize=3, label=name)
    top = max(trivial, *(float(np.max(values)) for values in lines.values()))
    ax.axhspan(trivial, 10 * top, color="0.92", zorder=0)
    ax.axhline(trivial, color="0.5", linestyle="--", label="above it a bound says nothing")
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="gap")
    ax.set_xticks(np.asarray(x), [f"{value:g}" for value in np.asarray(x)])
    ax.minorticks_off()
    ax.margins(y=0.02)
    ax.grid(alpha=0.3)
    return ax


def _vector(column: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(column, np.float64)
    if vector.ndim != 1:
        raise ValueError(f"column has shape {vector.shape}: give one column, (n,)")
    return vector


def _matrix(augmented_kernel: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(augmented_kernel, np.float64)
    if matrix.ndim != 2:
        raise ValueError(
            f"augmented_kernel has shape {matrix.shape}: give a matrix, (d_in + 1, d_out)"
        )
    return matrix


def _limit(weights: NDArray[np.float64]) -> float:
    # A single large weight must not bleach the others, so the scale ends at the 99.5th percentile
    # of what is not zero, and what lies beyond takes the colour of the end.
    nonzero = np.abs(weights[np.isfinite(weights) & (weights != 0)])
    return float(np.percentile(nonzero, 99.5)) if nonzero.size else 1.0


def _pictures(
    augmented_kernel: ArrayLike, shape: tuple[int, int], units: int
) -> NDArray[np.float64]:
    """``(n, height, width)`` weights of the first units."""
    matrix = _matrix(augmented_kernel)
    height, width = shape
    if len(matrix) != 1 + height * width:
        raise ValueError(
            f"shape is {shape}, {height * width} pixels, but augmented_kernel has {len(matrix)} "
            "rows: give height and width of the inputs, whose product is one less"
        )
    return matrix[1:, :units].T.reshape(-1, height, width)


def _draw_pictures(pictures: NDArray[np.float64], across: int, ax: Axes | None) -> Axes:
    """``(n, height, width)`` pictures in a grid, one grey pixel apart, on one colour scale."""
    n, height, width = pictures.shape
    down = -(-n // across)
    cells = np.full((down * across, height + 1, width + 1), np.nan)
    cells[:n, :height, :width] = pictures
    grid = cells.reshape(down, across, height + 1, width + 1).swapaxes(1, 2)
    mosaic = grid.reshape(down * (height + 1), across * (width + 1))[:-1, :-1]
    ax = plt.gca() if ax is None else ax
    limit = _limit(pictures)
    colors = plt.get_cmap(DIVERGING).with_extremes(bad="0.6")
    image = ax.imshow(mosaic, cmap=colors, vmin=-limit, vmax=limit)
    ax.figure.colorbar(image, ax=ax, label="weight", fraction=0.046, pad=0.03, extend="both")
    return ax
