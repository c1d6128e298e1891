"""Convolutions that the augmented layers of both Flax interfaces are compared on."""

import jax.numpy as jnp

# name: (shape of the input, options of the layer with 4 input and 8 output channels)
CONVOLUTIONS = {
    "1D": ((2, 9, 4), {"kernel_size": 3}),
    "2D": ((2, 8, 9, 4), {"kernel_size": (3, 2)}),
    "3D": ((2, 5, 6, 7, 4), {"kernel_size": (3, 2, 3)}),
    "no batch axis": ((8, 9, 4), {"kernel_size": (3, 3)}),
    "two batch axes": ((2, 3, 8, 9, 4), {"kernel_size": (3, 3)}),
    "strides": ((2, 8, 9, 4), {"kernel_size": (3, 3), "strides": (2, 1)}),
    "padding VALID": ((2, 8, 9, 4), {"kernel_size": (3, 3), "padding": "VALID"}),
    "padding CIRCULAR": ((2, 8, 9, 4), {"kernel_size": (3, 3), "padding": "CIRCULAR"}),
    "padding REFLECT": ((2, 8, 9, 4), {"kernel_size": (3, 3), "padding": "REFLECT"}),
    "padding CAUSAL": ((2, 9, 4), {"kernel_size": (3,), "padding": "CAUSAL"}),
    "padding int": ((2, 8, 9, 4), {"kernel_size": (3, 3), "padding": 2}),
    "padding ints": ((2, 8, 9, 4), {"kernel_size": (3, 3), "padding": (2, 0)}),
    "padding pairs": ((2, 8, 9, 4), {"kernel_size": (3, 3), "padding": ((0, 2), (1, 0))}),
    "input dilation": (
        (2, 8, 9, 4),
        {"kernel_size": (3, 3), "input_dilation": 2, "padding": 1},
    ),
    "kernel dilation": ((2, 8, 9, 4), {"kernel_size": (3, 3), "kernel_dilation": (1, 2)}),
    "groups": ((2, 8, 9, 4), {"kernel_size": (3, 3), "feature_group_count": 2}),
    "one group per channel": ((2, 8, 9, 4), {"kernel_size": (3, 3), "feature_group_count": 4}),
    "mask": ((2, 9, 4), {"kernel_size": 3, "mask": jnp.tri(12, 8).reshape(3, 4, 8)}),
    "bfloat16": ((2, 8, 9, 4), {"kernel_size": (3, 3), "param_dtype": jnp.bfloat16}),
    "1D without bias": ((2, 9, 4), {"kernel_size": 3, "use_bias": False}),
    "2D without bias": ((2, 8, 9, 4), {"kernel_size": (3, 2), "use_bias": False}),
    "groups without bias": (
        (2, 8, 9, 4),
        {"kernel_size": (3, 3), "feature_group_count": 2, "use_bias": False},
    ),
    "computed in bfloat16": ((2, 8, 9, 4), {"kernel_size": (3, 3), "dtype": jnp.bfloat16}),
}
