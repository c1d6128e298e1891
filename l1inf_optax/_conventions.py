"""How the libraries name and lay out their layers: from names and shapes to the axes of a column.

Nothing here knows a tree. A convention says under which keys a layer keeps its kernels and its
bias, and reads from what is known of them along which axes a column runs. Where two layouts fit the
shapes and no name tells them apart, the answer is a sentence of doubt: a wrong guess would
constrain the wrong weights and say nothing.
"""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from l1inf_optax._projection.arguments import Axes

AUGMENTED_KERNEL = "augmented_kernel"

Shape = tuple[int, ...]


class Kernel(NamedTuple):
    """What is known of a kernel.

    Attributes:
        shape: Its shape, without the axes that the user has said to be stacked.
        bias: Shape of the bias, without those axes too, or None if there is no bias.
        has_bias_key: Whether there is a place for a bias, if only one that holds None.
        name: Name of the layer: the last key of its path.
        role: Which part of an attention layer it is, or None.
        owner: The object that holds it: a module of Equinox knows its own shapes.
        is_told: Whether the user has said which axes are stacked, if any.
    """

    shape: Shape
    bias: Shape | None
    has_bias_key: bool
    name: str
    role: str | None
    owner: Any
    is_told: bool


# Reduction and output axes; a sentence of doubt; or None for what is no layer.
Verdict = tuple[Axes, Axes] | str | None


class Convention(NamedTuple):
    """Where a library keeps a layer.

    Attributes:
        kernels: Keys of the kernels that flow into the same units; one, but for recurrent cells.
        bias: Key of the bias.
        axes: Function from what is known of the first kernel to its axes.
    """

    kernels: tuple[str, ...]
    bias: str
    axes: Callable[[Kernel], Verdict]


_STACKED = "it may be a stack of layers"
_BARE = "without a bias it may be a convolution, a stack of layers, or neither"
_TRANSPOSED = "it may be a transposed convolution, whose last two axes are the other way round"
_TRANSPOSED_NAME = re.compile(r"trans|de_?conv|(^|_)up", re.IGNORECASE)
_HAIKU_CONVOLUTION = re.compile(r"conv([123])_d(_transpose)?(_\d+)?$")  # named after their classes
_ATTENTION = ("query", "key", "value", "out")


def class_names(x: Any, library: str) -> set[str]:
    """The names of those classes of ``x`` that a library defines, which need not be imported."""
    return {t.__name__ for t in type(x).__mro__ if t.__module__.startswith(f"{library}.")}


def attention_role(path: str, paths: Collection[str]) -> str | None:
    """Which part of an attention layer this is, if its three siblings are there too."""
    parent, slash, name = path.rpartition("/")
    siblings = (f"{parent}{slash}{part}" for part in _ATTENTION)
    return name if name in _ATTENTION and all(sibling in paths for sibling in siblings) else None


def _augmented(kernel: Kernel) -> Verdict:
    """Rows, units."""
    return ((0,), (1,)) if len(kernel.shape) == 2 else _STACKED


def _flax(kernel: Kernel) -> Verdict:
    """Kernel (batch..., reduction..., output...), bias (batch..., output...)."""
    return _bare_units_last(kernel) if kernel.bias is None else _units_last(kernel)


def _haiku(kernel: Kernel) -> Verdict:
    """As Flax, but convolutions have telling names, and transposed ones (window..., out, in)."""
    named = _HAIKU_CONVOLUTION.search(kernel.name)
    if named is None:
        return _flax(kernel)
    rank = len(kernel.shape)
    batch = rank - int(named[1]) - 2
    units = rank - 2 if named[2] else rank - 1
    if batch < 0 or (batch and kernel.is_told):
        return f"by its name it is a convolution over {named[1]} axes"
    if kernel.bias not in (None, (*kernel.shape[:batch], kernel.shape[units])):
        return f"its bias, shape {kernel.bias}, does not fit it"
    return tuple(i for i in range(batch, rank) if i != units), (units,)


def _bare_units_last(kernel: Kernel) -> Verdict:
    """A kernel of Flax or Haiku without bias."""
    rank = len(kernel.shape)
    if rank == 2 and kernel.role is None:
        return (0,), (1,)
    if rank == 3 and kernel.role is not None:  # (in, heads, head_dim), or (heads, head_dim, out)
        return ((0, 1), (2,)) if kernel.role == "out" else ((0,), (1, 2))
    if kernel.is_told and _is_convolution(kernel):
        return tuple(range(rank - 1)), (rank - 1,)
    return _BARE


def _units_last(kernel: Kernel) -> Verdict:
    """A kernel of Flax or Haiku with bias: which of its last axes does the bias index?"""
    shape, bias = kernel.shape, kernel.bias or ()
    rank = len(shape)
    outputs = {None: None, "out": 1}.get(kernel.role, 2)  # queries, keys and values: two
    fits = [
        (len(bias) - n, rank - n)
        for n in range(1, len(bias) + 1)
        if len(bias) < rank and bias == shape[: len(bias) - n] + shape[rank - n :]
        if outputs in (None, n)
    ]
    if len(fits) > 1:
        return f"its bias, shape {bias}, fits it in {len(fits)} ways"
    batch = len(bias) - 1
    could_be_transposed = (
        kernel.role is None
        and rank - batch >= 3
        and bias == (*shape[:batch], shape[-2])
        and not _is_convolution(kernel)
    )
    by_name = _TRANSPOSED_NAME.search(kernel.name) is not None
    if could_be_transposed and not fits and by_name:
        return (*range(batch, rank - 2), rank - 1), (rank - 2,)
    if not fits:
        return f"its bias, shape {bias}, does not fit it"
    if could_be_transposed and (by_name or not kernel.is_told):
        return _TRANSPOSED
    ((first, last),) = fits
    return tuple(range(first, last)), tuple(range(last, rank))


def _is_convolution(kernel: Kernel) -> bool:
    """Whether the name says so, and nothing of a transposed one."""
    return "conv" in kernel.name.lower() and not _TRANSPOSED_NAME.search(kernel.name)


def _equinox(kernel: Kernel) -> Verdict:
    """Weight (batch..., out, reduction...), bias (batch..., out, 1...)."""
    made = _shape_made_by_equinox(kernel.owner)
    shape, bias = kernel.shape, kernel.bias
    if made is not None:
        batch = len(shape) - len(made)
        if not made:
            return None
        if batch and (kernel.is_told or shape[batch:] != made):
            return f"its module says that a layer has the shape {made}"
        return tuple(range(batch + 1, len(shape))), (batch,)
    if not kernel.has_bias_key or bias == shape:
        return None  # an embedding, which has no bias at all, not even None; or a norm
    if bias is None:
        if kernel.is_told and (len(shape) == 2 or _is_convolution(kernel)):
            return tuple(range(1, len(shape))), (0,)
        return f"{_BARE}, such as the scales of stacked norms"
    return _units_first(shape, bias)


def _units_first(shape: Shape, bias: Shape) -> Verdict:
    unit = max((i for i, size in enumerate(bias) if size != 1), default=0)
    if len(bias) != len(shape) - 1 or bias[: unit + 1] != shape[: unit + 1]:
        return f"its bias, shape {bias}, does not fit it"
    if 1 in shape[unit + 1 : len(bias)]:  # a convolution of one channel, or layers of one unit
        return f"its bias, shape {bias}, fits it in two ways"
    return tuple(range(unit + 1, len(shape))), (unit,)


def _equinox_cell(kernel: Kernel) -> Verdict:
    """A recurrent cell: the weights of the input; those of the state have the same axes."""
    if kernel.bias is None and len(kernel.shape) == 2:
        return (1,), (0,)
    return _equinox(kernel._replace(has_bias_key=True))


def _shape_made_by_equinox(owner: Any) -> Shape | None:
    """The shape a module of Equinox gave its weight, () for a norm, or None for other objects."""
    kinds = class_names(owner, "equinox")
    if "Linear" in kinds:
        sizes = (owner.out_features, owner.in_features)
        return tuple(1 if n == "scalar" else n for n in sizes)
    if kinds & {"Conv", "ConvTranspose"}:
        return (owner.out_channels, owner.in_channels // owner.groups, *owner.kernel_size)
    if kinds & {"LSTMCell", "GRUCell"}:
        return (owner.hidden_size * (4 if "LSTMCell" in kinds else 3), owner.input_size)
    norms = {"BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"}
    return () if kinds & norms else None


CONVENTIONS = (
    Convention((AUGMENTED_KERNEL,), "", _augmented),
    Convention(("kernel",), "bias", _flax),
    Convention(("w",), "b", _haiku),
    Convention(("w_i", "w_h"), "b", _haiku),  # Haiku's GRU
    Convention(("weight",), "bias", _equinox),
    Convention(("weight_ih", "weight_hh"), "bias", _equinox_cell),
)
