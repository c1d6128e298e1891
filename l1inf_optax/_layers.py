"""Pytrees: which leaves make one augmented matrix, and along which axes its columns run.

Nothing here knows an optimizer. A layer is a kernel and, where there is one, its bias. Leaves are
found by the names their libraries give them; anything else is said with dimension numbers.
"""

import fnmatch
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import tree_util
from jax.sharding import NamedSharding, PartitionSpec

from l1inf_optax._projection import Arrays, Axes, check_floating, check_radius, normalise_axes

AUGMENTED_KERNEL = "augmented_kernel"

Radius = Any  # a number, an array, or an optax schedule
Radii = Radius | Mapping[str, Radius | None]


class LayerDimensionNumbers(NamedTuple):
    """Says how a leaf of any shape is a matrix of columns, after optax's `MuonDimensionNumbers`.

    Axes that are neither reduced nor output are a batch of independent matrices, as in stacked or
    vmapped layers. An :class:`optax.contrib.MuonDimensionNumbers` can be used in its place.

    Attributes:
        reduction_axis: The axis or axes a column runs along: those summed over by the layer.
        output_axis: The axis or axes that index the layer's units.
        bias: The last key of the leaf beside this one that holds the bias, or None. Its shape is
            that of the kernel without the reduction axes.

    Example:
        A projection stored as (heads, head_dim, d_model), its bias beside it as (d_model,):

        >>> import jax.numpy as jnp, l1inf_optax as l1inf
        >>> params = {"proj": {"w_out": jnp.ones((2, 3, 4)), "b_out": jnp.ones(4)}}
        >>> layers = {"*/w_out": l1inf.LayerDimensionNumbers((0, 1), 2, bias="b_out")}
        >>> l1inf.project_params(params, 3.5, layers=layers)["proj"]["b_out"].round(6)
        Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1
    bias: str | None = None


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
        kernel: Index of the kernel among the tree's leaves.
        bias: Index of the bias, or None.
        shape: Shape of the kernel.
        reduction_axes: The axes a column runs along.
        output_axes: The axes that index units.
        doubt: Why the axes could not be told, or None. They are empty then.
        leaf_path: The kernel's own path.
        has_bias_row: Whether row 0 of the kernel is the bias.
    """

    path: str
    kernel: int
    bias: int | None
    shape: tuple[int, ...]
    reduction_axes: Axes
    output_axes: Axes
    doubt: str | None
    leaf_path: str
    has_bias_row: bool

    def columns(self, leaves: Sequence[Any]) -> Arrays:
        """The layer's bias and kernel as arrays that agree in every axis but ``reduction_axes``."""
        pieces = [leaves[i] for i in (self.bias, self.kernel) if i is not None]
        if any(map(_is_empty, pieces)):
            raise ValueError(f"the layer {self.path!r} has no array: give updates for all of it")
        *bias, kernel = map(jnp.asarray, pieces)
        shape = tuple(1 if i in self.reduction_axes else n for i, n in enumerate(self.shape))
        return (*(x.reshape(shape) for x in bias), kernel)

    @property
    def columns_shape(self) -> tuple[int, ...]:
        """The kernel's shape without the axes a column runs along."""
        return tuple(n for i, n in enumerate(self.shape) if i not in self.reduction_axes)

    def zeros(self, leaves: Sequence[Any]) -> jax.Array:
        """A zero for each column, float32 or, where the layer is, float64; sharded like columns."""
        dtypes = (leaves[i].dtype for i in (self.bias, self.kernel) if i is not None)
        columns = [i for i in range(len(self.shape)) if i not in self.reduction_axes]
        return jnp.zeros(
            self.columns_shape,
            jnp.result_type(jnp.float32, *dtypes),
            device=_sharding_along(leaves[self.kernel], columns),
        )

    def put(self, columns: Arrays, leaves: list[Any]) -> None:
        """Stores what :meth:`columns` gave, in the leaves' own shapes."""
        leaves[self.kernel] = columns[-1]
        if self.bias is not None:
            leaves[self.bias] = columns[0].reshape(jnp.shape(leaves[self.bias]))


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
    leaves, structure = flatten(params)
    if not leaves:
        raise ValueError(
            f"params={params!r} holds no arrays: give the parameters themselves, such as a Linen "
            "module's init(key, x) returns"
        )
    found = find_layers(params, layers)
    if not found:
        if tree_util.treedef_is_leaf(structure) and not hasattr(leaves[0], "shape"):
            raise ValueError(
                f"params is a {type(params).__name__}, not a pytree of arrays: give the parameters "
                "themselves, such as a Linen module's init(key, x) returns"
            )
        raise ValueError(
            f"layers={layers!r} finds nothing to constrain. The leaves are: "
            f"{_listing(path for path, _ in named_leaves(params))}. Say which of them are "
            "kernels with layers={glob: LayerDimensionNumbers(...)}"
        )
    radii: list[Radius | None] = [c] * len(found)
    if isinstance(c, Mapping):
        winners = _first_matches("c", c, [(layer.path, layer.leaf_path) for layer in found])
        radii = [None if winner is None else c[winner] for winner in winners]
    chosen = [
        (layer, radius) for layer, radius in zip(found, radii, strict=True) if radius is not None
    ]
    if not chosen:
        raise ValueError(
            f"c={c!r} constrains nothing: give a radius to at least one of the layers, "
            f"{_listing(layer.path for layer in found)}"
        )
    for layer, _ in chosen:
        check_certain(layer)
        for i in (layer.bias, layer.kernel):
            if i is not None:
                check_floating(leaves[i].dtype, f"params at {layer.path or '(root)'!r}")
    return chosen


def check_certain(layer: Layer) -> None:
    """Raises a ValueError if the layer's axes are guesswork."""
    if layer.doubt is not None:
        raise ValueError(layer.doubt)


def check_radii(c: Radii) -> None:
    """Raises a ValueError if a radius that is known now is not a positive number."""
    for radius in c.values() if isinstance(c, Mapping) else (c,):
        if isinstance(radius, list | tuple):
            raise ValueError(
                f"c={radius!r} is a {type(radius).__name__}: give a number, or a mapping with "
                "one for each layer, as in {'hidden_0': 1.0, 'hidden_1': 2.0}"
            )
        if radius is not None and not callable(radius):
            check_radius(radius)


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
    leaves = named_leaves(params)
    _check_unique([path for path, _ in leaves])
    if layers is None:
        return list(_by_name(leaves))
    if tree_util.treedef_is_leaf(tree_util.tree_structure(layers)) and callable(layers):
        layers = layers(params)
    return list(_as_told(leaves, layers))


# --- paths ----------------------------------------------------------------------------------------


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths, keys joined by ``/``, in the order of :func:`flatten`."""
    flat, _ = tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
    return [(_path(keys), leaf) for keys, leaf in flat]


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
    flat, _ = tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
    names = [path for path, _ in named_leaves(tree)]
    result: dict[str, Any] = {}
    for i, value in by_leaf.items():
        keys = [tree_util.keystr((key,), simple=True) for key in flat[i][0]]
        while "/".join(keys) != names[i]:
            keys.pop()  # a box's own key, which is no part of the name
        *parents, last = keys or [""]
        inner = result
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return result


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return None if _is_empty(leaf) else jnp.shape(leaf)


def _path(keys: tuple[Any, ...]) -> str:
    # The boxes that Linen (Partitioned) and NNX (Param) keep values in are not part of the name.
    if keys and isinstance(keys[-1], tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return tree_util.keystr(keys, simple=True, separator="/")


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


def _listing(paths: Iterator[str]) -> str:
    return ", ".join(path or "(root)" for path in paths) or "none"


# --- layers that are described --------------------------------------------------------------------


def _as_told(leaves: list[tuple[str, Any]], layers: Any) -> Iterator[Layer]:
    index = {path: i for i, (path, _) in enumerate(leaves)}
    for path, numbers in _told(list(index), layers).items():
        leaf = leaves[index[path]][1]
        if numbers is None or _is_empty(leaf):
            continue
        shape = jnp.shape(leaf)
        given = f"layers gives {path!r}, shape {shape}, "
        reduction = normalise_axes(numbers.reduction_axis, len(shape), f"{given}reduction_axis")
        output = normalise_axes(numbers.output_axis, len(shape), f"{given}output_axis")
        if set(reduction) & set(output):
            raise ValueError(f"layers gives {path!r} an axis that is both reduction and output")
        bias = None
        if getattr(numbers, "bias", None) is not None:
            bias_path = "/".join([*path.split("/")[:-1], numbers.bias])
            if bias_path not in index:
                raise ValueError(f"layers names the bias {bias_path!r}, which is not in params")
            bias = index[bias_path]
            _check_bias(jnp.shape(leaves[bias][1]), shape, reduction, path)
        yield Layer(path, index[path], bias, shape, reduction, output, None, path, False)


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
    flat, _ = tree_util.tree_flatten_with_path(layers, is_leaf=is_numbers)
    told = {_path(keys): numbers for keys, numbers in flat}
    for path, numbers in told.items():
        if path not in paths or not is_numbers(numbers):
            raise ValueError(
                f"layers holds {numbers!r} at {path!r}: give dimension numbers or None, in the "
                f"structure of the parameters. There are: {_listing(iter(paths))}. To choose "
                "layers by name, say c={glob: number}"
            )
    return told


def _check_bias(bias: tuple[int, ...], kernel: tuple[int, ...], reduction: Axes, path: str) -> None:
    columns = tuple(n for i, n in enumerate(kernel) if i not in reduction)
    if bias != columns:
        raise ValueError(
            f"The bias of {path!r} has shape {bias}, but its kernel, shape {kernel}, has columns "
            f"{columns}: give its axes with layers={{glob: LayerDimensionNumbers(...)}}"
        )


# --- layers that are found by name ----------------------------------------------------------------

# What a convention's function returns: reduction and output axes, or a sentence of doubt.
_Verdict = tuple[Axes, Axes] | str
_Shape = tuple[int, ...]


def _by_name(leaves: list[tuple[str, Any]]) -> Iterator[Layer]:
    groups: dict[str, dict[str, int]] = {}
    for i, (path, _) in enumerate(leaves):
        parent, _, name = path.rpartition("/")
        groups.setdefault(parent, {})[name] = i
    for parent, names in groups.items():
        for kernel_name, bias_name, axes_of in _CONVENTIONS:
            if kernel_name not in names:
                continue
            kernel, bias = names[kernel_name], names.get(bias_name)
            shape = _shape(leaves[kernel][1])
            bias_shape = None if bias is None else _shape(leaves[bias][1])
            if shape is None or len(shape) < 2:
                continue
            if "opt_state" in parent.split("/"):
                raise ValueError(
                    f"params holds an optimizer's state: {leaves[kernel][0]!r} is no weight. Give "
                    "the parameters alone, such as state.params of a TrainState"
                )
            if bias is not None and isinstance(leaves[bias][1], optax.MaskedNode):
                raise ValueError(
                    f"the bias of {leaves[kernel][0]!r} is masked and its kernel is not: put both "
                    "on the same side of a mask or partition, as they are one column"
                )
            if axes_of is _units_first and (bias is None or bias_shape == shape):
                continue  # an embedding, which has no bias at all, not even None; or a norm
            if bias_shape is None:
                bias = None
            verdict = axes_of(shape, bias_shape, _role(parent, groups))
            doubt = None
            if isinstance(verdict, str):
                doubt = (
                    f"layers cannot tell the axes of {leaves[kernel][0]!r}, shape {shape}: "
                    f"{verdict}. Say along which axes its columns run with "
                    "layers={glob: LayerDimensionNumbers(reduction_axis, output_axis)}"
                )
                verdict = (), ()
            leaf_path, has_bias_row = leaves[kernel][0], kernel_name == AUGMENTED_KERNEL
            yield Layer(parent, kernel, bias, shape, *verdict, doubt, leaf_path, has_bias_row)


def _role(path: str, groups: Mapping[str, Any]) -> str | None:
    """Which part of an attention layer this is, if its three siblings are there too."""
    parent, slash, name = path.rpartition("/")
    attention = {"query", "key", "value", "out"}
    whole = name in attention and all(f"{parent}{slash}{part}" in groups for part in attention)
    return name if whole else None


def _augmented(shape: _Shape, bias: _Shape | None, role: str | None) -> _Verdict:
    del bias, role
    return (len(shape) - 2,), (len(shape) - 1,)


def _units_last(shape: _Shape, bias: _Shape | None, role: str | None) -> _Verdict:
    """Kernel (batch..., reduction..., output...), bias (batch..., output...): Flax and Haiku."""
    n = len(shape)
    outputs = {None: None, "out": 1}.get(role, 2)  # queries, keys and values: heads, head_dim
    if bias is None:
        if role is None:
            outputs = {2: 1, 4: 1}.get(n)  # a matrix, or an image convolution
        elif n != 3:
            outputs = None
        if outputs is None:
            return "without a bias it may be a convolution, or stacked layers"
        return tuple(range(n - outputs)), tuple(range(n - outputs, n))
    fits = [
        (len(bias) - out, n - out)
        for out in range(1, len(bias) + 1)
        if len(bias) < n and bias == shape[: len(bias) - out] + shape[n - out :]
        if outputs in (None, out)
    ]
    if not fits:
        return f"its bias, shape {bias}, does not fit it"
    if len(fits) > 1:
        return f"its bias, shape {bias}, fits it in {len(fits)} ways"
    ((first, last),) = fits
    return tuple(range(first, last)), tuple(range(last, n))


def _units_first(shape: _Shape, bias: _Shape | None, role: str | None) -> _Verdict:
    """Weight (batch..., out, reduction...), bias (batch..., out, 1...): Equinox."""
    del role
    if bias is None:
        if len(shape) not in (2, 4):
            return "without a bias it may be a convolution, or stacked layers"
        return tuple(range(1, len(shape))), (0,)
    unit = max((i for i, size in enumerate(bias) if size != 1), default=0)
    if len(bias) != len(shape) - 1 or bias[: unit + 1] != shape[: unit + 1]:
        return f"its bias, shape {bias}, does not fit it"
    return tuple(range(unit + 1, len(shape))), (unit,)


_CONVENTIONS: tuple[tuple[str, str, Callable[..., _Verdict]], ...] = (
    (AUGMENTED_KERNEL, "", _augmented),
    ("kernel", "bias", _units_last),  # Flax
    ("w", "b", _units_last),  # Haiku
    ("weight", "bias", _units_first),  # Equinox
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
    path: str, shape: _Shape | None, source: Mapping[str, Any], wanted: Mapping[str, Any]
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
