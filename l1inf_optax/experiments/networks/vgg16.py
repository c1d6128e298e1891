"""VGG-16 for 32 x 32 images with two wide windows, and convolutions that suit it (Section 5.3)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from l1inf_optax.experiments.data.files import CLASSES
from l1inf_optax.linen import AugmentedConv, AugmentedDense

BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)  # widths between poolings
HIDDEN = (512, 512)


def fourier_convolution(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **_: Any
) -> jax.Array:
    """What `jax.lax.conv_general_dilated` gives for stride 1 and padding ``SAME``.

    A product of Fourier transforms costs nearly the same whatever the window. It is a convolution
    on a torus, so the torus is half a window larger than the image: then only what is cut off has
    wrapped around.

    Args:
        x: ``(batch, height, width, d_in)``.
        kernel: ``(rows, columns, d_in, d_out)``, rows and columns odd.
        strides: not read, as what follows.
        padding: not read.

    Returns:
        ``(batch, height, width, d_out)``, of x's dtype.
    """
    reach = _reach(kernel)
    torus = [length + half for length, half in zip(x.shape[1:3], reach, strict=True)]
    x_hat = jnp.fft.rfft2(x.astype(jnp.float32), torus, axes=(1, 2))
    kernel_hat = jnp.fft.rfft2(kernel[::-1, ::-1].astype(jnp.float32), torus, axes=(0, 1))
    y_hat = jnp.einsum("bhwi,hwio->bhwo", x_hat, kernel_hat, precision="highest")
    y = jnp.fft.irfft2(y_hat, torus, axes=(1, 2))
    return y[:, reach[0] :, reach[1] :].astype(x.dtype)


def patch_convolution(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **_: Any
) -> jax.Array:
    """The same by one product of matrices, for small windows on a CPU.

    In a loop, and training is one, XLA's compiler for CPUs makes plain code without vectors of a
    convolution's gradient (https://github.com/jax-ml/jax/issues/12868).
    """
    (rows, columns), (height, width) = kernel.shape[:2], x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *((half, half) for half in _reach(kernel)), (0, 0)))
    window = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(window, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _reach(kernel: jax.Array) -> list[int]:
    """How far a window reaches beyond its middle."""
    return [length // 2 for length in kernel.shape[:2]]


class VGG16(nn.Module):
    """Simonyan and Zisserman's network D for 32 x 32 images, its first two windows 21 x 21.

    Attributes:
        dtype: of the activations; parameters and the logits are float32.
        activation: applied after each hidden dense layer.
    """

    dtype: Dtype = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, 32, 32, 3)`` pixels from 0 to 255 to ``(batch, 10)`` logits."""
        common: dict[str, Any] = {"dtype": self.dtype, "kernel_init": nn.initializers.he_uniform()}
        small = patch_convolution if jax.default_backend() == "cpu" else None
        x = images.astype(self.dtype) / 127.5 - 1
        for index, block in enumerate(BLOCKS):
            for position, width in enumerate(block):
                if index == 0:
                    layer: nn.Conv = AugmentedConv(
                        width,
                        (21, 21),
                        conv_general_dilated=fourier_convolution,
                        name=f"wide_{position}",
                        **common,
                    )
                else:
                    layer = nn.Conv(
                        width,
                        (3, 3),
                        conv_general_dilated=small,
                        name=f"block_{index}_{position}",
                        **common,
                    )
                x = nn.relu(layer(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for position, width in enumerate(HIDDEN):
            x = self.activation(AugmentedDense(width, name=f"hidden_{position}", **common)(x))
        return nn.Dense(CLASSES, name="readout")(x.astype(jnp.float32))
