"""The figure that the paper draws three times."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from l1inf_optax import plotting


def trials_figure(
    radii: Sequence[float],
    measured: Mapping[str, np.ndarray],
    *,
    error: str,
    zeros: str = "exact zeros (%)",
    scale: str = "log",
) -> Figure:
    """Generalization error and sparsity over the trials, for every c (Figures 1, 2 and 4).

    Args:
        radii: the values of c.
        measured: name to values of all trials, in their order, of each the values of c.
        error: what the generalization error is measured in.
        zeros: label of the sparsity.
        scale: of the generalization error's axis.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    gaps, sparsity = (
        np.reshape(measured[name], (-1, len(radii)))
        for name in ("generalization_error", "sparsity")
    )
    plotting.plot_trials(radii, gaps, left, label=f"generalization error ({error})")
    left.set_yscale(scale)
    plotting.plot_trials(radii, sparsity, right, label=zeros)
    return figure
