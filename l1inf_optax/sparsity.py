"""What the ball has done to a network: zeros, norms and units, layer by layer."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from l1inf_optax import _layers
from l1inf_optax._layers import Layer, Layers, radius_at
from l1inf_optax._projection.arguments import check_radius
from l1inf_optax._transform import as_schedules, balls_of, last_steps

# A projected column ends within a few units of its dtype's last place below c; this much is shared
# by float32 and the 16-bit formats.
ON_BOUNDARY = {2: 2.0**-6, 4: 1e-5, 8: 1e-10}


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """Counts for one layer, bias included, or for several together.

    Attributes:
        path: The layer's name, its keys joined by ``/``.
        shape: Shape of the augmented matrix, (1 + inputs, units), after batch axes; None in a
            total.
        entries: Number of weights and biases.
        zeros: How many of them are exactly zero.
        below_threshold: How many are smaller in magnitude than the threshold, zeros included, or
            None if no threshold was given.
        largest_norm: The L1,inf norm.
        columns: Number of units.
        columns_on_boundary: How many of them have a norm of c, to rounding; None if no c was given.
        empty_columns: How many of them have neither bias nor weights: units that are constant 0.
        inputs: Number of rows below the bias. A convolution has one for each place and channel of
            its window, a stack of layers those of all its members.
        unused_inputs: How many of them no unit looks at.
        used: Boolean, (inputs,), after batch axes: which inputs a unit looks at; None in a total.
    """

    path: str
    shape: tuple[int, ...] | None
    entries: int
    zeros: int
    below_threshold: int | None
    largest_norm: float
    columns: int
    columns_on_boundary: int | None
    empty_columns: int
    inputs: int
    unused_inputs: int
    used: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def sparsity(self) -> float:
        """Percentage of entries that are exactly zero."""
        return 100 * self.zeros / max(self.entries, 1)

    def to_dict(self) -> dict[str, Any]:
        """Its attributes but ``used``, and `sparsity`: what JSON, loggers and data frames take."""
        fields = (field.name for field in dataclasses.fields(self) if field.name != "used")
        return {name: getattr(self, name) for name in fields} | {"sparsity": self.sparsity}


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """Counts for every layer; prints as an aligned table and renders as HTML in Jupyter.

    Attributes:
        layers: One entry for each layer.
        threshold: The threshold of ``below_threshold``, or None.
    """

    layers: tuple[LayerSparsity, ...]
    threshold: float | None = None

    @property
    def total(self) -> LayerSparsity:
        """All layers together. Counts are added; of norms the largest is taken."""

        def added(name: str) -> int | None:
            counts = [getattr(layer, name) for layer in self.layers]
            return None if None in counts else sum(counts)

        counts: dict[str, Any] = {
            field.name: added(field.name)
            for field in dataclasses.fields(LayerSparsity)
            if field.name not in ("path", "shape", "largest_norm", "used")
        }
        norm = max((layer.largest_norm for layer in self.layers), default=0.0)
        return LayerSparsity("total", None, largest_norm=norm, **counts)

    def used_inputs(self, layer: str, names: Sequence[str] | None = None) -> Any:
        """The inputs that a layer looks at; `unused_inputs` are the others.

        Args:
            layer: Its path, or the end of it: ``"hidden_0"`` for ``"params/hidden_0"``.
            names: Names of the inputs, such as the columns of a data frame, or None.

        Returns:
            Their indices, int64, (k,), ascending, or a list of their names. Of a stack of layers,
            (k, n + 1), the indices along n batch axes first.

        Raises:
            ValueError: No layer, or more than one, has this path; there is not a name for each
                input.

        Example:
            >>> import jax.numpy as jnp, l1inf_optax as l1inf
            >>> V = jnp.array([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
            >>> report = l1inf.sparsity_report({"hidden": {"augmented_kernel": V}})
            >>> report.used_inputs("hidden")
            array([0, 2])
            >>> report.used_inputs("hidden", ["age", "height", "weight"])
            ['age', 'weight']
            >>> report.unused_inputs("hidden", ["age", "height", "weight"])
            ['height']
        """
        return _named_indices(self._layer(layer), names, used=True)

    def unused_inputs(self, layer: str, names: Sequence[str] | None = None) -> Any:
        """The inputs that a layer does not look at, as :meth:`used_inputs` gives the others."""
        return _named_indices(self._layer(layer), names, used=False)

    def _layer(self, path: str) -> LayerSparsity:
        exact = [layer for layer in self.layers if layer.path == path]
        found = exact or [x for x in self.layers if f"/{x.path}".endswith(f"/{path}")]
        if len(found) != 1:
            paths = ", ".join(layer.path or "(root)" for layer in self.layers)
            raise ValueError(
                f"layer={path!r} is the path of {len(found)} layers: name one of {paths}"
            )
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers: ``"layers"``, a list of rows for a data frame, and ``"total"``.

        Example:
            >>> import jax.numpy as jnp, l1inf_optax as l1inf
            >>> report = l1inf.sparsity_report({"hidden": {"augmented_kernel": jnp.eye(3)}})
            >>> report.to_dict()["total"]["zeros"], report.to_dict()["layers"][0]["path"]
            (6, 'hidden')
        """
        rows = [layer.to_dict() for layer in self.layers]
        return {"layers": rows, "total": self.total.to_dict(), "threshold": self.threshold}

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def _repr_html_(self) -> str:
        head, *layers, total = self._rows()
        # Lines in the colour of the text: they show on a light and on a dark page.
        line = "1px solid currentColor"
        table = "border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap"

        def row(cells: list[str], tag: str, style: str = "") -> str:
            align = ["left", "left"] + ["right"] * (len(cells) - 2)
            return "".join(
                f'<{tag} style="text-align: {side}; padding: 0.3em 0.7em; {style}">'
                f"{html.escape(cell)}</{tag}>"
                for cell, side in zip(cells, align, strict=True)
            )

        return (
            '<div style="overflow-x: auto">'
            f'<table style="{table}">'
            f"<thead><tr>{row(head, 'th', f'border-bottom: {line}')}</tr></thead><tbody>"
            + "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in layers)
            + f"</tbody><tfoot><tr>{row(total, 'th', f'border-top: {line}')}</tr></tfoot>"
            "</table></div>"
        )

    def _rows(self) -> list[list[str]]:
        """Header, a row for each layer, the total."""

        def share(part: int, whole: int) -> str:
            return f"{100 * part / max(whole, 1):.2f}%"

        total = self.total
        below = [] if self.threshold is None else [f"below {self.threshold:g}"]
        boundary = [] if total.columns_on_boundary is None else ["on boundary"]
        counts = ["largest norm", *boundary, "empty columns", "unused inputs"]
        rows = [["layer", "shape", "zeros", *below, *counts]]
        for layer in (*self.layers, total):
            row = [
                layer.path or "(root)",
                " x ".join(map(str, layer.shape or ())),
                share(layer.zeros, layer.entries),
                *(share(layer.below_threshold or 0, layer.entries) for _ in below),
                f"{layer.largest_norm:.6g}",
                *(f"{layer.columns_on_boundary} / {layer.columns}" for _ in boundary),
                f"{layer.empty_columns} / {layer.columns}",
                f"{layer.unused_inputs} / {layer.inputs}",
            ]
            rows.append(row)
        return rows


def _named_indices(layer: LayerSparsity, names: Sequence[str] | None, *, used: bool) -> Any:
    mask = np.asarray(layer.used) == used
    indices = np.argwhere(mask) if mask.ndim > 1 else np.flatnonzero(mask)
    if names is None:
        return indices
    if len(names) != mask.shape[-1]:
        raise ValueError(
            f"names has {len(names)} entries, but {layer.path!r} has {mask.shape[-1]} inputs: give "
            "one for each"
        )
    plain = np.asarray(names, object).tolist()  # a data frame's names are an array
    return [plain[i] for i in (indices if mask.ndim == 1 else indices[:, -1])]


def sparsity_report(
    params: Any,
    *,
    c: Any = None,
    layers: Layers = None,
    threshold: float | None = None,
    state: Any = None,
) -> SparsityReport:
    """Counts zeros, norms, boundary columns, empty columns and unused inputs of every layer.

    Args:
        params: Pytree of parameters, or a module that is one.
        c: The radius, as in :func:`keep_params_in_l1inf_ball`: then only the layers it constrains
            are reported. ``None`` reports every layer, and says of none what is on a boundary.
        layers: As in :func:`keep_params_in_l1inf_ball`. Row 0 of an ``augmented_kernel`` is taken
            for its bias; say with dimension numbers that a layer has none.
        threshold: Magnitude below which an entry is counted in a column of its own. The paper
            appears to count entries below 1e-3 as zeros.
        state: The optimizer's state that belongs to ``params``. A schedule for ``c`` is read where
            the last update read it; without a state, at step 0.

    Returns:
        The report.

    Raises:
        ValueError: as :func:`keep_params_in_l1inf_ball`; nothing in ``state`` keeps parameters in a
            ball.

    Example:
        >>> import jax.numpy as jnp, l1inf_optax as l1inf
        >>> V = jnp.array([[0.0, 0.0, 0.5], [1.0, 0.0, 0.25], [0.0, 0.0, 0.0]])
        >>> print(l1inf.sparsity_report({"hidden": {"augmented_kernel": V}}, c=1.0))
        layer   shape   zeros  largest norm  on boundary  empty columns  unused inputs
        ------------------------------------------------------------------------------
        hidden  3 x 3  66.67%             1        1 / 3          1 / 3          1 / 2
        ------------------------------------------------------------------------------
        total          66.67%             1        1 / 3          1 / 3          1 / 2
    """
    balls = [] if state is None else balls_of(state)
    leaves, _ = _layers.flatten(params)
    if c is None:
        found: list[tuple[Layer, Any]] = [
            (layer, None) for layer in _layers.find_layers(params, layers)
        ]
        for layer, _ in found:
            _layers.check_usable(layer, leaves)
    else:
        _layers.check_radii(c)
        found = as_schedules(_layers.constrained_layers(params, c, layers), params, balls)
    steps = last_steps(balls)
    counts = (
        _count(layer, leaves, radius_at(radius, steps.get(layer.leaf_path, 0)), threshold)
        for layer, radius in found
    )
    return SparsityReport(tuple(counts), threshold)


def _count(layer: Layer, leaves: list[Any], c: Any, threshold: float | None) -> LayerSparsity:
    pieces = [np.abs(np.asarray(x, np.float64)) for x in layer.columns(leaves)]
    kernel = pieces[-1]
    itemsize = np.asarray(leaves[layer.kernels[0]]).dtype.itemsize
    batch = layer.batch_axes
    order = (*batch, *layer.reduction_axes, *layer.output_axes)
    batch_shape = tuple(kernel.shape[i] for i in batch)
    units = int(np.prod([kernel.shape[i] for i in layer.output_axes]))

    def matrix(x: np.ndarray) -> np.ndarray:
        """As (batch..., rows, units)."""
        rows = int(np.prod([x.shape[i] for i in layer.reduction_axes]))
        return x.transpose(order).reshape(*batch_shape, rows, units)

    v = np.concatenate([matrix(x) for x in pieces], axis=-2)
    weights = v[..., int(layer.has_bias_row or layer.bias is not None) :, :]
    used = (weights != 0).any(-1)
    # The axes that are left keep the kernel's order, in which c is given.
    norms = sum(x.sum(layer.reduction_axes) for x in pieces)
    on_boundary = None
    if c is not None:
        check_radius(c, layer.columns_shape)
        least = np.asarray(c, np.float64) * (1 - ON_BOUNDARY[itemsize])
        on_boundary = int(((norms >= least) & (norms > 0)).sum())
    return LayerSparsity(
        path=layer.path,
        shape=v.shape,
        entries=v.size,
        zeros=int((v == 0).sum()),
        below_threshold=None if threshold is None else int((v < threshold).sum()),
        largest_norm=float(norms.max(initial=0)),
        columns=norms.size,
        columns_on_boundary=on_boundary,
        empty_columns=int((norms == 0).sum()),
        inputs=int(np.prod(weights.shape[:-1])),
        unused_inputs=int((~used).sum()),
        used=used,
    )
