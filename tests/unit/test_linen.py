"""The Linen layers are Flax's own, with bias and weights in one matrix."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P

from l1inf_optax import linen
from tests.support.modules import CONVOLUTIONS, DENSE

NAME = "augmented_kernel"
NORMAL = nn.initializers.normal()


def normal(shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def augment(plain):
    """The parameters of a plain layer as those of an augmented one, stacked by NumPy."""
    kernel = np.asarray(plain["kernel"])
    rows = kernel.reshape(-1, kernel.shape[-1])
    if "bias" in plain:
        rows = np.vstack([np.asarray(plain["bias"]), rows])
    return {NAME: jnp.asarray(rows)}


def assert_close(actual, expected, dtype):
    """To the rounding of `dtype`: compilers may fuse the two layers differently."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    atol = 16 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def assert_same_layer(layer, plain, x):
    """Same result and, row by row, same gradients."""
    params = plain.init(jax.random.key(1), x)["params"]

    @jax.jit
    def run(params, x):
        out, pullback = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)
        return out, pullback(out)

    @jax.jit
    def run_plain(params, x):
        out, pullback = jax.vjp(lambda p, x: plain.apply({"params": p}, x), params, x)
        return out, pullback(out)

    out, (grads, grad_x) = run(augment(params), x)
    expected, (expected_grads, expected_grad_x) = run_plain(params, x)
    assert out.dtype == expected.dtype
    assert_close(out, expected, out.dtype)
    assert_close(grad_x, expected_grad_x, out.dtype)
    assert grads.keys() == {NAME}
    assert grads[NAME].dtype == expected_grads["kernel"].dtype
    assert_close(grads[NAME], augment(expected_grads)[NAME], out.dtype)


@pytest.mark.parametrize(("batch", "use_bias", "dtypes"), DENSE)
def test_dense_computes_what_flax_computes(dtypes, batch, use_bias):
    x = normal((*batch, 7), dtypes["param_dtype"])
    options = {"features": 4, "use_bias": use_bias, "bias_init": NORMAL, **dtypes}
    assert_same_layer(linen.AugmentedDense(**options), nn.Dense(**options), x)


def test_dense_is_the_product_with_the_augmented_matrix():
    v, x = normal((8, 4)), normal((5, 7), seed=1)
    out = linen.AugmentedDense(4).apply({"params": {NAME: v}}, x)
    with_one = np.hstack([np.ones((5, 1)), np.asarray(x, np.float64)])
    np.testing.assert_allclose(out, with_one @ np.asarray(v, np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv_computes_what_flax_computes(case):
    shape, options = CONVOLUTIONS[case]
    options = {"features": 8, "bias_init": NORMAL, **options}
    x = normal(shape, options.get("param_dtype", jnp.float32))
    assert_same_layer(linen.AugmentedConv(**options), nn.Conv(**options), x)


def test_a_column_of_the_conv_is_all_that_flows_into_its_channel():
    v, x = normal((1 + 3 * 3 * 2, 4)), normal((5, 6, 2), seed=1)
    out = linen.AugmentedConv(4, (3, 3), padding="VALID").apply({"params": {NAME: v}}, x)
    patches = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), (3, 3), (0, 1))
    windows = np.moveaxis(patches, 2, -1).reshape(3, 4, 18)
    with_one = np.concatenate([np.ones((3, 4, 1)), windows], axis=-1)
    np.testing.assert_allclose(out, with_one @ np.asarray(v, np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (linen.AugmentedDense(4), (2, 3), (4, 4)),
        (linen.AugmentedDense(4, use_bias=False), (2, 3), (3, 4)),
        (linen.AugmentedConv(8, 3), (2, 9, 4), (13, 8)),
        (linen.AugmentedConv(8, (3, 2)), (2, 9, 9, 4), (25, 8)),
        (linen.AugmentedConv(8, (3, 2), use_bias=False), (2, 9, 9, 4), (24, 8)),
        (linen.AugmentedConv(8, (3, 2), feature_group_count=4), (2, 9, 9, 4), (7, 8)),
    ],
)
def test_the_only_parameter_is_the_augmented_matrix(layer, shape, expected):
    variables = layer.init(jax.random.key(0), jnp.ones(shape))
    assert jax.tree.map(jnp.shape, variables) == {"params": {NAME: expected}}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("layer", "plain", "options", "shape"),
    [
        (linen.AugmentedDense, nn.Dense, {}, (2, 7)),
        (linen.AugmentedConv, nn.Conv, {"kernel_size": (3, 2)}, (2, 8, 9, 6)),
        (linen.AugmentedConv, nn.Conv, {"kernel_size": 3, "feature_group_count": 2}, (2, 9, 6)),
    ],
)
def test_one_key_gives_the_weights_it_gives_in_flax(
    layer, plain, options, shape, param_dtype, use_bias
):
    options = {"features": 4, "use_bias": use_bias, "param_dtype": param_dtype, **options}
    args = jax.random.key(3), jnp.ones(shape, param_dtype)
    params = layer(bias_init=NORMAL, **options).init(*args)["params"]
    expected = augment(plain(bias_init=NORMAL, **options).init(*args)["params"])
    assert params[NAME].dtype == param_dtype
    np.testing.assert_array_equal(params[NAME], expected[NAME])


def test_bias_starts_at_zero_by_default():
    params = linen.AugmentedDense(4).init(jax.random.key(0), jnp.ones((2, 3)))["params"]
    assert not params[NAME][0].any()
    assert params[NAME][1:].all()


def test_parameters_may_be_created_while_applying():
    x, rngs = jnp.ones((2, 3)), {"params": jax.random.key(0)}
    layer = linen.AugmentedDense(4, bias_init=NORMAL)
    _, created = layer.apply({}, x, rngs=rngs, mutable=["params"])
    expected = layer.init(rngs, x)["params"][NAME]
    np.testing.assert_array_equal(created["params"][NAME], expected)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (linen.AugmentedDense(6), (2, 5, 5), (3, 6, 6)),
        (linen.AugmentedConv(5, 3), (2, 9, 5), (3, 16, 5)),
    ],
)
def test_stacked_layers_keep_rows_and_units_last(layer, shape, expected):
    stacked_layer = nn.vmap(
        type(layer), variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
    )
    options = {f: getattr(layer, f) for f in ("features", "kernel_size") if hasattr(layer, f)}
    x = normal((3, *shape))
    variables = stacked_layer(**options, bias_init=NORMAL).init(jax.random.key(0), x)
    stack = variables["params"][NAME]
    assert stack.shape == expected
    assert not np.array_equal(stack[0], stack[1])
    out = stacked_layer(**options).apply(variables, x)
    for index in range(3):
        single = layer.apply({"params": {NAME: stack[index]}}, x[index])
        np.testing.assert_allclose(out[index], single, rtol=1e-5, atol=1e-6)


def test_scanned_layers_keep_rows_and_units_last():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return linen.AugmentedDense(5, name="hidden", bias_init=NORMAL)(x), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = normal((2, 5))
    variables = scanned.init(jax.random.key(0), x, None)
    stack = variables["params"]["hidden"][NAME]
    assert stack.shape == (3, 6, 5)
    out, _ = scanned.apply(variables, x, None)
    expected = np.asarray(x, np.float64)
    for v in np.asarray(stack, np.float64):
        expected = expected @ v[1:] + v[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lift", [nn.jit, nn.remat])
@pytest.mark.parametrize("layer", [linen.AugmentedDense, linen.AugmentedConv])
def test_lifted_layers_compute_the_same(lift, layer):
    options = {"features": 4, **({"kernel_size": 3} if layer is linen.AugmentedConv else {})}
    x = normal((2, 9, 5))
    variables = layer(**options).init(jax.random.key(0), x)
    expected = layer(**options).apply(variables, x)
    lifted = lift(layer)(**options)
    np.testing.assert_allclose(lifted.apply(variables, x), expected, rtol=1e-6, atol=1e-6)
    assert jax.tree.map(jnp.shape, lifted.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, variables
    )


PARTITIONINGS = [nn.with_partitioning, nn.with_logical_partitioning]


@pytest.mark.parametrize("partitioning", PARTITIONINGS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_carries_the_partitioning_of_its_kernel(partitioning, use_bias):
    options = {
        "features": 4,
        "use_bias": use_bias,
        "kernel_init": partitioning(nn.initializers.lecun_normal(), ("embed", "mlp")),
        "bias_init": partitioning(nn.initializers.zeros_init(), ("mlp",)),
    }
    x = jnp.ones((2, 3))
    variables = linen.AugmentedDense(**options).init(jax.random.key(0), x)
    plain = nn.Dense(**options).init(jax.random.key(0), x)
    assert type(variables["params"][NAME]) is type(plain["params"]["kernel"])
    assert nn.get_partition_spec(variables)["params"] == {NAME: P("embed", "mlp")}
    np.testing.assert_array_equal(
        variables["params"][NAME].unbox(), augment(nn.meta.unbox(plain["params"]))[NAME]
    )
    assert linen.AugmentedDense(**options).apply(variables, x).shape == (2, 4)


@pytest.mark.parametrize("partitioning", PARTITIONINGS)
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((None, None, "conv_in", "conv_out"), P(None, "conv_out")),
        (("height", "width"), P(None)),
    ],
)
def test_conv_carries_the_name_of_its_units(partitioning, names, expected):
    kernel_init = partitioning(nn.initializers.lecun_normal(), names)
    layer = linen.AugmentedConv(4, (3, 3), kernel_init=kernel_init)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 5, 5, 3)))
    assert nn.get_partition_spec(variables)["params"] == {NAME: expected}


def test_a_kernel_without_names_stays_unboxed():
    bias_init = nn.with_partitioning(nn.initializers.zeros_init(), ("mlp",))
    variables = linen.AugmentedDense(4, bias_init=bias_init).init(
        jax.random.key(0), jnp.ones((2, 3))
    )
    assert isinstance(variables["params"][NAME], jax.Array)


def test_stacked_layers_name_their_new_axis():
    stacked = nn.vmap(
        linen.AugmentedDense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    variables = stacked(4, kernel_init=kernel_init).init(jax.random.key(0), jnp.ones((2, 3)))
    assert nn.get_partition_spec(variables)["params"] == {NAME: P("layers", "embed", "mlp")}


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_norms_of_flax_around_a_layer_do_what_its_docstring_says(wrapper):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = linen.AugmentedDense(4, name="hidden", bias_init=NORMAL)
            if wrapper is nn.SpectralNorm:
                return nn.SpectralNorm(layer, n_steps=50)(x, update_stats=True)
            return nn.WeightNorm(layer)(x)

    x = normal((5, 3))
    variables = Model().init(jax.random.key(0), x)
    matrix = normal((4, 4), seed=2)
    variables["params"]["hidden"][NAME] = matrix
    out, _ = Model().apply(variables, x, mutable=["batch_stats"])
    columns = wrapper is nn.WeightNorm
    divisor = np.linalg.norm(matrix, axis=0) if columns else np.linalg.norm(matrix, 2)
    expected = np.hstack([np.ones((5, 1)), x]) @ (np.asarray(matrix) / divisor)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "axes"),
    [
        pytest.param(linen.AugmentedDense(4), "b, 3", id="dense"),
        pytest.param(linen.AugmentedDense(4), "b, t, 3", id="dense, two axes"),
        pytest.param(linen.AugmentedConv(4, 3), "b, 9, 3", id="conv"),
    ],
)
def test_layers_are_exported_for_batches_of_any_size(layer, axes):
    variables = layer.init(jax.random.key(0), jnp.ones((2, 9, 3)))
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(axes), jnp.float32)
    exported = jax.export.export(jax.jit(layer.apply))(variables, x)
    shape = tuple(n if isinstance(n, int) else 2 for n in x.shape)
    np.testing.assert_allclose(
        exported.call(variables, normal(shape)), layer.apply(variables, normal(shape)), rtol=1e-6
    )


def products(layer, shape, primitive):
    variables = layer.init(jax.random.key(0), jnp.ones(shape))
    jaxpr = jax.make_jaxpr(layer.apply)(variables, jnp.ones(shape))
    return [e.params["precision"] for e in jaxpr.eqns if e.primitive.name == primitive]


def test_precision_reaches_the_product():
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    dense = linen.AugmentedDense(4, precision="highest")
    conv = linen.AugmentedConv(4, 3, precision="highest")
    assert products(dense, (2, 3), "dot_general") == [highest]
    assert products(conv, (2, 9, 3), "conv_general_dilated") == [highest]
    assert products(linen.AugmentedDense(4), (2, 3), "dot_general") == [None]


@pytest.mark.parametrize("as_class", [True, False])
@pytest.mark.parametrize(
    ("layer", "argument", "product", "options", "shape"),
    [
        (linen.AugmentedDense, "dot_general", lax.dot_general, {}, (2, 3)),
        (
            linen.AugmentedConv,
            "conv_general_dilated",
            lax.conv_general_dilated,
            {"kernel_size": 3},
            (2, 9, 3),
        ),
    ],
)
def test_own_product_replaces_the_product(layer, argument, product, options, shape, as_class):
    def doubled(*args, **kwargs):
        return 2 * product(*args, **kwargs)

    own = {f"{argument}_cls": lambda: doubled} if as_class else {argument: doubled}
    x = normal(shape)
    variables = layer(4, **options).init(jax.random.key(0), x)
    out = layer(4, **options, **own).apply(variables, x)
    np.testing.assert_array_equal(out, 2 * layer(4, **options).apply(variables, x))


def test_promote_dtype_sees_input_kernel_and_bias():
    seen = []

    def promote(*args, dtype):
        seen.append([a.shape for a in args])
        return list(args)

    layer = linen.AugmentedDense(4, promote_dtype=promote)
    layer.init(jax.random.key(0), jnp.ones((2, 3)))
    assert seen == [[(2, 3), (3, 4), (4,)]]


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(flax.errors.ScopeParamShapeError, match=NAME):
        linen.AugmentedDense(4).apply({"params": {NAME: jnp.ones((3, 4))}}, jnp.ones((2, 3)))


@pytest.mark.parametrize(("d_in", "features", "groups"), [(4, 6, 3), (6, 4, 3)])
def test_groups_that_do_not_divide_the_channels_are_refused(d_in, features, groups):
    layer = linen.AugmentedConv(features, 3, feature_group_count=groups)
    with pytest.raises(ValueError, match=r"feature_group_count=3 .* pass a common divisor"):
        layer.init(jax.random.key(0), jnp.ones((2, 9, d_in)))


def test_mlp_is_augmented_hidden_layers_and_a_free_readout():
    model = linen.AugmentedMLP((5, 4, 2), activation=jnp.tanh, bias_init=NORMAL)
    x = normal((6, 3))
    variables = model.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "hidden_0": {NAME: (4, 5)},
        "hidden_1": {NAME: (6, 4)},
        "readout": {"kernel": (4, 2), "bias": (2,)},
    }
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    h = np.asarray(x, np.float64)
    for name in ("hidden_0", "hidden_1"):
        h = np.tanh(h @ params[name][NAME][1:] + params[name][NAME][0])
    expected = h @ params["readout"]["kernel"] + params["readout"]["bias"]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_mlp_is_rectified_by_default():
    x = normal((6, 3))
    variables = linen.AugmentedMLP((5, 2)).init(jax.random.key(0), x)
    relu = linen.AugmentedMLP((5, 2), activation=lambda h: jnp.maximum(h, 0))
    np.testing.assert_array_equal(
        linen.AugmentedMLP((5, 2)).apply(variables, x), relu.apply(variables, x)
    )


def test_mlp_of_one_width_is_the_readout():
    variables = linen.AugmentedMLP((2,)).init(jax.random.key(0), jnp.ones((6, 3)))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "readout": {"kernel": (3, 2), "bias": (2,)}
    }


def test_mlp_passes_its_options_to_every_layer():
    model = linen.AugmentedMLP(
        features=[5, 2],
        use_bias=False,
        dtype=jnp.float16,
        param_dtype=jnp.bfloat16,
        precision="highest",
        kernel_init=nn.initializers.constant(0.5),
    )
    x = jnp.ones((6, 3))
    variables = model.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "hidden_0": {NAME: (3, 5)},
        "readout": {"kernel": (5, 2)},
    }
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype == jnp.bfloat16
        assert (leaf == 0.5).all()
    assert model.apply(variables, x).dtype == jnp.float16
    assert products(model, (6, 3), "dot_general") == [(lax.Precision.HIGHEST,) * 2] * 2


def test_mlp_passes_bias_init_to_every_layer():
    model = linen.AugmentedMLP((5, 2), bias_init=nn.initializers.constant(0.25))
    params = model.init(jax.random.key(0), jnp.ones((6, 3)))["params"]
    assert (params["hidden_0"][NAME][0] == 0.25).all()
    assert (params["readout"]["bias"] == 0.25).all()


@pytest.mark.parametrize("features", [(), [], 10])
def test_mlp_without_widths_is_refused(features):
    with pytest.raises(ValueError, match=r"features=.* as in features=\(900, 10\)"):
        linen.AugmentedMLP(features)
