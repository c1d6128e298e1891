"""Columns on many devices: every device searches for the thresholds of the columns it holds.

Left to the compiler, a search that ends when its last column is done would ask all devices after
every pass. Here each runs its own:

1. Find how the matrix is sharded: its type says so on explicit axes of a mesh, the compiler on
   automatic ones.
2. Give every operand the part of that sharding that concerns it; a matrix stays where it is.
3. Run the search on each device's own columns.
4. Where rows are sharded, the devices that share a column add up what each finds of it: `Rows`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")
Shape = tuple[int, ...]


class Rows(NamedTuple):
    """The devices that hold the rows of one column.

    Attributes:
        names: the axes of the mesh that they lie along; none where a column is on one device.
        devices: how many they are.
    """

    names: tuple[str, ...] = ()
    devices: int = 1

    def sum(self, x: T) -> T:
        """The sum over all rows' devices of every array in a tree."""
        return lax.psum(x, self.names) if self.names else x

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum over all rows' devices; NaN if that of one is, which `pmax` may lose."""
        if not self.names:
            return x
        return lax.pmax(x, self.names) + lax.psum(jnp.where(jnp.isnan(x), x, 0), self.names)

    def is_first(self) -> jax.Array:
        """Whether this is the device that counts entries every one of them holds."""
        return lax.axis_index(self.names) == 0


def columns_where_they_are(
    fun: Callable[[Any, Rows], Any],
    operands: Any,
    shape: Shape,
    axes: tuple[int, ...],
    *,
    split_rows: bool,
) -> Any:
    """``fun(operands, rows)``, a function of columns, on the devices that hold them.

    Args:
        fun: Column by column; where ``rows`` names devices, it sees a share of the rows and
            combines what all of them have to know.
        operands: Pytree of arrays with the rank of the matrix. Each of their axes has the matrix's
            length and sharding, or another length and no sharding.
        shape: Of the matrix, an operand itself.
        axes: The axes a column runs along.
        split_rows: Whether columns may stay split; otherwise they are gathered.

    Returns:
        The results, arrays like the operands, sharded alike.
    """
    leaves, tree = jax.tree.flatten(operands)
    explicit = explicit_mesh(leaves)
    if explicit is None and jax.device_count() == 1:
        return fun(operands, Rows())

    def on_device(rows: Rows, *leaves: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(fun(jax.tree.unflatten(tree, leaves), rows))

    unplaced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    results, result_tree = jax.tree.flatten(jax.eval_shape(lambda x: fun(x, Rows()), unplaced))
    shapes, result_shapes = [x.shape for x in leaves], [x.shape for x in results]

    def layout(mesh: Any, specs: Sequence[PartitionSpec]) -> _Layout:
        spec = _matrix_spec(mesh, shape, shapes, specs)
        if not split_rows:
            spec = tuple(None if i in axes else s for i, s in enumerate(spec))
        names = tuple(name for i in axes for name in _names(spec[i]))
        rows = Rows(names, math.prod(mesh.shape[name] for name in names))
        of_operands, of_results = (
            tuple(_part(spec, shape, x) for x in some) for some in (shapes, result_shapes)
        )
        return _Layout(rows, of_operands, of_results)

    if explicit is not None:
        chosen = layout(explicit, [jax.typeof(x).sharding.spec for x in leaves])
        leaves = list(map(jax.sharding.reshard, leaves, chosen.operands))
        run: Callable[..., Any] = jax.shard_map(
            functools.partial(on_device, chosen.rows),
            mesh=explicit,
            in_specs=chosen.operands,
            out_specs=list(chosen.results),
            check_vma=False,  # what devices agree on comes out of loops
        )
    else:
        run = _partitioned(on_device, layout, _rule(shape, shapes, result_shapes))
    return jax.tree.unflatten(result_tree, run(*leaves))


class _Layout(NamedTuple):
    """How the operands and the results of a function are sharded."""

    rows: Rows
    operands: tuple[PartitionSpec, ...]
    results: tuple[PartitionSpec, ...]


def _partitioned(
    on_device: Callable[..., list[jax.Array]], layout: Callable[..., _Layout], rule: str
) -> Callable[..., list[jax.Array]]:
    """The function, laid out when the compiler knows how its operands are sharded."""
    alone = functools.partial(on_device, Rows())

    def partition(mesh: Mesh, operands: Any, results: Any) -> tuple:
        del results
        chosen = layout(mesh, [x.sharding.spec for x in operands])
        of_operands, of_results = (
            [NamedSharding(mesh, spec) for spec in some] for some in chosen[1:]
        )
        return mesh, functools.partial(on_device, chosen.rows), of_results, tuple(of_operands)

    partitioned = custom_partitioning(lambda *leaves: alone(*leaves))
    partitioned.def_partition(partition, sharding_rule=rule)
    whole = custom_vmap(lambda *leaves: partitioned(*leaves))

    @whole.def_vmap
    def batch(axis_size: int, batched: Sequence[bool], *leaves: jax.Array) -> tuple:
        del axis_size  # how a batch is laid out is left to the compiler
        found = jax.vmap(alone, in_axes=[0 if b else None for b in batched])(*leaves)
        return found, [True] * len(found)

    return whole


def explicit_mesh(leaves: Sequence[jax.Array]) -> Any:
    """The mesh that the types of arrays speak of, or None if they leave that to the compiler."""
    for x in leaves:
        mesh = jax.typeof(x).sharding.mesh
        if not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types):
            return mesh
    return None


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _matrix_spec(
    mesh: Any, shape: Shape, shapes: Sequence[Shape], specs: Sequence[PartitionSpec]
) -> tuple:
    """The matrix's sharding: the first there is; whole where the devices' shares would differ."""
    for x, spec in zip(shapes, specs, strict=True):
        if x == shape and any(spec):
            padded = (*spec, *(None,) * (len(shape) - len(spec)))
            return tuple(
                None if n % math.prod(mesh.shape[name] for name in _names(s)) else s
                for n, s in zip(shape, padded, strict=True)
            )
    return (None,) * len(shape)


def _part(spec: tuple, whole: Shape, shape: Shape) -> PartitionSpec:
    """What a sharding of the matrix means for an array of another length along some axes."""
    return PartitionSpec(
        *(s if n == m else None for s, n, m in zip(spec, shape, whole, strict=True))
    )


def _rule(whole: Shape, shapes: Sequence[Shape], result_shapes: Sequence[Shape]) -> str:
    """Which axes of operands and results are sharded alike, in the words of Shardy."""
    alone = itertools.count()

    def factors(shape: Shape) -> str:
        return " ".join(
            f"x{i}" if n == m else f"y{next(alone)}"
            for i, (n, m) in enumerate(zip(shape, whole, strict=True))
        )

    return f"{', '.join(map(factors, shapes))} -> {', '.join(map(factors, result_shapes))}"
