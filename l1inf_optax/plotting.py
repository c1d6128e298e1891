"""Pictures of weights inside the L1,inf ball, and of what the ball's radius does to a network.

The only public module that imports matplotlib: ``pip install "l1inf-optax[experiments]"``.

Every function draws into axes that are given, or into the current ones, and returns them, so that a
figure can be put together from several. Colours are those of Okabe and Ito and a diverging map
centred on zero: both can be told apart by readers with any common colour vision.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
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
    matrix = _matrix(augmented_kernel)
    height, width = shape
    if len(matrix) != 1 + height * width:
        raise ValueError(
            f"shape is {shape}, {height * width} pixels, but augmented_kernel has {len(matrix)} "
            "rows: give height and width of the inputs, whose product is one less"
        )
    pictures = matrix[1:, :units].T.reshape(-1, height, width)
    limit = _limit(pictures)
    ax = plt.gca() if ax is None else ax
    colors = plt.get_cmap(DIVERGING).with_extremes(bad="0.6")
    image = ax.imshow(_mosaic(pictures), cmap=colors, vmin=-limit, vmax=limit)
    ax.set(xticks=[], yticks=[])
    ax.figure.colorbar(image, ax=ax, label="weight", fraction=0.046, pad=0.03, extend="both")
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


def _mosaic(pictures: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(n, height, width)`` pictures in a near-square grid, one blank (NaN) pixel apart."""
    n, height, width = pictures.shape
    across = int(np.ceil(np.sqrt(n)))
    down = -(-n // across)
    cells = np.full((down * across, height + 1, width + 1), np.nan)
    cells[:n, :height, :width] = pictures
    grid = cells.reshape(down, across, height + 1, width + 1).swapaxes(1, 2)
    return grid.reshape(down * (height + 1), across * (width + 1))[:-1, :-1]
