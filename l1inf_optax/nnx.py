r"""Flax NNX layers that hold their bias and weights as one augmented matrix.

Each layer is Flax's own, and runs Flax's own code, with a single difference: once Flax has made
`kernel` and `bias`, they are joined in one parameter `augmented_kernel` of shape
`(1 + d_in, d_out)`, and from then on read as its rows,

    .. math:: V = (B, W^\top)^\top, \quad \text{bias} = V_0, \quad \text{kernel} = V_{1:},

so that a column of `V` is all that flows into one unit: what an L1,inf ball bounds.

In Jupyter a layer shows its zeros and norms as a table, and its weights as a picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike

from l1inf_optax._conventions import AUGMENTED_KERNEL
from l1inf_optax._html import module_html
from l1inf_optax._rescaling import rescale_params

__all__ = ["AugmentedConv", "AugmentedLinear", "AugmentedMLP"]

F = TypeVar("F", bound=Callable[..., None])

# Flax 0.12.0 has not yet renamed the axis names to `out_sharding`.
_AXIS_NAMES = ("out_sharding", "sharding_names")


_READ_ONLY = (
    "kernel and bias read rows of augmented_kernel, which a value written here would not reach: "
    "write to the matrix, as in layer.augmented_kernel[...] = jnp.concatenate([bias[None], kernel])"
)


@jax.tree_util.register_pytree_node_class
class _View(np.lib.mixins.NDArrayOperatorsMixin):
    """Rows of the augmented matrix, which behave as a parameter of Flax does: like their array.

    It is no parameter. That would be written to, and its value would never reach the matrix.
    """

    __slots__ = ("_rows",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, rows: Any):
        object.__setattr__(self, "_rows", rows)

    @property
    def value(self) -> jax.Array:
        return self._rows

    def get_value(self) -> jax.Array:
        return self._rows

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_rows"), name)

    def __getitem__(self, index: Any) -> jax.Array:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"View({self._rows!r})"

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self._rows)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self._rows).__array__(*args, **kwargs)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if "out" in options:
            raise TypeError(_READ_ONLY)
        inputs = tuple(x._rows if isinstance(x, _View) else x for x in inputs)
        if method == "__call__" and not options and hasattr(jnp, ufunc.__name__):
            return getattr(jnp, ufunc.__name__)(*inputs)  # not NumPy's, which cannot be traced
        return getattr(ufunc, method)(*map(np.asarray, inputs), **options)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(_READ_ONLY)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(_READ_ONLY)

    def set_value(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(_READ_ONLY)

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self._rows,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any]) -> _View:
        return cls(*children)


class _Rows:
    """Attribute that reads as rows of the layer's augmented matrix.

    Until `_join_parameters` has made the matrix it is a plain attribute: Flax's `__init__` keeps
    the parameter there.
    """

    def __init__(self, read: Callable[[Any, jax.Array], jax.Array | None]):
        self.read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        if AUGMENTED_KERNEL not in vars(layer):
            if self.name not in vars(layer):
                raise AttributeError(self.name)
            return vars(layer)[self.name]
        rows = self.read(layer, getattr(layer, AUGMENTED_KERNEL)[...])
        return None if rows is None else _View(rows)

    def __set__(self, layer: Any, value: Any) -> None:
        if AUGMENTED_KERNEL in vars(layer):
            raise AttributeError(_READ_ONLY)
        vars(layer)[self.name] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)[self.name]


def _kernel_rows(layer: Any, augmented: jax.Array) -> jax.Array:
    rows = augmented[..., int(layer.use_bias) :, :]
    return rows.reshape(*augmented.shape[:-2], *layer.kernel_shape)


def _bias_row(layer: Any, augmented: jax.Array) -> jax.Array | None:
    return augmented[..., 0, :] if layer.use_bias else None


def _join_parameters(layer: Any) -> None:
    """Replaces the parameters `kernel` and `bias` of `layer` by `augmented_kernel`.

    The parameter carries the metadata of the kernel. A convolution's leading axes become rows,
    which no mesh axis can name: only the name of the units is kept.
    """
    kernel = layer.kernel[...]
    layer.kernel_shape = kernel.shape
    rows = kernel.reshape(-1, layer.out_features)
    if layer.use_bias:
        rows = jnp.concatenate([layer.bias[...][None], rows])
    metadata = dict(layer.kernel.get_metadata())
    for key in _AXIS_NAMES:
        if metadata.get(key) and kernel.ndim > 2:
            metadata[key] = (None, *metadata[key][kernel.ndim - 1 :])
    del layer.kernel, layer.bias
    setattr(layer, AUGMENTED_KERNEL, nnx.Param(rows, **metadata))


def _with_signature_of(init: F) -> Callable[[Callable[..., None]], F]:
    """Makes help and type checkers show the arguments of `init`, as the installed Flax has them."""
    return lambda wrapper: cast(F, functools.wraps(init)(wrapper))


def _show(module: Any) -> str | None:
    """What Jupyter displays."""
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return module_html(type(module).__name__, params, use_bias=module.use_bias)


class AugmentedLinear(nnx.Linear):
    r"""A linear layer whose bias and weights are one matrix.

    In the notation of Wen, Xu, Zheng, Yang and Wang (Section 2.3), a layer with weights `W` and
    bias `B` computes

    .. math:: y = W x + B = V^\top (1, x), \quad V = (B, W^\top)^\top,

    and column `j` of the augmented matrix `V` is all that flows into unit `j`. In every other
    respect this is `flax.nnx.Linear`: same arguments, same result, and the same initial weights
    from the same key. Taking `V` apart and joining its gradient may copy the matrix
    once each, a few percent of a forward and backward pass (tests/benchmarks/bench_modules.py).

    Weights:
        `augmented_kernel`: `(1 + in_features, out_features)` of type `param_dtype`; row 0 is the
        bias. Without bias, `(in_features, out_features)`. `kernel` and `bias` read its rows: they
        behave like arrays, and writing to them is an error that names the matrix.

    Flax's wrappers see one parameter. `flax.nnx.WeightNorm` looks for `kernel`, finds none and does
    nothing; told to look for `augmented_kernel` it normalises bias and weights together.
    `flax.nnx.SpectralNorm` always does. In such a wrapper the ball still makes zeros, but no longer
    bounds what the network computes. `flax.nnx.LoRA` adds weights that are in no ball.

    It carries the metadata of the kernel (`flax.nnx.with_partitioning`, `kernel_metadata`); that
    of the bias, a row without a parameter of its own, is dropped. Name a mesh axis for the units
    rather than for the rows: a mesh that divides `in_features` seldom divides one more.

    Args:
        in_features: the number of inputs, `d_in`.
        out_features: the number of units, `d_out`.
        use_bias: whether row 0 of the matrix is a bias.
        dtype: of the computation; by default promoted from the input and the parameter.
        param_dtype: of the parameter.
        precision: of the product, as in `jax.lax.dot_general`.
        kernel_init: initializes rows 1 and on, called with `(in_features, out_features)`.
        bias_init: initializes row 0, called with `(out_features,)`.
        rngs: gives a `params` key for the kernel, then one for the bias.
        **kwargs: whatever else the installed `flax.nnx.Linear` takes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax.nnx import Rngs
        >>> from l1inf_optax import nnx
        >>> layer = nnx.AugmentedLinear(3, 4, rngs=Rngs(0))
        >>> layer.augmented_kernel.shape
        (4, 4)
        >>> layer(jnp.ones((2, 3))).shape
        (2, 4)
    """

    kernel: Any = _Rows(_kernel_rows)
    bias: Any = _Rows(_bias_row)
    _repr_html_ = _show

    @_with_signature_of(nnx.Linear.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _join_parameters(self)


class AugmentedConv(nnx.Conv):
    r"""A convolution whose bias and weights are one matrix.

    A unit is an output channel. All that flows into it, at any position, is its bias and one
    weight for each pixel of the window and each input channel, so that

    .. math:: y_p = V^\top (1, \text{window of } x \text{ around } p), \quad V = (B, W^\top)^\top,

    with the kernel flattened row by row below the bias. Everything else, initial weights included,
    is `flax.nnx.Conv`'s.

    Weights:
        `augmented_kernel`:
        `(1 + prod(kernel_size) * in_features / feature_group_count, out_features)` of type
        `param_dtype`; row 0 is the bias. Without bias, one row less. `kernel` and `bias` read its
        rows, as those of :class:`AugmentedLinear` do; what is said there of Flax's wrappers holds
        here.

    It carries the metadata of the kernel; of its axis names only the last, the units', is kept.
    The metadata of the bias is dropped.

    Args:
        in_features: the number of input channels.
        out_features: the number of output channels.
        kernel_size: the window's size along each spatial dimension; an int means one dimension.
        strides: of the window.
        padding: 'SAME', 'VALID', 'CIRCULAR', 'REFLECT', 'CAUSAL' (one dimension only), an int,
            or an int or a pair `(low, high)` for each spatial dimension.
        input_dilation: spacing of the input's pixels.
        kernel_dilation: spacing of the window's pixels.
        feature_group_count: into how many groups the channels are split.
        use_bias: whether row 0 of the matrix is a bias.
        mask: multiplies the kernel, in the kernel's shape. What it hides stays in the matrix and
            counts towards a column's norm.
        dtype: of the computation; by default promoted from the input and the parameter.
        param_dtype: of the parameter.
        precision: of the product, as in `jax.lax.conv_general_dilated`.
        kernel_init: initializes rows 1 and on, called with the kernel's shape,
            `(*kernel_size, in_features / feature_group_count, out_features)`.
        bias_init: initializes row 0, called with `(out_features,)`.
        rngs: gives a `params` key for the kernel, then one for the bias.
        **kwargs: whatever else the installed `flax.nnx.Conv` takes.

    Raises:
        ValueError: `feature_group_count` does not divide `in_features` or `out_features`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax.nnx import Rngs
        >>> from l1inf_optax import nnx
        >>> layer = nnx.AugmentedConv(2, 8, kernel_size=(3, 3), rngs=Rngs(0))
        >>> layer.augmented_kernel.shape
        (19, 8)
        >>> layer(jnp.ones((4, 5, 5, 2))).shape
        (4, 5, 5, 8)
    """

    kernel: Any = _Rows(_kernel_rows)
    bias: Any = _Rows(_bias_row)
    _repr_html_ = _show

    @_with_signature_of(nnx.Conv.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups = self.feature_group_count
        if self.in_features % groups or self.out_features % groups:
            raise ValueError(
                f"feature_group_count={groups} must divide in_features={self.in_features} and "
                f"out_features={self.out_features}: pass a common divisor of the two, or leave it "
                "at 1"
            )
        _join_parameters(self)


class AugmentedMLP(nnx.Module):
    r"""A multilayer perceptron with augmented hidden layers and a free readout.

    With widths `d_1, ..., d_k` and an activation `s`, and `V_l` the augmented matrix of layer `l`,

    .. math:: h_l = s(V_l^\top (1, h_{l-1})), \; l < k, \qquad y = W_k h_{k-1} + B_k .

    The hidden layers are the attributes `hidden_0`, `hidden_1`, ...; the output layer, which the
    paper leaves out of the ball, is a plain `flax.nnx.Linear`, the attribute `readout`.

    Args:
        in_features: the number of inputs.
        features: the widths; the last is the readout's.
        activation: applied after each hidden layer.
        use_bias: whether each layer has a bias.
        dtype: of the computation, passed on to each layer, as is what follows.
        param_dtype: of the parameters.
        precision: of the products.
        kernel_init: initializes the weights.
        bias_init: initializes the biases.
        rngs: gives each layer its keys, from the first to the last.

    Raises:
        ValueError: `features` is empty or no sequence.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax.nnx import Rngs
        >>> from l1inf_optax import nnx
        >>> model = nnx.AugmentedMLP(784, features=(900, 10), rngs=Rngs(0))
        >>> model.hidden_0.augmented_kernel.shape, model.readout.kernel.shape
        ((785, 900), (900, 10))
        >>> model(jnp.ones((2, 784))).shape
        (2, 10)
    """

    _repr_html_ = _show

    def __init__(
        self,
        in_features: int,
        features: Sequence[int],
        *,
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ) -> None:
        if not isinstance(features, Sequence) or not features:
            raise ValueError(
                f"features={features!r} must be a non-empty sequence of widths: "
                "pass one for each hidden layer and the readout's last, as in features=(900, 10)"
            )
        options: dict[str, Any] = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        *hidden, readout = features
        self.hidden_names = tuple(f"hidden_{index}" for index in range(len(hidden)))
        for name, width in zip(self.hidden_names, hidden, strict=True):
            setattr(self, name, AugmentedLinear(in_features, width, **options))
            in_features = width
        self.readout = nnx.Linear(in_features, readout, **options)
        self.activation = activation
        self.use_bias = use_bias

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `inputs`, of shape `(*batch, in_features)`, to `(*batch, features[-1])`."""
        for name in self.hidden_names:
            inputs = self.activation(getattr(self, name)(inputs))
        return self.readout(inputs)

    def rescale(self, inputs: jax.Array, c: Any, *, reference: float = 5.0) -> Any:
        """Scales itself, fresh, into balls of any radius: see `l1inf_optax.rescale_params`.

        Args:
            inputs: some inputs, of shape `(batch, in_features)`.
            c: the radii, as for `l1inf_optax.constrain`; the readout stays free.
            reference: the radius whose signal smaller ones get.

        Returns:
            The scales for `l1inf_optax.with_scales`, a state like that of the parameters.

        Raises:
            ValueError: as `l1inf_optax.rescale_params`.

        Example:
            >>> import jax.numpy as jnp, optax, l1inf_optax as l1inf
            >>> from flax import nnx
            >>> model = l1inf.nnx.AugmentedMLP(4, (16, 16, 3), rngs=nnx.Rngs(0))
            >>> c = {"hidden_*": 0.5}
            >>> adam = l1inf.with_scales(optax.adam(1e-3), model.rescale(jnp.eye(4), c))
            >>> optimizer = nnx.Optimizer(model, l1inf.constrain(adam, c), wrt=nnx.Param)
        """
        graph, params, *others = nnx.split(self, nnx.Param, ...)

        def apply(params: Any, inputs: jax.Array) -> jax.Array:
            return nnx.merge(graph, params, *others)(inputs)

        small, scales = rescale_params(apply, params, inputs, c, reference=reference)
        nnx.update(self, small)
        return scales
