"""Layers that the augmented ones of both Flax interfaces are compared on."""

import jax.numpy as jnp

FLOAT32, FLOAT16 = {"param_dtype": jnp.float32}, {"param_dtype": jnp.float16}
BFLOAT16 = {"param_dtype": jnp.bfloat16}
MIXED = {"param_dtype": jnp.float32, "dtype": jnp.bfloat16}

# (axes of the batch, whether there is a bias, dtypes): all pairs of two of these
DENSE = [
    ((), True, FLOAT32),
    ((2, 3), False, FLOAT32),
    ((), False, BFLOAT16),
    ((2, 3), True, BFLOAT16),
    ((), True, FLOAT16),
    ((2, 3), False, FLOAT16),
    ((), False, MIXED),
    ((2, 3), True, MIXED),
]

# name: (shape of the input, options of the layer with 4 input and 8 output channels). Options that
# do not touch each other share a case: every case is two programs to compile.
CONVOLUTIONS = {
    "1D": ((2, 9, 4), {"kernel_size": 3}),
    "2D": ((2, 8, 9, 4), {"kernel_size": (3, 2)}),
    "3D": ((2, 5, 6, 7, 4), {"kernel_size": (3, 2, 3)}),
    "no batch axis, padding VALID": ((8, 9, 4), {"kernel_size": (3, 3), "padding": "VALID"}),
    "two batch axes, strides": ((2, 3, 8, 9, 4), {"kernel_size": (3, 3), "strides": (2, 1)}),
    "kernel dilation, padding CIRCULAR": (
        (2, 8, 9, 4),
        {"kernel_size": (3, 3), "kernel_dilation": (1, 2), "padding": "CIRCULAR"},
    ),
    "padding REFLECT": ((2, 8, 9, 4), {"kernel_size": (3, 3), "padding": "REFLECT"}),
    "padding CAUSAL without bias": (
        (2, 9, 4),
        {"kernel_size": (3,), "padding": "CAUSAL", "use_bias": False},
    ),
    "groups, padding int": (
        (2, 8, 9, 4),
        {"kernel_size": (3, 3), "feature_group_count": 2, "padding": 2},
    ),
    "one group per channel, padding ints": (
        (2, 8, 9, 4),
        {"kernel_size": (3, 3), "feature_group_count": 4, "padding": (2, 0)},
    ),
    "input dilation, padding pairs": (
        (2, 8, 9, 4),
        {"kernel_size": (3, 3), "input_dilation": 2, "padding": ((0, 2), (1, 0))},
    ),
    "groups without bias": (
        (2, 8, 9, 4),
        {"kernel_size": (3, 3), "feature_group_count": 2, "use_bias": False},
    ),
    "mask": ((2, 9, 4), {"kernel_size": 3, "mask": jnp.tri(12, 8).reshape(3, 4, 8)}),
    "bfloat16": ((2, 8, 9, 4), {"kernel_size": (3, 3), "param_dtype": jnp.bfloat16}),
    "computed in bfloat16": ((2, 8, 9, 4), {"kernel_size": (3, 3), "dtype": jnp.bfloat16}),
}
