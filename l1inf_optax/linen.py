r"""Flax Linen layers that hold their bias and weights as one augmented matrix.

Each layer is Flax's own, and runs Flax's own code, with a single difference: where Flax declares
`kernel` and `bias`, it declares one parameter `augmented_kernel` of shape `(1 + d_in, d_out)` and
hands out its rows,

    .. math:: V = (B, W^\top)^\top, \quad \text{bias} = V_0, \quad \text{kernel} = V_{1:},

so that a column of `V` is all that flows into one unit: what an L1,inf ball bounds.

In Jupyter a layer that is bound to its parameters shows its zeros and norms as a table, and its
weights as a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike

from l1inf_optax._conventions import AUGMENTED_KERNEL
from l1inf_optax._html import module_html
from l1inf_optax._rescaling import Rescaled, rescale_params

__all__ = ["AugmentedConv", "AugmentedDense", "AugmentedMLP"]


def _init_augmented(
    layer: nn.Dense | nn.Conv, kernel_shape: tuple[int, ...], param_dtype: Dtype
) -> Callable[[jax.Array], Any]:
    """Returns an initializer that stacks what `bias_init` and `kernel_init` give.

    The parameter carries the metadata of the kernel. A convolution's leading axes become rows,
    which no mesh axis can name: only the name of the units is kept.
    """
    is_new = not layer.has_variable("params", AUGMENTED_KERNEL)

    def init(kernel_key: jax.Array) -> Any:
        boxed = layer.kernel_init(kernel_key, kernel_shape, param_dtype)
        rows = nn.meta.unbox(boxed).reshape(-1, layer.features)
        if layer.use_bias:
            # The plain layer's next key, so that one seed gives both layers the same weights.
            # An existing parameter is asked for its shape only, and then there may be no key.
            bias_key = layer.make_rng("params") if is_new else kernel_key
            bias = layer.bias_init(bias_key, (layer.features,), param_dtype)
            rows = jnp.concatenate([nn.meta.unbox(bias)[None], rows])
        if not isinstance(boxed, nn.meta.AxisMetadata):
            return rows
        if isinstance(boxed, nn.Partitioned) and len(kernel_shape) > 2:
            boxed = boxed.replace(names=(None, *boxed.names[len(kernel_shape) - 1 :]))
        return boxed.replace_boxed(rows)

    return init


@nn.nowrap
def _param(
    layer: nn.Dense | nn.Conv,
    name: str,
    init_fn: Callable[..., Any],
    *init_args: Any,
    **init_kwargs: Any,
) -> Any:
    """Declares a parameter, where `kernel` and `bias` are rows of the augmented matrix."""
    if name == "kernel":
        kernel_shape, param_dtype = init_args
        init = _init_augmented(layer, kernel_shape, param_dtype)
        augmented = nn.Module.param(layer, AUGMENTED_KERNEL, init)
        return augmented[int(layer.use_bias) :].reshape(kernel_shape)
    if name == "bias":
        return nn.meta.unbox(layer.get_variable("params", AUGMENTED_KERNEL))[0]
    return nn.Module.param(layer, name, init_fn, *init_args, **init_kwargs)


@nn.nowrap
def _show(module: Any) -> str | None:
    """What Jupyter displays: for a module that is bound to its parameters, and so has some."""
    if module.scope is None:
        return None
    params = nn.meta.unbox(module.variables.get("params", {}))
    return module_html(type(module).__name__, params, use_bias=module.use_bias)


class AugmentedDense(nn.Dense):
    r"""A dense layer whose bias and weights are one matrix.

    In the notation of Wen, Xu, Zheng, Yang and Wang (Section 2.3), a layer with weights `W` and
    bias `B` computes

    .. math:: y = W x + B = V^\top (1, x), \quad V = (B, W^\top)^\top,

    and column `j` of the augmented matrix `V` is all that flows into unit `j`. In every other
    respect this is `flax.linen.Dense`: same arguments, same result, and the same initial weights
    from the same key. Taking `V` apart and joining its gradient may copy the matrix
    once each, a few percent of a forward and backward pass (tests/benchmarks/bench_modules.py).

    Weights:
        `augmented_kernel`: `(1 + d_in, features)` of type `param_dtype`; row 0 is the bias.
        Without bias, `(d_in, features)`.

    Flax's wrappers see one parameter: `flax.linen.WeightNorm` and `flax.linen.SpectralNorm`
    normalise bias and weights together, where those around a `Dense` spare the bias. In such a
    wrapper the ball still makes zeros, but no longer bounds what the network computes.

    It carries the metadata of the kernel (`flax.linen.with_partitioning`). Name a mesh axis for
    the units rather than for the rows: a mesh that divides `d_in` seldom divides `1 + d_in`.

    Attributes:
        features: the number of units, `d_out`.
        use_bias: whether row 0 of the matrix is a bias.
        dtype: of the computation; by default promoted from the input and the parameter.
        param_dtype: of the parameter.
        precision: of the product, as in `jax.lax.dot_general`.
        kernel_init: initializes rows 1 and on, called with `(d_in, features)`.
        bias_init: initializes row 0, called with `(features,)`.
        promote_dtype: brings input, kernel and bias to one dtype.
        dot_general: computes the product in place of `jax.lax.dot_general`.
        dot_general_cls: makes a `dot_general` for each call.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from l1inf_optax import linen
        >>> layer = linen.AugmentedDense(features=4)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'augmented_kernel': (4, 4)}}
        >>> layer.apply(variables, jnp.ones((2, 3))).shape
        (2, 4)
    """

    param = _param
    _repr_html_ = _show


class AugmentedConv(nn.Conv):
    r"""A convolution whose bias and weights are one matrix.

    A unit is an output channel. All that flows into it, at any position, is its bias and one
    weight for each pixel of the window and each input channel, so that

    .. math:: y_p = V^\top (1, \text{window of } x \text{ around } p), \quad V = (B, W^\top)^\top,

    with the kernel flattened row by row below the bias. Everything else, initial weights included,
    is `flax.linen.Conv`'s.

    Weights:
        `augmented_kernel`: `(1 + prod(kernel_size) * d_in / feature_group_count, features)` of
        type `param_dtype`; row 0 is the bias. Without bias, one row less.

    It carries the metadata of the kernel; of its axis names only the last, the units', is kept.
    What :class:`AugmentedDense` says of Flax's wrappers holds here.

    Attributes:
        features: the number of output channels.
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
            `(*kernel_size, d_in / feature_group_count, features)`.
        bias_init: initializes row 0, called with `(features,)`.
        promote_dtype: brings input, kernel and bias to one dtype.
        conv_general_dilated: computes the product in place of `jax.lax.conv_general_dilated`.
        conv_general_dilated_cls: makes a `conv_general_dilated` for each call.

    Raises:
        ValueError: `feature_group_count` does not divide the channels of the input or output.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from l1inf_optax import linen
        >>> layer = linen.AugmentedConv(features=8, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'augmented_kernel': (19, 8)}}
        >>> layer.apply(variables, jnp.ones((4, 5, 5, 2))).shape
        (4, 5, 5, 8)
    """

    param = _param
    _repr_html_ = _show

    @nn.nowrap
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves `inputs`, of shape `(*batch, *spatial, d_in)`."""
        groups, d_in = self.feature_group_count, inputs.shape[-1]
        if d_in % groups or self.features % groups:
            raise ValueError(
                f"feature_group_count={groups} must divide the input's {d_in} channels and "
                f"features={self.features}: pass a common divisor of the two, or leave it at 1"
            )
        return super().__call__(inputs)


class AugmentedMLP(nn.Module):
    r"""A multilayer perceptron with augmented hidden layers and a free readout.

    With widths `d_1, ..., d_k` and an activation `s`, and `V_l` the augmented matrix of layer `l`,

    .. math:: h_l = s(V_l^\top (1, h_{l-1})), \; l < k, \qquad y = W_k h_{k-1} + B_k .

    The hidden layers are named `hidden_0`, `hidden_1`, ...; the output layer, which the paper
    leaves out of the ball, is a plain `flax.linen.Dense` named `readout`.

    Attributes:
        features: the widths; the last is the readout's.
        activation: applied after each hidden layer.
        use_bias: whether each layer has a bias.
        dtype: of the computation, passed on to each layer, as is what follows.
        param_dtype: of the parameters.
        precision: of the products.
        kernel_init: initializes the weights.
        bias_init: initializes the biases.

    Raises:
        ValueError: `features` is empty or no sequence.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from l1inf_optax import linen
        >>> model = linen.AugmentedMLP(features=(900, 10))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 784)))
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'hidden_0': {'augmented_kernel': (785, 900)},
         'readout': {'bias': (10,), 'kernel': (900, 10)}}
    """

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    _repr_html_ = _show

    def __post_init__(self) -> None:
        if not isinstance(self.features, Sequence) or not self.features:
            raise ValueError(
                f"features={self.features!r} must be a non-empty sequence of widths: "
                "pass one for each hidden layer and the readout's last, as in features=(900, 10)"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `inputs`, of shape `(*batch, d_in)`, to `(*batch, features[-1])`."""
        *hidden, readout = self.features
        options: dict[str, Any] = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        for index, width in enumerate(hidden):
            layer = AugmentedDense(width, name=f"hidden_{index}", **options)
            inputs = self.activation(layer(inputs))
        return nn.Dense(readout, name="readout", **options)(inputs)

    def rescale(
        self, variables: Any, inputs: jax.Array, c: Any, *, reference: float = 5.0
    ) -> Rescaled:
        """Scales a fresh network into balls of any radius: see `l1inf_optax.rescale_params`.

        Args:
            variables: from `init`.
            inputs: some inputs, of shape `(batch, d_in)`.
            c: the radii, as for `l1inf_optax.constrain`; the readout stays free.
            reference: the radius whose signal smaller ones get.

        Returns:
            The variables to start from, and the scales for `l1inf_optax.with_scales`.

        Raises:
            ValueError: as `l1inf_optax.rescale_params`.

        Example:
            >>> import jax
            >>> from l1inf_optax import linen
            >>> model, x = linen.AugmentedMLP((16, 16, 3)), jax.numpy.eye(4)
            >>> variables = model.init(jax.random.key(0), x)
            >>> small, scales = model.rescale(variables, x, {"hidden_*": 0.5})
            >>> round(float(scales["params"]["readout"]["kernel"]), 2)
            100.0
        """
        return rescale_params(self.apply, variables, inputs, c, reference=reference)
