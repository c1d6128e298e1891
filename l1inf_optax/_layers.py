"""Pytrees: which leaves make one augmented matrix, and along which axes its columns run.

Nothing here knows an optimizer. A layer is a kernel, or all that flow into the same units, and
where there is one their bias. Leaves are found by the names their libraries give them; anything
else is said with dimension numbers.
"""

import collections
import fnmatch
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import tree_util
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from l1inf_optax._conventions import (
    AUGMENTED_KERNEL,
    CONVENTIONS,
    Convention,
    Kernel,
    Shape,
    attention_role,
    class_names,
)
from l1inf_optax._projection.arguments import (
    Arrays,
    Axes,
    brief,
    check_floating,
    check_radius,
    normalise_axes,
)
from l1inf_optax._projection.floats import wide_dtype
from l1inf_optax._pruning import Prune
from l1inf_optax._schedules import Shrink

_LISTED = 40  # names that a message lists

Radius = Any  # a number, an array, an optax schedule, a Shrink or a Prune
Radii = Radius | Mapping[str, Radius | None]


class LayerDimensionNumbers(NamedTuple):
    """Says how a leaf of any shape is a matrix of columns, after optax's `MuonDimensionNumbers`.

    Axes that are neither reduced nor output are a batch of independent matrices, as in stacked or
    vmapped layers. An :class:`optax.contrib.MuonDimensionNumbers` can be used in its place.

    With ``stack_axis`` alone the other axes are those that the layer's library gives it: one line
    describes a whole model of scanned or vmapped layers, whatever they are.

    Attributes:
        reduction_axis: The axis or axes a column runs along: those summed over by the layer. 0 if
            ``output_axis`` or nothing at all is given.
        output_axis: The axis or axes that index the layer's units. 1 if ``reduction_axis`` or
            nothing at all is given.
        bias: The last key of the leaf beside this one that holds the bias, or None. Its shape is
            that of the kernel without the reduction axes.
        stack_axis: The axis or axes along which the kernel, and its bias too, are stacks of
            layers: 0 for `equinox.filter_vmap` and Haiku's `layer_stack`, that of
            ``variable_axes`` in Flax; ``()`` to say that there is none. None if it is not said.

    Example:
        A projection stored as (heads, head_dim, d_model), its bias beside it as (d_model,):

        >>> import jax.numpy as jnp, l1inf_optax as l1inf
        >>> params = {"proj": {"w_out": jnp.ones((2, 3, 4)), "b_out": jnp.ones(4)}}
        >>> layers = {"*/w_out": l1inf.LayerDimensionNumbers((0, 1), 2, bias="b_out")}
        >>> l1inf.project_params(params, 3.5, layers=layers)["proj"]["b_out"].round(6)
        Array([0.5, 0.5, 0.5, 0.5], dtype=float32)

        Five layers of 3 inputs and 2 units, scanned over axis 1:

        >>> params = {"dense": {"kernel": jnp.ones((3, 5, 2)), "bias": jnp.ones((2, 5))}}
        >>> layers = {"*": l1inf.LayerDimensionNumbers(stack_axis=1)}
        >>> l1inf.project_params(params, 2.0, layers=layers)["dense"]["bias"].shape
        (2, 5)
    """

    reduction_axis: int | Sequence[int] | None = None
    output_axis: int | Sequence[int] | None = None
    bias: str | None = None
    stack_axis: int | Sequence[int] | None = None


Layers = (
    None
    | Mapping[str, LayerDimensionNumbers | None]
    | Callable[[Any], Any]  # from the parameters to either of the others
    | Any  # a pytree of dimension numbers and None, with the structure of the parameters
)


class Layer(NamedTuple):
    """One augmented matrix, or a batch of them, and where its pieces are.

    Attributes:
        path: The layer's name, its keys joined by ``/``.
        kernels: Indices among the tree's leaves of the kernels that flow into the same units: one,
            but for recurrent cells. They agree in every axis but ``reduction_axes``.
        bias: Index of the bias, or None.
        shape: Shape of the first kernel.
        reduction_axes: The axes a column runs along.
        output_axes: The axes that index units.
        doubt: Why the axes could not be told, or None. They are empty then.
        leaf_path: The first kernel's own path.
        has_bias_row: Whether row 0 of the kernel is the bias.
        stack_axes: The axes of the kernel that the bias has elsewhere, in ``bias_stack_axes``.
        bias_stack_axes: Where the bias has them.
    """

    path: str
    kernels: tuple[int, ...]
    bias: int | None
    shape: tuple[int, ...]
    reduction_axes: Axes
    output_axes: Axes
    doubt: str | None
    leaf_path: str
    has_bias_row: bool = False
    stack_axes: Axes = ()
    bias_stack_axes: Axes = ()

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of all its leaves: the bias first, if there is one."""
        return self.kernels if self.bias is None else (self.bias, *self.kernels)

    def columns(self, leaves: Sequence[Any]) -> Arrays:
        """Its leaves as arrays that agree in every axis but ``reduction_axes``; the bias first."""
        if any(_is_empty(leaves[i]) for i in self.leaves):
            raise ValueError(f"the layer {self.path!r} has no array: give updates for all of it")
        kernels = tuple(jnp.asarray(leaves[i]) for i in self.kernels)
        if self.bias is None:
            return kernels
        stack, places = self._stack
        bias = jnp.moveaxis(jnp.asarray(leaves[self.bias]), self.bias_stack_axes, range(len(stack)))
        units = tuple(n for i, n in enumerate(self.columns_shape) if i not in places)
        bias = jnp.moveaxis(bias.reshape(stack + units), range(len(stack)), places)
        return jnp.expand_dims(bias, self.reduction_axes), *kernels

    def put(self, columns: Arrays, leaves: list[Any]) -> None:
        """Stores what :meth:`columns` gave, in the leaves' own shapes."""
        for i, kernel in zip(self.kernels, columns[-len(self.kernels) :], strict=True):
            leaves[i] = kernel
        if self.bias is not None:
            stack, places = self._stack
            bias = jnp.moveaxis(columns[0].reshape(self.columns_shape), places, range(len(stack)))
            shape = jnp.shape(leaves[self.bias])
            units = tuple(n for i, n in enumerate(shape) if i not in self.bias_stack_axes)
            bias = bias.reshape(stack + units)
            leaves[self.bias] = jnp.moveaxis(bias, range(len(stack)), self.bias_stack_axes)

    @property
    def _stack(self) -> tuple[Shape, Axes]:
        """Sizes of the stacked axes, and their places among the axes of `columns_shape`."""
        sizes = tuple(self.shape[i] for i in self.stack_axes)
        lower = [sum(k < i for k in self.reduction_axes) for i in self.stack_axes]
        return sizes, tuple(i - n for i, n in zip(self.stack_axes, lower, strict=True))

    @property
    def columns_shape(self) -> tuple[int, ...]:
        """The kernel's shape without the axes a column runs along."""
        return tuple(self.shape[i] for i in self.column_axes)

    @property
    def column_axes(self) -> Axes:
        """The axes of the kernel that a column does not run along: those of `columns_shape`."""
        return tuple(i for i in range(len(self.shape)) if i not in self.reduction_axes)

    @property
    def batch_axes(self) -> Axes:
        """The axes of the kernel along which independent matrices are stacked."""
        return tuple(i for i in self.column_axes if i not in self.output_axes)

    @property
    def matrices_shape(self) -> tuple[int, ...]:
        """That of one number for each matrix of the batch; it broadcasts with columns."""
        sizes = tuple(self.shape[i] if i in self.batch_axes else 1 for i in self.column_axes)
        return sizes if self.batch_axes else ()

    def norm(self, leaves: Sequence[Any]) -> jax.Array:
        """The L1,inf norm of each matrix of the batch, in float32 and to its rounding."""
        sums = [
            jnp.sum(jnp.abs(x.astype(jnp.float32)), self.reduction_axes)
            for x in self.columns(leaves)
        ]
        norms = functools.reduce(jnp.add, sums)
        # What is not finite stays in its own column.
        return self.of_each_matrix(jnp.max, jnp.where(jnp.isfinite(norms), norms, 0))

    def for_columns(self, x: jax.Array) -> jax.Array:
        """What there is for each matrix of the batch, for each column; a scalar remains one."""
        return jnp.broadcast_to(x, self.columns_shape) if self.batch_axes else x

    def for_entries(self, x: jax.Array) -> jax.Array:
        """The same in a shape that broadcasts with :meth:`columns`."""
        return jnp.expand_dims(x, self.reduction_axes) if self.batch_axes else x

    def zero_weights(self, columns: Arrays) -> Arrays:
        """Where in what :meth:`columns` gives a weight is zero; a bias is no weight."""
        return self.of_weights(tuple(x == 0 for x in columns))

    def of_weights(self, masks: Arrays) -> Arrays:
        """Masks in the shapes of what :meth:`columns` gives, False at biases."""
        first, *others = masks
        if self.bias is not None:
            first = jnp.zeros_like(first)
        elif self.has_bias_row:
            row = jax.lax.broadcasted_iota(jnp.int32, first.shape, self.reduction_axes[0])
            first &= row > 0
        return first, *others

    def weights_of_a_unit(self, kernels: Sequence[Any]) -> int:
        """How many weights flow into a unit, given the kernels or their shapes."""
        rows = sum(math.prod(kernel.shape[i] for i in self.reduction_axes) for kernel in kernels)
        return rows - self.has_bias_row

    def share_of_zeros(self, zero_weights: Arrays) -> jax.Array:
        """What share of the weights of each matrix of the batch :meth:`zero_weights` marks."""
        counts = [jnp.sum(mask, self.reduction_axes) for mask in zero_weights]
        rows = self.weights_of_a_unit(zero_weights[-len(self.kernels) :])
        share = functools.reduce(jnp.add, counts) / rows
        return self.of_each_matrix(jnp.mean, share)

    def of_each_matrix(self, reduce: Callable[..., jax.Array], columns: jax.Array) -> jax.Array:
        """One number for all columns of each matrix, in `matrices_shape`."""
        if not self.batch_axes:
            return reduce(columns)
        return reduce(columns, tuple(map(self.column_axes.index, self.output_axes)), keepdims=True)

    def zeros(self, leaves: Sequence[Any]) -> jax.Array:
        """A zero for each column, float32 or, where the layer is, float64; sharded like columns."""
        return jnp.zeros(
            self.columns_shape,
            wide_dtype(*(leaves[i].dtype for i in self.leaves)),
            device=_sharding_along(leaves[self.kernels[0]], self.column_axes),
        )


def _sharding_along(x: Any, axes: Sequence[int]) -> NamedSharding | None:
    """The part of an array's sharding that concerns some of its axes, where that is known."""
    known = jax.typeof(x) if isinstance(x, jax.core.Tracer) else x
    sharding = getattr(known, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec):
        return None
    spec = (*sharding.spec, *(None,) * (jnp.ndim(x) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[i] for i in axes)))


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure, places that hold no array counting as leaves."""
    return tree_util.tree_flatten(tree, is_leaf=_is_empty)


def _is_empty(x: Any) -> bool:
    """Whether a leaf was filtered out: None, or what `optax.masked` and `optax.partition` put."""
    return x is None or isinstance(x, optax.MaskedNode)


def constrained_layers(params: Any, c: Radii, layers: Layers = None) -> list[tuple[Layer, Radius]]:
    """The layers that ``c`` constrains, each with its radius.

    Args:
        params: The parameters, or their shapes.
        c: One radius for every layer, or a mapping from globs over the layers' paths.
        layers: As in :func:`find_layers`.

    Returns:
        Pairs of a layer and its radius, a number or a schedule; at least one.

    Raises:
        ValueError: No layer is found or constrained, a pattern matches none or comes too late to,
            a layer's axes are in doubt, or its parameters are no floating-point numbers.
    """
    leaves, _ = flatten(params)
    found = find_layers(params, layers)
    if not found:
        check_params(params)
        raise ValueError(
            f"layers={brief(layers)} finds nothing to constrain. The leaves are: "
            f"{_listing(path for path, _ in named_leaves(params))}. Say which of them are "
            "kernels with layers={glob: LayerDimensionNumbers(...)}"
        )
    radii: list[Radius | None] = [c] * len(found)
    if isinstance(c, Mapping):
        _check_constrainable(c, found, params)
        winners = _first_matches("c", c, [(layer.path, layer.leaf_path) for layer in found])
        radii = [None if winner is None else c[winner] for winner in winners]
    chosen = [
        (layer, radius) for layer, radius in zip(found, radii, strict=True) if radius is not None
    ]
    if not chosen:
        raise ValueError(
            f"c={brief(c)} constrains nothing: give a radius to at least one of the layers, "
            f"{_listing(layer.path for layer in found)}"
        )
    for layer, _ in chosen:
        check_usable(layer, leaves)
    return chosen


def check_params(params: Any) -> None:
    """Raises a ValueError if there is no array in ``params``, or if they are a whole optimizer."""
    if hasattr(params, "tx") and hasattr(params, "opt_state") and not hasattr(params, "params"):
        raise ValueError(
            f"params is a {type(params).__name__}, which holds an optimizer's state: give the "
            "parameters alone, such as nnx.state(model, nnx.Param)"
        )
    leaves = tree_util.tree_leaves(params)
    if not leaves:
        raise ValueError(
            f"params={brief(params)} holds no arrays: give the parameters themselves, such as a "
            "Linen module's init(key, x) returns"
        )
    if not any(hasattr(leaf, "shape") for leaf in leaves):
        raise ValueError(
            f"params is a {type(params).__name__}, not a pytree of arrays: give the parameters "
            "themselves, such as a Linen module's init(key, x) returns, and c after them"
        )


def in_no_layer(params: Any, found: Sequence[Layer]) -> list[str]:
    """Paths of leaves that could hold weights, but are in no layer that was found.

    These are arrays of two axes or more, such as embeddings; whatever stands in the place of a
    kernel, such as a sparse matrix; and a bias that is alone, such as one whose kernel is shared.
    """
    leaves = list(_walk(params))
    beside = collections.Counter(leaf.keys[:-1] for leaf in leaves if leaf.shape is not None)

    def could_hold_weights(leaf: _Leaf) -> bool:
        if not jnp.issubdtype(getattr(leaf.value, "dtype", object), jnp.floating):
            return False
        is_lone_bias = leaf.keys[-1:] in [("bias",), ("b",)] and beside[leaf.keys[:-1]] == 1
        is_part_of_a_kernel = any(key in ("kernel", "w", "weight") for key in leaf.keys[:-1])
        return len(leaf.shape or ()) > 1 or is_lone_bias or is_part_of_a_kernel

    return [leaf.path for leaf in _not_in(found, leaves) if could_hold_weights(leaf)]


def _check_constrainable(c: Mapping[str, Any], found: list[Layer], params: Any) -> None:
    """Raises a ValueError if a pattern names leaves that are there, but in no layer."""
    names = [name for layer in found for name in (layer.path, layer.leaf_path)]
    for pattern in c:
        if any(_matches(pattern, name) for name in names):
            continue
        alone = [leaf.path for leaf in _not_in(found, list(_walk(params)))]
        named = [
            x for x in alone if _matches(pattern, x) or _matches(pattern, x.rpartition("/")[0])
        ]
        if named:
            raise ValueError(
                f"c has the pattern {pattern!r}, which names {_listing(named)}: not the "
                "weights of a dense layer or convolution, but for instance an embedding or a "
                "normalization's scale, which are left alone. Take the pattern out, or say with "
                "layers={glob: LayerDimensionNumbers(...)} what a column is"
            )


def check_usable(layer: Layer, leaves: Sequence[Any]) -> None:
    """Raises a ValueError if the layer's axes are guesswork, or its numbers have no norm here."""
    if layer.doubt is not None:
        raise ValueError(layer.doubt)
    for i in layer.leaves:
        check_floating(leaves[i].dtype, f"params at {layer.path or '(root)'!r}")


def radii(c: Radii) -> list[Radius | None]:
    """All radii in ``c``, whether or not it is a mapping."""
    return list(c.values()) if isinstance(c, Mapping) else [c]


def check_radii(c: Radii) -> None:
    """Raises a ValueError if a radius that is known now is not a positive number."""
    if hasattr(c, "init") and hasattr(c, "update"):
        raise ValueError(
            "c is an optimizer, not a radius: say constrain(optimizer, c) or, for SGD and "
            "momentum, optax.chain(optimizer, keep_params_in_l1inf_ball(c))"
        )
    for glob, radius in c.items() if isinstance(c, Mapping) else (("", c),):
        if isinstance(radius, Mapping):
            raise ValueError(
                f"c holds a {type(radius).__name__} at {glob!r}: c is no tree, but a flat mapping "
                "from globs over the layers' paths to numbers, as in {'params/hidden_0': 1.0}. "
                "If these are the parameters, they stand before c"
            )
        if isinstance(radius, list | tuple):
            raise ValueError(
                f"c={brief(radius)} is a {type(radius).__name__}: give a number, or a mapping with "
                "one for each layer, as in {'hidden_0': 1.0, 'hidden_1': 2.0}"
            )
        if not (radius is None or callable(radius) or isinstance(radius, Shrink | Prune)):
            check_radius(radius)


def radius_at(radius: Radius, step: ArrayLike) -> ArrayLike:
    """A radius after so many updates, which schedules read as the int32 they meet in training."""
    if isinstance(radius, Prune):
        radius = radius.c
    return radius(jnp.asarray(step, jnp.int32)) if callable(radius) else radius


def find_layers(params: Any, layers: Layers = None) -> list[Layer]:
    """The augmented matrices in ``params``.

    Args:
        params: The parameters, or their shapes.
        layers: ``None`` to find them by name: an ``augmented_kernel``; Flax's ``kernel`` and
            ``bias``; Haiku's ``w`` and ``b``; Equinox's ``weight`` and ``bias``. Otherwise all of
            them, as a mapping from globs over the leaves' paths to dimension numbers or None, as a
            pytree of these with the structure of ``params``, or as a function from ``params`` to
            either.

    Returns:
        The layers, in the order of the tree's leaves.

    Raises:
        ValueError: A pattern matches no leaf, axes are out of range, a bias does not fit, or two
            leaves have one path.
    """
    leaves = list(_walk(params))
    _check_unique([leaf.path for leaf in leaves])
    if layers is None:
        return list(_by_name(leaves))
    if tree_util.treedef_is_leaf(tree_util.tree_structure(layers)) and callable(layers):
        layers = layers(params)
    return sorted(_as_told(leaves, layers), key=lambda layer: layer.kernels)


# --- trees of other structures --------------------------------------------------------------------


def trainable(params: Any) -> Any:
    """The parameters an optimizer can step in: without a module's functions, keys and counters."""

    def is_floating(x: Any) -> bool:
        return isinstance(x, float) or jnp.issubdtype(getattr(x, "dtype", object), jnp.inexact)

    leaves, structure = flatten(params)
    kept = [x if _is_empty(x) or is_floating(x) else None for x in leaves]
    return tree_util.tree_unflatten(structure, kept)


def unboxed(tree: Any) -> Any:
    """The tree, bare arrays in place of the variables in which NNX keeps them."""

    def is_variable(x: Any) -> bool:
        return "Variable" in class_names(x, "flax.nnx")

    leaves, structure = tree_util.tree_flatten(tree, is_leaf=is_variable)
    bare = [tree_util.tree_leaves(x)[0] if is_variable(x) else x for x in leaves]
    return tree_util.tree_unflatten(structure, bare)


def in_structure_of(like: Any, params: Any) -> Any:
    """The parameters that ``like`` has leaves for, such as gradients, in its structure.

    Raises:
        ValueError: ``like`` has a leaf that ``params`` has not.
    """
    source, wanted = dict(named_leaves(params)), named_leaves(like)
    for path, leaf in wanted:
        if not _is_empty(leaf) and _shape(source.get(path)) != _shape(leaf):
            raise ValueError(
                f"grads has a leaf of shape {_shape(leaf)} at {path!r}, where params has shape "
                f"{_shape(source.get(path))}: give gradients of these parameters"
            )
    leaves = [leaf if _is_empty(leaf) else source[path] for path, leaf in wanted]
    return tree_util.tree_unflatten(flatten(like)[1], leaves)


# --- paths ----------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    """A leaf of a tree.

    Attributes:
        keys: The keys that lead to it, but for those of boxes.
        value: The leaf itself.
        owner: The object that holds it.
    """

    keys: tuple[str, ...]
    value: Any
    owner: Any

    @property
    def path(self) -> str:
        """The keys, joined by ``/``."""
        return "/".join(self.keys)

    @property
    def shape(self) -> Shape | None:
        """The leaf's shape, or None if it holds no array."""
        return _shape(self.value)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths, keys joined by ``/``, in the order of :func:`flatten`."""
    return [(leaf.path, leaf.value) for leaf in _walk(tree)]


def _not_in(found: Sequence[Layer], leaves: list[_Leaf]) -> list[_Leaf]:
    taken = {i for layer in found for i in layer.leaves}
    return [leaf for i, leaf in enumerate(leaves) if i not in taken]


def _check_unique(paths: list[str]) -> None:
    for path, again in itertools.pairwise(sorted(paths)):
        if path == again:
            raise ValueError(
                f"params has two leaves with the path {path!r}, as keys may hold '/' themselves: "
                "rename one of them, or no pattern could tell them apart"
            )


def nested(tree: Any, by_leaf: Mapping[int, Any]) -> dict[str, Any]:
    """Nested dicts that hold a value under the keys of each of some leaves of ``tree``.

    Args:
        tree: Any pytree.
        by_leaf: The values, by the index of their leaf in the order of :func:`flatten`.

    Returns:
        The dicts; a leaf without keys, the tree itself, has the key ``""``.
    """
    leaves = list(_walk(tree))
    result: dict[str, Any] = {}
    for i, value in by_leaf.items():
        *parents, last = leaves[i].keys or ("",)
        inner = result
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return result


def _walk(
    tree: Any,
    is_leaf: Callable[[Any], bool] = _is_empty,
    keys: tuple[str, ...] = (),
    owner: Any = None,
) -> Iterator[_Leaf]:
    """The leaves of a tree, in the order of :func:`flatten`."""
    children = None if is_leaf(tree) else _children(tree)
    if children is None:
        yield _Leaf(keys, tree, owner)
        return
    is_box = _is_box(tree)  # a box is no part of the name, and hides no owner
    for key, child in children:
        path, holder = (keys, owner) if is_box else ((*keys, key), tree)
        yield from _walk(child, is_leaf, path, holder)


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """What a node holds, with its keys, or None for a leaf."""
    children, _ = tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if children and children[0][0] == ():
        return None
    return [(tree_util.keystr(key, simple=True), child) for key, child in children]


def _is_box(x: Any) -> bool:
    """Whether Flax keeps an array in it, with what is said of the array."""
    return bool(class_names(x, "flax") & {"AxisMetadata", "Variable"})


def _shape(leaf: Any) -> Shape | None:
    """None if the leaf is no array, as the activation functions of a module."""
    is_array = hasattr(leaf, "shape") or isinstance(leaf, bool | int | float | complex)
    return jnp.shape(leaf) if is_array else None


def _matches(pattern: str, path: str) -> bool:
    """Whether the glob is or fits the path, or what follows one of its slashes."""
    path = f"/{path}"
    return path.endswith(f"/{pattern}") or fnmatch.fnmatchcase(path, f"*/{pattern}")


def _first_matches(
    name: str, patterns: Mapping[str, Any], paths: list[tuple[str, ...]]
) -> list[str | None]:
    """For each thing, known by one or more paths, the first pattern that matches it, or None."""
    winners = [
        next((p for p in patterns if any(_matches(p, path) for path in names)), None)
        for names in paths
    ]
    for pattern in patterns:
        if pattern not in winners:
            matched = any(_matches(pattern, path) for names in paths for path in names)
            what = "only what earlier patterns take: put it first" if matched else "nothing"
            raise ValueError(
                f"{name} has the pattern {pattern!r}, which matches {what}. "
                f"There are: {_listing(names[0] for names in paths)}"
            )
    return winners


def _listing(paths: Iterable[str]) -> str:
    names = [path or "(root)" for path in paths]
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join([*names[:_LISTED], *more]) or "none"


# --- layers that are described --------------------------------------------------------------------


def _as_told(leaves: list[_Leaf], layers: Any) -> Iterator[Layer]:
    index = {leaf.path: i for i, leaf in enumerate(leaves)}
    told = {
        index[path]: numbers
        for path, numbers in _told(list(index), layers).items()
        if numbers is not None and leaves[index[path]].shape is not None
    }
    stacks = {i: numbers.stack_axis for i, numbers in told.items() if _is_told_by_stack(numbers)}
    yield from _by_name(leaves, stacks)
    for i, numbers in told.items():
        if i not in stacks:
            yield _described(i, numbers, leaves, index)


def _is_told_by_stack(numbers: Any) -> bool:
    """Whether only the stacked axes are said: the others are those of the layer's library."""
    unsaid = numbers.reduction_axis is None and numbers.output_axis is None
    return unsaid and numbers.stack_axis is not None


def _described(i: int, numbers: Any, leaves: list[_Leaf], index: Mapping[str, int]) -> Layer:
    path = leaves[i].path
    shape = jnp.shape(leaves[i].value)
    stack_axis = getattr(numbers, "stack_axis", None)
    axes = []
    for name, given in {
        "reduction_axis": 0 if numbers.reduction_axis is None else numbers.reduction_axis,
        "output_axis": 1 if numbers.output_axis is None else numbers.output_axis,
        "stack_axis": () if stack_axis is None else stack_axis,
    }.items():
        label = f"layers gives {path!r}, shape {shape}, {name}"
        axes.append(normalise_axes(given, len(shape), label))
    reduction, output, stack = axes
    if len({*reduction, *output, *stack}) < len(reduction) + len(output) + len(stack):
        raise ValueError(
            f"layers gives {path!r} an axis that is two of reduction, output and stack"
        )
    layer = Layer(path, (i,), None, shape, reduction, output, None, path)
    if getattr(numbers, "bias", None) is None:
        return layer
    bias_path = "/".join([*path.split("/")[:-1], numbers.bias])
    if bias_path not in index:
        raise ValueError(f"layers names the bias {bias_path!r}, which is not in params")
    bias = index[bias_path]
    bias_shape = jnp.shape(leaves[bias].value)
    label = f"layers gives the bias of {path!r}, shape {bias_shape}, stack_axis"
    bias_stack = () if stack_axis is None else normalise_axes(stack_axis, len(bias_shape), label)
    if _without(bias_stack, bias_shape) != _without((*reduction, *stack), shape):
        raise ValueError(
            f"The bias of {path!r} has shape {bias_shape}, but its kernel, shape {shape}, has "
            f"columns {_without(reduction, shape)}: give its axes with "
            "layers={glob: LayerDimensionNumbers(...)}"
        )
    return layer._replace(bias=bias, stack_axes=stack, bias_stack_axes=bias_stack)


def _without(axes: Axes, shape: Shape) -> Shape:
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def _told(paths: list[str], layers: Any) -> dict[str, Any]:
    """The dimension numbers of each leaf that ``layers`` speaks of, by its path."""

    def is_numbers(x: Any) -> bool:
        return x is None or hasattr(x, "reduction_axis")

    if isinstance(layers, Mapping) and all(map(is_numbers, layers.values())):
        winners = _first_matches("layers", layers, [(path,) for path in paths])
        return {
            path: layers[winner]
            for path, winner in zip(paths, winners, strict=True)
            if winner is not None
        }
    told = {leaf.path: leaf.value for leaf in _walk(layers, is_leaf=is_numbers)}
    for path, numbers in told.items():
        if path not in paths or not is_numbers(numbers):
            raise ValueError(
                f"layers holds {brief(numbers)} at {path!r}: give dimension numbers or None, in "
                f"the structure of the parameters. There are: {_listing(iter(paths))}. To choose "
                "layers by name, say c={glob: number}"
            )
    return told


# --- layers that are found by name ----------------------------------------------------------------


def _by_name(leaves: list[_Leaf], stacks: Mapping[int, Any] | None = None) -> Iterator[Layer]:
    """The layers that follow a library's conventions.

    Args:
        leaves: All leaves of the tree.
        stacks: None, or the stacked axes of those kernels that are looked for, by their index.
    """
    groups: dict[str, dict[str, int]] = {}
    for i, leaf in enumerate(leaves):
        parent, _, name = leaf.path.rpartition("/")
        groups.setdefault(parent, {})[name] = i
    for parent, names in groups.items():
        for convention in CONVENTIONS:
            if not all(key in names for key in convention.kernels):
                continue
            first = names[convention.kernels[0]]
            if stacks is None or first in stacks:
                stack = None if stacks is None else stacks[first]
                role = attention_role(parent, groups)
                layer = _named(parent, names, convention, leaves, stack, role)
                if layer is not None:
                    yield layer


def _named(
    parent: str,
    names: Mapping[str, int],
    convention: Convention,
    leaves: list[_Leaf],
    stack_axis: Any,
    role: str | None,
) -> Layer | None:
    """One layer that follows a convention, or None if the leaves are none."""
    kernels = tuple(names[key] for key in convention.kernels)
    first, others = leaves[kernels[0]], [leaves[i] for i in kernels[1:]]
    bias = leaves[names[convention.bias]] if convention.bias in names else None
    if first.shape is None or len(first.shape) < 2:
        return None
    _check_not_state(parent, first)
    _check_not_cut(first, [*others, *([] if bias is None else [bias])])
    stack = _stack_axes(first, stack_axis)
    bias_stack = () if bias is None or bias.shape is None else _stack_axes(bias, stack_axis)
    if len(first.shape) - len(stack) < 2:
        return None
    verdict = convention.axes(
        Kernel(
            shape=_without(stack, first.shape),
            bias=None if bias is None or bias.shape is None else _without(bias_stack, bias.shape),
            has_bias_key=bias is not None,
            name=parent.rpartition("/")[2],
            role=role,
            owner=first.owner,
            is_told=stack_axis is not None,
        )
    )
    if verdict is None:
        return None
    reduction: Axes = ()
    output: Axes = ()
    if not isinstance(verdict, str):
        own = [i for i in range(len(first.shape)) if i not in stack]  # axes of one layer
        reduction, output = (tuple(own[i] for i in axes) for axes in verdict)
        for other in others:
            if _without(reduction, other.shape or ()) != _without(reduction, first.shape):
                verdict = f"{other.path!r}, shape {other.shape}, does not fit it"
                reduction, output = (), ()
    return Layer(
        path=parent,
        kernels=kernels,
        bias=None if bias is None or bias.shape is None else names[convention.bias],
        shape=first.shape,
        reduction_axes=reduction,
        output_axes=output,
        doubt=_doubt(first, verdict, stack_axis) if isinstance(verdict, str) else None,
        leaf_path=first.path,
        has_bias_row=convention.kernels[0] == AUGMENTED_KERNEL,
        stack_axes=stack,
        bias_stack_axes=bias_stack,
    )


def _check_not_state(parent: str, kernel: _Leaf) -> None:
    if "opt_state" in parent.split("/"):
        raise ValueError(
            f"params holds an optimizer's state: {kernel.path!r} is no weight. Give "
            "the parameters alone, such as state.params of a TrainState"
        )


def _check_not_cut(kernel: _Leaf, others: list[_Leaf]) -> None:
    for other in others:
        if isinstance(other.value, optax.MaskedNode):
            what = "bias" if other is others[-1] else "other kernel"
            raise ValueError(
                f"the {what} of {kernel.path!r} is masked and its kernel is not: put both "
                "on the same side of a mask or partition, as they are one column"
            )


def _stack_axes(leaf: _Leaf, stack_axis: Any) -> Axes:
    """The axes of a leaf that the user has said to be stacked."""
    label = f"layers gives {leaf.path!r}, shape {leaf.shape}, stack_axis"
    return () if stack_axis is None else normalise_axes(stack_axis, len(leaf.shape or ()), label)


def _doubt(kernel: _Leaf, why: str, stack_axis: Any) -> str:
    """What a user is told whose layer's axes cannot be told."""
    by_stack = (
        "If its layers are stacked, say along which axis, as in layers={glob: "
        "LayerDimensionNumbers(stack_axis=0)}; if they are not, stack_axis=(). Otherwise say "
    )
    return (
        f"layers cannot tell the axes of {kernel.path!r}, shape {kernel.shape}: {why}. "
        f"{by_stack if stack_axis is None else 'Say '}along which axes its columns run with "
        "layers={glob: LayerDimensionNumbers(reduction_axis, output_axis)}"
    )


# --- between plain and augmented parameters -------------------------------------------------------


def convert_params(params: Any, like: Any) -> Any:
    """Turns plain Flax parameters into augmented ones, or back, bit for bit.

    Where ``like`` has an ``augmented_kernel`` and ``params`` a ``kernel`` and perhaps a ``bias``,
    they are joined, the bias as row 0 and a convolution's kernel flattened below it; where it is
    the other way round they are parted again. Every other leaf is handed over as it is. So a
    trained plain network can be brought into the ball, and a constrained one handed to code that
    knows nothing of this library.

    Args:
        params: Parameters: nested dicts, an `flax.nnx.State`, or any other pytree.
        like: The wanted pytree, of arrays or of `jax.ShapeDtypeStruct` such as `jax.eval_shape`
            gives. Only structure and shapes are read.

    Returns:
        The values of ``params`` in the structure of ``like``, in their own dtypes.

    Raises:
        ValueError: ``like`` has a leaf that ``params`` has nothing for, or of another shape.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, l1inf_optax as l1inf
        >>> x = jnp.ones((1, 3))
        >>> plain = nn.Dense(2).init(jax.random.key(0), x)
        >>> like = jax.eval_shape(l1inf.linen.AugmentedDense(2).init, jax.random.key(0), x)
        >>> augmented = l1inf.convert_params(plain, like)
        >>> augmented["params"]["augmented_kernel"].shape
        (4, 2)
        >>> back = l1inf.convert_params(augmented, plain)
        >>> bool((back["params"]["kernel"] == plain["params"]["kernel"]).all())
        True
    """
    source = dict(named_leaves(params))
    wanted = dict(named_leaves(like))
    converted = [_convert(path, _shape(leaf), source, wanted) for path, leaf in wanted.items()]
    return tree_util.tree_unflatten(flatten(like)[1], converted)


def _convert(
    path: str, shape: Shape | None, source: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Any:
    parent, slash, name = path.rpartition("/")
    kernel, bias, augmented = (
        f"{parent}{slash}{key}" for key in ("kernel", "bias", AUGMENTED_KERNEL)
    )
    if path in source:
        value = source[path]
    elif name == AUGMENTED_KERNEL and kernel in source and shape is not None:
        weights = jnp.asarray(source[kernel])
        value = weights.reshape(*shape[:-2], -1, shape[-1])
        if source.get(bias) is not None:
            row = jnp.asarray(source[bias]).reshape(*shape[:-2], 1, shape[-1])
            value = jnp.concatenate([row, value], axis=-2)
    elif name in ("kernel", "bias") and augmented in source and shape is not None:
        rows = jnp.asarray(source[augmented])
        first = int(wanted.get(bias) is not None)
        value = (rows[..., first:, :] if name == "kernel" else rows[..., 0, :]).reshape(shape)
    else:
        raise ValueError(
            f"like has {path!r}, but params has nothing for it. It has: {_listing(iter(source))}"
        )
    if _shape(value) != shape:
        raise ValueError(
            f"like has shape {shape} at {path!r}, but params gives {_shape(value)}: "
            "take both from the same architecture"
        )
    return value
