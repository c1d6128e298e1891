"""The NNX layers are Flax's own, with bias and weights in one matrix."""

import copy
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from l1inf_optax import nnx as l1inf_nnx
from tests.support.modules import CONVOLUTIONS, DENSE

NAME = "augmented_kernel"
NORMAL = nnx.initializers.normal()


def normal(shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def augment(plain):
    """The state of a plain layer as the matrix of an augmented one, stacked by NumPy."""
    kernel = np.asarray(plain["kernel"][...])
    rows = kernel.reshape(-1, kernel.shape[-1])
    if "bias" in plain:
        rows = np.vstack([np.asarray(plain["bias"][...]), rows])
    return rows


def param_shapes(module):
    return {
        "/".join(map(str, path)): leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def loss_and_output(layer, x):
    out = layer(x)
    return jnp.sum(out.astype(jnp.float32) ** 2), out


def assert_close(actual, expected, dtype):
    """To the rounding of `dtype`: compilers may fuse the two layers differently."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    atol = 16 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def assert_same_layer(layer, plain, x):
    """Same initial weights, bit for bit, same result and, row by row, same gradients."""
    assert param_shapes(layer).keys() == {NAME}
    assert layer.augmented_kernel.dtype == plain.kernel.dtype
    np.testing.assert_array_equal(layer.augmented_kernel[...], augment(nnx.state(plain, nnx.Param)))
    gradient = nnx.jit(nnx.grad(loss_and_output, has_aux=True))
    grads, out = gradient(layer, x)
    expected_grads, expected = gradient(plain, x)
    assert out.dtype == expected.dtype
    assert_close(out, expected, out.dtype)
    assert_close(grads[NAME][...], augment(expected_grads), out.dtype)


@pytest.mark.parametrize(("batch", "use_bias", "dtypes"), DENSE)
def test_linear_starts_and_computes_as_in_flax(dtypes, batch, use_bias):
    x = normal((*batch, 7), dtypes["param_dtype"])
    options = {"use_bias": use_bias, "bias_init": NORMAL, **dtypes}
    layer = l1inf_nnx.AugmentedLinear(7, 4, rngs=nnx.Rngs(0), **options)
    assert_same_layer(layer, nnx.Linear(7, 4, rngs=nnx.Rngs(0), **options), x)


def test_linear_is_the_product_with_the_augmented_matrix():
    layer = l1inf_nnx.AugmentedLinear(7, 4, bias_init=NORMAL, rngs=nnx.Rngs(0))
    x = normal((5, 7))
    with_one = np.hstack([np.ones((5, 1)), np.asarray(x, np.float64)])
    expected = with_one @ np.asarray(layer.augmented_kernel[...], np.float64)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv_starts_and_computes_as_in_flax(case):
    shape, options = CONVOLUTIONS[case]
    options = {"bias_init": NORMAL, **options}
    x = normal(shape, options.get("param_dtype", jnp.float32))
    layer = l1inf_nnx.AugmentedConv(4, 8, rngs=nnx.Rngs(0), **options)
    assert_same_layer(layer, nnx.Conv(4, 8, rngs=nnx.Rngs(0), **options), x)


def test_a_column_of_the_conv_is_all_that_flows_into_its_channel():
    layer = l1inf_nnx.AugmentedConv(
        2, 4, (3, 3), padding="VALID", bias_init=NORMAL, rngs=nnx.Rngs(0)
    )
    x = normal((5, 6, 2))
    patches = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), (3, 3), (0, 1))
    windows = np.moveaxis(patches, 2, -1).reshape(3, 4, 18)
    with_one = np.concatenate([np.ones((3, 4, 1)), windows], axis=-1)
    expected = with_one @ np.asarray(layer.augmented_kernel[...], np.float64)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((3, 4), {}, (4, 4)),
        ((3, 4), {"use_bias": False}, (3, 4)),
        ((4, 8, 3), {}, (13, 8)),
        ((4, 8, (3, 2)), {}, (25, 8)),
        ((4, 8, (3, 2)), {"use_bias": False}, (24, 8)),
        ((4, 8, (3, 2)), {"feature_group_count": 4}, (7, 8)),
    ],
)
def test_the_only_parameter_is_the_augmented_matrix(args, options, expected):
    make = l1inf_nnx.AugmentedLinear if len(args) == 2 else l1inf_nnx.AugmentedConv
    assert param_shapes(make(*args, rngs=nnx.Rngs(0), **options)) == {NAME: expected}


@pytest.mark.parametrize(
    ("layer", "plain"),
    [(l1inf_nnx.AugmentedLinear, nnx.Linear), (l1inf_nnx.AugmentedConv, nnx.Conv)],
)
def test_arguments_are_those_of_flax(layer, plain):
    assert inspect.signature(layer.__init__) == inspect.signature(plain.__init__)


def test_layers_in_a_row_draw_their_keys_as_in_flax():
    rngs, plain_rngs = nnx.Rngs(params=0), nnx.Rngs(params=0)
    for use_bias in (True, False, True):
        options = {"bias_init": NORMAL, "use_bias": use_bias}
        layer = l1inf_nnx.AugmentedLinear(3, 4, rngs=rngs, **options)
        plain = nnx.Linear(3, 4, rngs=plain_rngs, **options)
        np.testing.assert_array_equal(
            layer.augmented_kernel[...], augment(nnx.state(plain, nnx.Param))
        )


def test_kernel_and_bias_read_the_matrix_as_it_is_now():
    layer = l1inf_nnx.AugmentedConv(2, 4, 3, rngs=nnx.Rngs(0))
    v = normal((7, 4))
    layer.augmented_kernel[...] = v
    np.testing.assert_array_equal(layer.kernel[...], v[1:].reshape(3, 2, 4))
    np.testing.assert_array_equal(layer.bias[...], v[0])
    assert l1inf_nnx.AugmentedLinear(2, 4, use_bias=False, rngs=nnx.Rngs(0)).bias is None


# What is done with a parameter: a function of a matrix and of one like it.
USES = {
    "shape, ndim, dtype, size": lambda w: (*w.shape, w.ndim, w.dtype == jnp.float32, w.size),
    "methods": lambda w: (w.T, w.mean(0), w.astype(jnp.float16), w.at[0].set(7.0)),
    "np.asarray": lambda w: (np.asarray(w), np.asarray(w, np.float64), np.array(w)),
    "numpy functions": lambda w: (np.abs(w), np.sum(w), np.linalg.norm(w), np.add.reduce(w)),
    "jnp functions": lambda w: (jnp.asarray(w), jnp.abs(w), jnp.sum(w), jnp.stack([w, w])),
    "arithmetic": lambda w: (w + 1, 2 - w, w * w, -w, w / 3, w**2, abs(w), divmod(w, 2)),
    "products": lambda w: (w @ jnp.ones(4), np.ones((2, 3)) @ w, jnp.ones((2, 3)) @ w, w.T @ w),
    "comparisons": lambda w: (w == w, w > 0, w != 0),
    "indices": lambda w: (w[0], w[...], w[:, 1:], len(w), list(w)[1]),
    "a pytree": lambda w: (jax.tree.leaves(w), jax.jit(lambda w: w * 2)(w), optax.tree.norm(w)),
    "derivatives": lambda w: jnp.asarray(jax.grad(lambda w: jnp.sum(w * w))(w)),
    "copies": lambda w: (jnp.asarray(copy.deepcopy(w)), jnp.asarray(jax.device_get(w))),
}


@pytest.mark.parametrize("use", USES)
def test_kernel_behaves_like_the_array_of_a_flax_parameter(use):
    layer = l1inf_nnx.AugmentedLinear(3, 4, bias_init=NORMAL, rngs=nnx.Rngs(0))
    array = jnp.asarray(np.asarray(layer.augmented_kernel[...])[1:])
    for got, expected in zip(
        *map(jax.tree.leaves, (USES[use](layer.kernel), USES[use](array))), strict=True
    ):
        assert isinstance(got, jax.Array) or not isinstance(expected, jax.Array)
        np.testing.assert_array_equal(got, expected)


def test_bias_is_an_array_with_a_value():
    layer = l1inf_nnx.AugmentedLinear(3, 4, bias_init=NORMAL, rngs=nnx.Rngs(0))
    row = np.asarray(layer.augmented_kernel[...])[0]
    assert layer.bias.shape == (4,)
    for value in (layer.bias.value, layer.bias.get_value(), layer.bias[...], layer.bias + 0):
        assert isinstance(value, jax.Array)
        np.testing.assert_array_equal(value, row)
    assert float(layer.bias[2]) == row[2]
    assert "View(" in repr(layer.bias)


def test_writing_to_kernel_or_bias_is_refused():
    layer = l1inf_nnx.AugmentedLinear(2, 4, rngs=nnx.Rngs(0))
    before = np.asarray(layer.augmented_kernel[...])
    kernel = bias = jnp.ones(())

    def assign(layer):
        layer.kernel = nnx.Param(kernel)

    def add(layer):
        layer.bias += 1

    def set_item(layer):
        layer.kernel[...] = kernel

    def set_attribute(layer):
        layer.bias.value = bias

    def set_value(layer):
        layer.bias.set_value(bias)

    def update(layer):
        nnx.update(layer, {"kernel": kernel})

    for write in (assign, add, set_item, set_attribute, set_value, update):
        with pytest.raises((AttributeError, TypeError), match="write to the matrix"):
            write(layer)
    np.testing.assert_array_equal(layer.augmented_kernel[...], before)
    assert param_shapes(layer).keys() == {NAME}


@pytest.mark.skipif(not hasattr(nnx, "WeightNorm"), reason="Flax 0.12.0 has none")
def test_norms_of_flax_around_a_layer_do_what_its_docstring_says():
    def layer():
        return l1inf_nnx.AugmentedLinear(3, 4, bias_init=NORMAL, rngs=nnx.Rngs(0))

    x, before = normal((5, 3)), np.asarray(layer().augmented_kernel[...])
    both = nnx.PathContains(NAME)
    wrapped = [
        nnx.WeightNorm(layer(), rngs=nnx.Rngs(1)),
        nnx.WeightNorm(layer(), variable_filter=both, rngs=nnx.Rngs(1)),
        nnx.SpectralNorm(layer(), n_steps=50, rngs=nnx.Rngs(1)),
    ]
    lengths = np.linalg.norm(before, axis=0), np.linalg.norm(before, 2)
    for model, divisor in zip(wrapped, (1, *lengths), strict=True):
        expected = np.hstack([np.ones((5, 1)), x]) @ (before / divisor)
        np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def test_lora_adds_to_the_layer():
    layer = l1inf_nnx.AugmentedLinear(3, 4, bias_init=NORMAL, rngs=nnx.Rngs(0))
    wrapped = nnx.LoRA(3, 2, 4, base_module=layer, b_initializer=NORMAL, rngs=nnx.Rngs(1))
    x = normal((5, 3))
    expected = layer(x) + x @ wrapped.lora_a[...] @ wrapped.lora_b[...]
    np.testing.assert_allclose(wrapped(x), expected, rtol=1e-5, atol=1e-6)


def test_layers_split_merge_and_copy():
    layer = l1inf_nnx.AugmentedConv(2, 4, 3, bias_init=NORMAL, rngs=nnx.Rngs(0))
    x = normal((2, 9, 2))
    for twin in (nnx.merge(*nnx.split(layer)), nnx.clone(layer), copy.deepcopy(layer)):
        np.testing.assert_array_equal(twin(x), layer(x))


def test_layers_train_under_an_optimizer():
    layer = l1inf_nnx.AugmentedLinear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.01), wrt=nnx.Param)
    x = normal((5, 3))

    @nnx.jit
    def step(layer, optimizer):
        (value, _), grads = nnx.value_and_grad(loss_and_output, has_aux=True)(layer, x)
        optimizer.update(layer, grads)
        return value

    before = step(layer, optimizer)
    assert step(layer, optimizer) < before


@pytest.mark.parametrize(
    ("args", "shape", "expected"),
    [((5, 6), (2, 5), (3, 6, 6)), ((5, 6, 3), (2, 9, 5), (3, 16, 6))],
)
def test_stacked_layers_keep_rows_and_units_last(args, shape, expected):
    make = l1inf_nnx.AugmentedLinear if len(args) == 2 else l1inf_nnx.AugmentedConv

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return make(*args, bias_init=NORMAL, rngs=rngs)

    layers = stack(nnx.Rngs(0))
    matrices = layers.augmented_kernel[...]
    assert matrices.shape == expected
    assert not np.array_equal(matrices[0], matrices[1])
    x = normal((3, *shape))
    out = nnx.vmap(lambda layer, x: layer(x))(layers, x)
    single = make(*args, rngs=nnx.Rngs(0))
    for index in range(3):
        single.augmented_kernel[...] = matrices[index]
        np.testing.assert_allclose(out[index], single(x[index]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(layers.kernel[...][index], single.kernel[...])
        np.testing.assert_array_equal(layers.bias[...][index], single.bias[...])


def test_scanned_layers_apply_one_after_the_other():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return l1inf_nnx.AugmentedLinear(5, 5, bias_init=NORMAL, rngs=rngs)

    layers, x = stack(nnx.Rngs(0)), normal((2, 5))
    forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    expected = np.asarray(x, np.float64)
    for v in np.asarray(layers.augmented_kernel[...], np.float64):
        expected = expected @ v[1:] + v[0]
    np.testing.assert_allclose(forward(x, layers), expected, rtol=1e-5, atol=1e-6)


def partition_specs(layer):
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))


@pytest.fixture
def mesh():
    axes = ("embed", "mlp")
    mesh = jax.make_mesh((1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        yield


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_carries_the_partitioning_of_its_kernel(use_bias):
    options = {
        "use_bias": use_bias,
        "kernel_init": nnx.with_partitioning(
            nnx.initializers.lecun_normal(), ("embed", "mlp"), tag="hidden"
        ),
        "bias_init": nnx.with_partitioning(NORMAL, ("mlp",)),
    }
    layer = l1inf_nnx.AugmentedLinear(3, 4, rngs=nnx.Rngs(0), **options)
    plain = nnx.Linear(3, 4, rngs=nnx.Rngs(0), **options)
    assert partition_specs(layer)[NAME] == P("embed", "mlp")
    assert layer.augmented_kernel.get_metadata() == plain.kernel.get_metadata()
    assert_same_layer(layer, plain, normal((2, 3)))


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize(
    ("names", "expected"),
    [((None, None, "embed", "mlp"), P(None, "mlp")), ((None, None), P(None))],
)
def test_conv_carries_the_name_of_its_units(names, expected):
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    layer = l1inf_nnx.AugmentedConv(2, 4, (3, 3), kernel_init=kernel_init, rngs=nnx.Rngs(0))
    assert partition_specs(layer)[NAME] == expected


@pytest.mark.usefixtures("mesh")
def test_kernel_metadata_is_the_metadata_of_the_matrix():
    metadata = {"out_sharding": (None, None, "embed", "mlp"), "tag": "hidden"}
    if "kernel_metadata" not in inspect.signature(nnx.Conv.__init__).parameters:
        pytest.skip("this Flax has no kernel_metadata")
    layer = l1inf_nnx.AugmentedConv(
        2,
        4,
        (3, 3),
        kernel_metadata=metadata,
        bias_metadata={"out_sharding": ("mlp",)},
        rngs=nnx.Rngs(0),
    )
    assert layer.augmented_kernel.tag == "hidden"
    assert partition_specs(layer)[NAME] == P(None, "mlp")


def test_a_kernel_without_names_has_none():
    layer = l1inf_nnx.AugmentedLinear(3, 4, rngs=nnx.Rngs(0))
    assert partition_specs(layer)[NAME] == P()


@pytest.mark.usefixtures("mesh")
def test_stacked_layers_name_their_new_axis():
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))

    @nnx.split_rngs(splits=3)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def stack(rngs):
        return l1inf_nnx.AugmentedLinear(3, 4, kernel_init=kernel_init, rngs=rngs)

    specs = partition_specs(stack(nnx.Rngs(0)))
    assert specs[NAME] == P(None, "embed", "mlp")


def products(layer, shape, primitive):
    jaxpr = jax.make_jaxpr(lambda x: layer(x))(jnp.ones(shape))
    return [e.params["precision"] for e in jaxpr.eqns if e.primitive.name == primitive]


def test_precision_reaches_the_product():
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    linear = l1inf_nnx.AugmentedLinear(3, 4, precision="highest", rngs=nnx.Rngs(0))
    conv = l1inf_nnx.AugmentedConv(3, 4, 3, precision="highest", rngs=nnx.Rngs(0))
    default = l1inf_nnx.AugmentedLinear(3, 4, rngs=nnx.Rngs(0))
    assert products(linear, (2, 3), "dot_general") == [highest]
    assert products(conv, (2, 9, 3), "conv_general_dilated") == [highest]
    assert products(default, (2, 3), "dot_general") == [None]


@pytest.mark.parametrize(
    ("make", "args", "product", "shape"),
    [
        (l1inf_nnx.AugmentedLinear, (3, 4), lax.dot_general, (2, 3)),
        (l1inf_nnx.AugmentedConv, (3, 4, 3), lax.conv_general_dilated, (2, 9, 3)),
    ],
)
def test_own_product_replaces_the_product(make, args, product, shape):
    def doubled(*args, **kwargs):
        return 2 * product(*args, **kwargs)

    x = normal(shape)
    layer = make(*args, rngs=nnx.Rngs(0), **{product.__name__: doubled})
    np.testing.assert_array_equal(layer(x), 2 * make(*args, rngs=nnx.Rngs(0))(x))


def test_preferred_element_type_and_promote_dtype_reach_the_product():
    seen = []

    def promote(arrays, *, dtype):
        seen.append([array.shape for array in arrays])
        return [array.astype(jnp.bfloat16) for array in arrays]

    layer = l1inf_nnx.AugmentedLinear(
        3, 4, promote_dtype=promote, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)
    )
    assert layer(jnp.ones((2, 3))).dtype == jnp.float32
    assert seen == [[(2, 3), (3, 4), (4,)]]


@pytest.mark.parametrize(("d_in", "d_out", "groups"), [(4, 6, 3), (6, 4, 3)])
def test_groups_that_do_not_divide_the_channels_are_refused(d_in, d_out, groups):
    with pytest.raises(ValueError, match=r"feature_group_count=3 .* pass a common divisor"):
        l1inf_nnx.AugmentedConv(d_in, d_out, 3, feature_group_count=groups, rngs=nnx.Rngs(0))


def test_mlp_is_augmented_hidden_layers_and_a_free_readout():
    model = l1inf_nnx.AugmentedMLP(
        3, (5, 4, 2), activation=jnp.tanh, bias_init=NORMAL, rngs=nnx.Rngs(0)
    )
    assert param_shapes(model) == {
        f"hidden_0/{NAME}": (4, 5),
        f"hidden_1/{NAME}": (6, 4),
        "readout/kernel": (4, 2),
        "readout/bias": (2,),
    }
    x = normal((6, 3))
    h = np.asarray(x, np.float64)
    for layer in (model.hidden_0, model.hidden_1):
        v = np.asarray(layer.augmented_kernel[...], np.float64)
        h = np.tanh(h @ v[1:] + v[0])
    kernel, bias = (
        np.asarray(each[...], np.float64) for each in (model.readout.kernel, model.readout.bias)
    )
    np.testing.assert_allclose(model(x), h @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_mlp_starts_as_flax_layers_made_in_a_row():
    model = l1inf_nnx.AugmentedMLP(3, (5, 2), bias_init=NORMAL, rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(0)
    hidden, readout = (
        nnx.Linear(*widths, bias_init=NORMAL, rngs=rngs) for widths in ((3, 5), (5, 2))
    )
    x = normal((6, 3))
    assert_close(model(x), readout(jnp.maximum(hidden(x), 0)), jnp.float32)


def test_mlp_of_one_width_is_the_readout():
    model = l1inf_nnx.AugmentedMLP(3, (2,), rngs=nnx.Rngs(0))
    assert param_shapes(model) == {"readout/kernel": (3, 2), "readout/bias": (2,)}


def test_mlp_passes_its_options_to_every_layer():
    model = l1inf_nnx.AugmentedMLP(
        3,
        features=[5, 2],
        use_bias=False,
        dtype=jnp.float16,
        param_dtype=jnp.bfloat16,
        precision="highest",
        kernel_init=nnx.initializers.constant(0.5),
        rngs=nnx.Rngs(0),
    )
    assert param_shapes(model) == {f"hidden_0/{NAME}": (3, 5), "readout/kernel": (5, 2)}
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert leaf.dtype == jnp.bfloat16
        assert (leaf == 0.5).all()
    assert model(jnp.ones((6, 3))).dtype == jnp.float16
    assert products(model, (6, 3), "dot_general") == [(lax.Precision.HIGHEST,) * 2] * 2


def test_mlp_passes_bias_init_to_every_layer():
    model = l1inf_nnx.AugmentedMLP(
        3, (5, 2), bias_init=nnx.initializers.constant(0.25), rngs=nnx.Rngs(0)
    )
    assert (model.hidden_0.augmented_kernel[...][0] == 0.25).all()
    assert (model.readout.bias[...] == 0.25).all()


@pytest.mark.parametrize("features", [(), [], 10])
def test_mlp_without_widths_is_refused(features):
    with pytest.raises(ValueError, match=r"features=.* as in features=\(900, 10\)"):
        l1inf_nnx.AugmentedMLP(3, features, rngs=nnx.Rngs(0))
