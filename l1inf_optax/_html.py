"""How a layer shows itself in a notebook: its sparsity report, and its weights as a picture."""

import base64
import html
import io
from typing import Any

import jax
import numpy as np

from l1inf_optax._layers import LayerDimensionNumbers
from l1inf_optax.sparsity import sparsity_report

_SHOWN = 128  # rows and units of a picture, at most


def module_html(name: str, params: Any, *, use_bias: bool) -> str | None:
    """A module's name, the report of its layers, and a picture if it is a single one.

    Args:
        name: of the module's class.
        params: its parameters: an ``augmented_kernel``, or a tree of layers.
        use_bias: whether the layers have biases, the matrices' row 0.

    Returns:
        HTML; None, for which Jupyter takes the text, if the parameters have no values, or are
        stacks of layers: along which axis, shapes do not tell.
    """
    arrays = jax.tree.leaves(params)
    if not arrays or not all(isinstance(x, jax.Array | np.ndarray) for x in arrays):
        return None
    if any(x.ndim > 2 for x in arrays):
        return None
    layers = None if use_bias else jax.tree.map(_without_bias, params)
    report = sparsity_report(params, layers=layers)._repr_html_()
    title = f"<code>{html.escape(name)}</code>, {arrays[0].dtype}"
    picture = _picture(arrays[0], use_bias) if len(arrays) == 1 and arrays[0].ndim == 2 else ""
    return f"<div>{title}{report}{picture}</div>"


def _without_bias(array: Any) -> LayerDimensionNumbers | None:
    return LayerDimensionNumbers(-2, -1) if array.ndim > 1 else None


def _picture(matrix: Any, use_bias: bool) -> str:
    """The first rows and units as an image; nothing without matplotlib."""
    try:
        from l1inf_optax import plotting
    except ImportError:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), layout="constrained")
    ax = plotting.plot_weight_matrix(matrix[:_SHOWN], figure.subplots(), columns=_SHOWN)
    if not use_bias:
        ax.set_ylabel("input")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="heat map of the weights" src="data:image/png;base64,{data}">'
