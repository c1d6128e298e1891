import functools
import math
import re

import chex
import equinox as eqx
import flax.linen as nn
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import l1inf_optax as l1inf
from l1inf_optax._layers import find_layers
from tests.support.oracle import project64

KEY = jax.random.key(0)
Numbers = l1inf.LayerDimensionNumbers


def shapes(**leaves):
    """Nested dict of shapes from a/b=shape keywords, with __ for /."""
    tree = {}
    for path, shape in leaves.items():
        *parents, name = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = None if shape is None else jnp.zeros(shape)
    return tree


def found(params, layers=None):
    """What is found, as {path: (reduction axes, has a bias)}."""
    return {
        layer.path: "doubt" if layer.doubt else (layer.reduction_axes, layer.bias is not None)
        for layer in find_layers(params, layers)
    }


# --- the conventions of the libraries -------------------------------------------------------------


class Everything(nn.Module):
    @nn.compact
    def __call__(self, x):
        image = nn.Conv(4, (3, 3), name="conv")(x)
        image = nn.Conv(4, (3, 3), use_bias=False, name="conv_without_bias")(image)
        image = nn.BatchNorm(use_running_average=True)(image)
        x = nn.LayerNorm()(image.reshape(image.shape[0], 6, -1))
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False, name="bare")(x)
        x = nn.DenseGeneral((2, 5), axis=(-2, -1), name="general")(x)
        x = nn.Dense(7, name="dense")(x)
        x = nn.Dense(3, use_bias=False, name="dense_without_bias")(x)
        return x + nn.Embed(9, 3, name="embed")(jnp.zeros(1, int))


def test_flax_linen_layers_are_found_with_their_axes():
    params = jax.eval_shape(Everything().init, KEY, jnp.zeros((1, 6, 6, 2)))
    expected = {
        "conv": ((0, 1, 2), True),
        "conv_without_bias": "doubt",  # four axes: it may be a stack of anything
        "general": ((0, 1), True),
        "dense": ((0,), True),
        "dense_without_bias": ((0,), False),
    }
    for name in ("query", "key", "value"):
        expected[f"attention/{name}"] = ((0,), True)
        expected[f"bare/{name}"] = ((0,), False)
    expected["attention/out"] = ((0, 1), True)
    expected["bare/out"] = ((0, 1), False)
    assert found(params) == {f"params/{path}": axes for path, axes in expected.items()}


def test_flax_nnx_layers_are_found_with_their_axes():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.embed = nnx.Embed(9, 4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs)
            self.augmented = l1inf.nnx.AugmentedLinear(3, 4, rngs=rngs)

    model = Model(nnx.Rngs(0))
    expected = {
        "linear": ((0,), True),
        "conv": ((0, 1, 2), True),
        "attention/query": ((0,), True),
        "attention/key": ((0,), True),
        "attention/value": ((0,), True),
        "attention/out": ((0, 1), True),
        "augmented": ((0,), False),
    }
    assert found(nnx.state(model, nnx.Param)) == expected
    assert found(nnx.to_pure_dict(nnx.state(model, nnx.Param))) == expected


def test_haiku_layers_are_found_with_their_axes():
    def net(x):
        x = hk.Conv2D(4, 3)(x)
        x = hk.LayerNorm(-1, True, True)(x)
        x = hk.nets.MLP([5, 6])(x.reshape(x.shape[0], -1))
        return x + hk.Embed(9, 6)(jnp.zeros(1, int))

    params = jax.eval_shape(hk.transform(net).init, KEY, jnp.zeros((1, 6, 6, 2)))
    assert found(params) == {
        "conv2_d": ((0, 1, 2), True),
        "mlp/~/linear_0": ((0,), True),
        "mlp/~/linear_1": ((0,), True),
    }


def test_equinox_layers_are_found_with_their_axes():
    keys = jax.random.split(KEY, 8)
    model = {
        "linear": eqx.nn.Linear(3, 4, key=keys[0]),
        "single": eqx.nn.Linear(3, 1, key=keys[0]),
        "bare": eqx.nn.Linear(3, 4, use_bias=False, key=keys[1]),
        "conv": eqx.nn.Conv2d(2, 4, 3, key=keys[2]),
        "bare_conv": eqx.nn.Conv2d(2, 4, 3, use_bias=False, key=keys[3]),
        "norm": eqx.nn.LayerNorm((3, 4)),
        "vector_norm": eqx.nn.LayerNorm(4),
        "embed": eqx.nn.Embedding(9, 4, key=keys[4]),
        "stacked": eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))(keys[:5]),
    }
    assert found(eqx.filter(model, eqx.is_inexact_array)) == {
        "linear": ((1,), True),
        "single": ((1,), True),
        "bare": ((1,), False),
        "conv": ((1, 2, 3), True),
        "bare_conv": ((1, 2, 3), False),
        "stacked": ((2,), True),
    }


@pytest.mark.parametrize(
    ("kernel", "bias", "expected"),
    [
        ((4, 3), (3,), ((0,), True)),
        ((6, 4, 3), (6, 3), ((1,), True)),  # stacked Dense
        ((6, 3, 3, 2, 4), (6, 4), ((1, 2, 3), True)),  # stacked convolutions
        ((8, 2, 5), (2, 5), ((0,), True)),  # DenseGeneral: heads, head_dim
        ((6, 8, 2, 5), (6, 2, 5), ((1,), True)),  # stacked DenseGeneral
        ((8, 8, 5), (8, 5), "doubt"),  # either
        ((6, 4, 3), None, "doubt"),  # Conv1D, or stacked Dense
        ((2, 3, 3, 4, 5), None, "doubt"),
        ((4, 3), (4,), "doubt"),  # does not fit
        ((4, 3), (1, 3), "doubt"),
    ],
)
def test_axes_are_told_from_shapes_or_left_in_doubt(kernel, bias, expected):
    leaves = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    assert found({"layer": shapes(**leaves)}) == {"layer": expected}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_stacked_attention_is_told_from_its_siblings(depth):
    batch = (8,) * depth
    params = {
        name: {"kernel": jnp.zeros((*batch, 8, 8, 5)), "bias": jnp.zeros((*batch, 8, 5))}
        for name in ("query", "key", "value")
    }
    params["out"] = {"kernel": jnp.zeros((*batch, 8, 5, 8)), "bias": jnp.zeros((*batch, 8))}
    assert found({"attention": params}) == {
        **{f"attention/{name}": ((depth,), True) for name in ("query", "key", "value")},
        "attention/out": ((depth, depth + 1), True),
    }


def test_vectors_norms_embeddings_and_empty_leaves_are_left_alone():
    params = shapes(
        norm__scale=(4,), norm__bias=(4,), embed__embedding=(9, 4), a__kernel=(4,), b__weight=(4,),
        b__bias=(4,), c__weight=(3, 4), d__kernel=None, e__w=(3,), f__bias=(4,),
    )  # fmt: skip
    assert found(params) == {}


def test_a_layer_cut_in_two_by_a_mask_is_an_error():
    params = shapes(layer__kernel=(4, 3), layer__bias=(3,), other__kernel=(4, 3))
    params["other"]["kernel"] = optax.MaskedNode()
    assert found(params) == {"layer": ((0,), True)}
    params["layer"]["bias"] = optax.MaskedNode()
    with pytest.raises(ValueError, match="the bias of 'layer/kernel' is masked"):
        found(params)


@pytest.mark.parametrize("c", [{}, {"*": None}])
def test_a_mapping_that_constrains_nothing_is_an_error(c):
    with pytest.raises(ValueError, match=r"c=.*constrains nothing.*layer"):
        l1inf.project_params(shapes(layer__kernel=(4, 3)), c)


def test_a_pattern_behind_one_that_takes_all_it_matches_is_an_error():
    with pytest.raises(ValueError, match=r"'layer'.*only what earlier patterns take"):
        l1inf.project_params(shapes(layer__kernel=(4, 3)), {"*": 2.0, "layer": 1.0})


def test_brackets_in_a_path_can_be_named():
    after = l1inf.project_params({"conv[0]": {"kernel": jnp.ones((4, 3))}}, {"conv[0]": 1.0})
    np.testing.assert_allclose(after["conv[0]"]["kernel"], 0.25, rtol=1e-6)


def test_doubt_is_an_error_only_where_it_matters():
    params = shapes(a__kernel=(6, 4, 3), b__kernel=(4, 3))
    l1inf.project_params(params, {"b": 1.0})
    with pytest.raises(ValueError, match=r"'a/kernel', shape \(6, 4, 3\).*LayerDimensionNumbers"):
        l1inf.project_params(params, 1.0)
    l1inf.project_params(params, 1.0, layers={"a/kernel": Numbers(1, 2)})


def test_a_bias_that_does_not_fit_is_an_error():
    with pytest.raises(
        ValueError, match=r"'kernel', shape \(4, 3\): its bias, shape \(4,\), does not"
    ):
        l1inf.project_params(shapes(kernel=(4, 3), bias=(4,)), 1.0)


# --- what shapes cannot decide --------------------------------------------------------------------


def project_each(x, c, axes):
    """Every column projected by itself, in float64."""
    x = np.asarray(x, np.float64)
    moved = np.moveaxis(x, axes, range(len(axes)))
    columns = moved.reshape(math.prod(moved.shape[: len(axes)]), -1)
    projected = np.stack([project64(v, c) for v in columns.T], axis=1)
    return np.moveaxis(projected.reshape(moved.shape), range(len(axes)), axes)


@pytest.mark.parametrize("norm", [eqx.nn.RMSNorm, eqx.nn.LayerNorm])
def test_scales_of_stacked_norms_stay_one(norm):
    @eqx.filter_vmap
    def blocks(key):
        return {"norm": norm(4, use_bias=False), "linear": eqx.nn.Linear(4, 3, key=key)}

    params = eqx.filter(blocks(jax.random.split(KEY, 5)), eqx.is_inexact_array)
    assert params["norm"].weight.shape == (5, 4)
    after = l1inf.project_params(params, 0.1)
    np.testing.assert_array_equal(after["norm"].weight, 1)
    assert after["linear"].weight.max() < 0.2
    # In a dict there is no module to ask: a weight of two axes may be a matrix, too.
    with pytest.raises(ValueError, match=r"'weight', shape \(5, 4\).*scales of stacked norms"):
        l1inf.project_params({"weight": params["norm"].weight, "bias": None}, 0.1)


def test_stacked_equinox_layers_without_bias_are_told_by_their_modules():
    def stacked(make):
        return eqx.filter_vmap(lambda key: make(key=key))(jax.random.split(KEY, 6))

    model = {
        "linear": stacked(functools.partial(eqx.nn.Linear, 3, 4, use_bias=False)),
        "single": stacked(functools.partial(eqx.nn.Linear, 3, "scalar")),
        "conv": stacked(functools.partial(eqx.nn.Conv1d, 2, 4, 3, use_bias=False)),
        "transposed": eqx.nn.ConvTranspose2d(4, 4, 3, use_bias=False, key=KEY),
        "image": stacked(functools.partial(eqx.nn.Conv2d, 1, 4, 3)),
    }
    assert found(eqx.filter(model, eqx.is_inexact_array)) == {
        "linear": ((2,), False),
        "single": ((2,), True),
        "conv": ((2, 3), False),
        "transposed": ((1, 2, 3), False),
        "image": ((2, 3, 4), True),
    }
    across = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key), out_axes=eqx.if_array(-1))(
        jax.random.split(KEY, 6)
    )
    assert found(across) == {"": "doubt"}
    numbers = {"*": Numbers(stack_axis=-1)}
    assert found(across, numbers) == {"": ((1,), True)}


@pytest.mark.parametrize(
    "leaves",
    [
        {"general__kernel": (6, 8, 2, 5)},  # a scanned DenseGeneral
        {"kv_einsum__w": (2, 3, 8, 5)},
        {"Conv_0__kernel": (6, 3, 2, 4)},  # a scanned one-dimensional convolution
        {"conv__weight": (6, 4, 2, 3), "conv__bias": None},
        {"conv1__weight": (4, 1, 3), "conv1__bias": (4, 1)},  # or four layers of one unit
        {"hidden__augmented_kernel": (6, 3, 5)},
        {"up__kernel": (3, 3, 4, 4), "up__bias": (4,)},
        {"ConvTranspose_0__kernel": (3, 3, 4, 4), "ConvTranspose_0__bias": (4,)},
        {"ConvTranspose_0__kernel": (3, 3, 2, 4)},
    ],
    ids=lambda leaves: next(iter(leaves)),
)
def test_layouts_that_shapes_do_not_tell_apart_are_left_in_doubt(leaves):
    params = shapes(**leaves)
    with pytest.raises(ValueError, match=r"layers cannot tell the axes of.*LayerDimensionNumbers"):
        l1inf.project_params(params, 1.0)
    assert set(found(params).values()) == {"doubt"}


def test_haiku_convolutions_are_told_by_the_names_of_their_classes():
    def net(x):
        x = hk.Conv2D(4, 3, with_bias=False)(x)
        x = hk.Conv2DTranspose(4, 3)(x)
        x = hk.Conv2DTranspose(5, 3, with_bias=False)(x)

        def block(x):
            return hk.Conv1D(5, 3, with_bias=False)(x)

        return hk.experimental.layer_stack(2)(block)(x[:, 0])

    params = jax.eval_shape(hk.transform(net).init, KEY, jnp.zeros((1, 6, 6, 2)))
    assert found(params) == {
        "conv2_d": ((0, 1, 2), False),
        "conv2_d_transpose": ((0, 1, 3), True),
        "conv2_d_transpose_1": ((0, 1, 3), False),
        "__layer_stack_no_per_layer/conv1_d": ((1, 2), False),
    }
    w = jax.random.normal(KEY, params["conv2_d_transpose"]["w"].shape)
    after = l1inf.project_params({"conv2_d_transpose": {"w": w}}, 0.5)["conv2_d_transpose"]["w"]
    np.testing.assert_allclose(after, project_each(w, 0.5, (0, 1, 3)), atol=1e-6)


@pytest.mark.parametrize(("features", "axes"), [(4, None), (5, (0, 1, 3))])
def test_a_transposed_kernel_is_told_by_its_bias_or_left_in_doubt(features, axes):
    layer = nn.ConvTranspose(features, (3, 3), transpose_kernel=True)
    image = jnp.zeros((1, 6, 6, 4))
    params = {"ConvTranspose_0": jax.eval_shape(layer.init, KEY, image)["params"]}
    assert found(params) == {"ConvTranspose_0": "doubt" if axes is None else (axes, True)}
    numbers = {"*/kernel": Numbers((0, 1, 3), 2, bias="bias")}
    assert found(params, numbers) == {"ConvTranspose_0/kernel": ((0, 1, 3), True)}
    usual = jax.eval_shape(nn.ConvTranspose(5, (3, 3)).init, KEY, image)["params"]
    assert found({"ConvTranspose_0": usual}) == {"ConvTranspose_0": ((0, 1, 2), True)}


# --- recurrent cells ------------------------------------------------------------------------------


def test_a_gate_of_an_equinox_cell_is_bounded_with_all_that_flows_into_it():
    model = {"lstm": eqx.nn.LSTMCell(3, 4, key=KEY), "gru": eqx.nn.GRUCell(3, 4, key=KEY)}
    bare = eqx.filter_vmap(lambda key: eqx.nn.LSTMCell(3, 4, use_bias=False, key=key))
    model["bare"] = bare(jax.random.split(KEY, 2))
    params = eqx.filter(model, eqx.is_inexact_array)
    assert found(params) == {
        "lstm": ((1,), True), "gru": ((1,), True), "bare": ((2,), False)
    }  # fmt: skip
    after = l1inf.project_params(params, 0.5)
    for name in ("lstm", "gru"):
        before, cell = params[name], after[name]
        bias = before.bias[:, None]
        joint = jnp.concatenate([bias, before.weight_ih, before.weight_hh], axis=1)
        expected = project_each(joint, 0.5, (1,))
        parts = [cell.bias[:, None], cell.weight_ih, cell.weight_hh]
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-6)
    np.testing.assert_array_equal(after["gru"].bias_n, params["gru"].bias_n)  # stays free
    report = l1inf.sparsity_report(params["lstm"]).layers[0]
    assert (report.shape, report.inputs, report.entries) == ((8, 16), 7, 8 * 16)


def test_a_gate_of_haikus_gru_is_bounded_with_all_that_flows_into_it():
    def net(x):
        core = hk.GRU(4)
        return core(x, core.initial_state(1))

    params = jax.eval_shape(hk.transform(net).init, KEY, jnp.zeros((1, 3)))
    assert found(params) == {"gru": ((0,), True)}
    (gate,) = find_layers(params)
    assert [gate.columns_shape, len(gate.leaves)] == [(12,), 3]  # w_i, w_h and b


def test_flax_cells_keep_the_weights_of_input_and_state_as_layers_of_their_own():
    carry = (jnp.zeros((1, 4)),) * 2
    params = jax.eval_shape(nn.LSTMCell(4).init, KEY, carry, jnp.zeros((1, 3)))
    inputs = {f"params/i{gate}": ((0,), False) for gate in "figo"}
    assert found(params) == inputs | {f"params/h{gate}": ((0,), True) for gate in "figo"}


def test_a_cell_whose_kernels_do_not_fit_together_is_left_in_doubt():
    params = shapes(cell__weight_ih=(8, 3), cell__weight_hh=(4, 2), cell__bias=(8,))
    assert found(params) == {"cell": "doubt"}


# --- names ----------------------------------------------------------------------------------------


def test_an_attribute_called_value_keeps_its_name_and_a_box_has_none():
    class Attention(eqx.Module):
        query: jax.Array
        value: jax.Array

    @flax.struct.dataclass
    class Weights:
        value: jax.Array

    box = nn.Partitioned(jnp.ones((4, 3)), names=(None, "model"))
    params = {
        "attn": Attention(jnp.ones((4, 3)), jnp.ones((4, 3))),
        "struct": Weights(jnp.ones((4, 3))),
        "linen": {"w": box},
        "nnx": {"w": nnx.Param(jnp.ones((4, 3)))},
    }
    layers = {f"{path}": Numbers(0, 1) for path in ("attn/value", "struct/value", "*/w")}
    assert set(found(params, layers)) == {"attn/value", "struct/value", "linen/w", "nnx/w"}
    after = l1inf.project_params(params, 1.0, layers=layers)
    np.testing.assert_allclose(after["attn"].value.sum(0), 1, rtol=1e-6)
    np.testing.assert_array_equal(after["attn"].query, 1)


# --- stacks, said once ----------------------------------------------------------------------------


class Block(nn.Module):
    """What a scanned model repeats; bias or none, as most libraries of models have it."""

    use_bias: bool

    @nn.compact
    def __call__(self, x, _):
        bias = {"use_bias": self.use_bias}
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention", **bias)(x)
        y = l1inf.linen.AugmentedDense(4, name="augmented", **bias)(y)
        y = nn.Conv(4, (3,), name="conv", **bias)(y)
        y = nn.LayerNorm()(nn.Dense(4, name="dense", **bias)(y))
        return y, None


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_line_says_how_a_whole_model_is_stacked(axis, use_bias):
    inputs = KEY, jnp.ones((1, 5, 4)), None
    one = jax.eval_shape(Block(use_bias).init, *inputs)
    scan = nn.scan(Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
    scanned = jax.eval_shape(scan(use_bias).init, *inputs)
    alone = find_layers(one, {"*": Numbers(stack_axis=())})
    assert {layer.doubt for layer in alone} == {None}
    assert {layer.path.rpartition("/")[2] for layer in alone} == {
        "query", "key", "value", "out", "augmented", "conv", "dense"
    }  # fmt: skip
    for layer, single in zip(
        find_layers(scanned, {"*": Numbers(stack_axis=axis)}), alone, strict=True
    ):
        first = axis % len(layer.shape)
        moved = tuple(i + (i >= first) for i in range(len(single.shape)))
        assert layer.reduction_axes == tuple(moved[i] for i in single.reduction_axes)
        assert layer.output_axes == tuple(moved[i] for i in single.output_axes)
        assert layer.doubt is None
    if axis:  # nothing tells the axis but the user
        doubtful = {layer.path for layer in find_layers(scanned) if layer.doubt}
        assert "params/augmented" in doubtful


def test_every_layer_of_a_stack_is_projected_by_itself():
    """Rows or inputs, layers, units: what `flax.linen.scan` makes along axis 1."""
    leaves = {
        "dense__kernel": (5, 3, 4),
        "dense__bias": (4, 3),
        "hidden__augmented_kernel": (6, 3, 4),
    }
    params = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), shapes(**leaves))
    layers = {"*": Numbers(stack_axis=1)}
    after = l1inf.project_params(params, 0.5, layers=layers)
    rows = params["hidden"]["augmented_kernel"]
    np.testing.assert_allclose(
        after["hidden"]["augmented_kernel"], project_each(rows, 0.5, (0,)), atol=1e-6
    )
    joint = np.concatenate([params["dense"]["bias"].T[None], params["dense"]["kernel"]])
    expected = project_each(joint, 0.5, (0,))
    np.testing.assert_allclose(after["dense"]["kernel"], expected[1:], atol=1e-6)
    np.testing.assert_allclose(after["dense"]["bias"], expected[0].T, atol=1e-6)
    report = l1inf.sparsity_report(after, c=0.5, layers=layers)
    assert [layer.columns_on_boundary for layer in report.layers] == [12, 12]
    assert report.total.largest_norm <= 0.5
    tx = l1inf.keep_params_in_l1inf_ball(0.5, layers=layers)
    updates, state = tx.update(params, tx.init(after), after)
    moved = optax.apply_updates(after, updates)
    assert np.abs(np.asarray(moved["hidden"]["augmented_kernel"], np.float64)).sum(0).max() <= 0.5
    assert jax.tree.leaves(state.thresholds)[0].shape == (3, 4)


def test_what_is_not_stacked_can_be_said_for_the_rest():
    params = shapes(
        Conv_0__kernel=(3, 3, 2, 4), Conv_1__kernel=(3, 2, 4), down__kernel=(3, 3, 4, 4),
        down__bias=(4,), general__kernel=(8, 2, 5), w__matrix=(4, 3), other__kernel=(4, 3),
    )  # fmt: skip
    layers = {"w/*": Numbers(1, 0), "other/*": None, "*": Numbers(stack_axis=())}
    assert found(params, layers) == {
        "Conv_0": ((0, 1, 2), False),
        "Conv_1": ((0, 1), False),
        "down": ((0, 1, 2), True),
        "general": "doubt",
        "w/matrix": ((1,), False),
    }


def test_a_described_bias_may_be_stacked_elsewhere_than_its_kernel():
    kernel = jax.random.normal(KEY, (3, 6, 4, 5))  # in, layers, heads, units
    bias = jax.random.normal(KEY, (4, 6, 5))
    numbers = Numbers(reduction_axis=0, output_axis=(2, 3), bias="b", stack_axis=1)
    after = l1inf.project_params({"w": kernel, "b": bias}, 0.5, layers={"w": numbers})
    joint = np.concatenate([np.moveaxis(bias, 1, 0)[None], kernel])
    expected = project_each(joint, 0.5, (0,))
    np.testing.assert_allclose(after["w"], expected[1:], atol=1e-6)
    np.testing.assert_allclose(after["b"], np.moveaxis(expected[0], 0, 1), atol=1e-6)


# --- layers that are described --------------------------------------------------------------------


def test_dimension_numbers_describe_any_leaf():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)  # layers, heads, dim, model
    bias = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    params = {"block": {"w_out": kernel, "b_out": bias}, "kernel": jnp.ones((3, 3))}
    numbers = Numbers(reduction_axis=(1, -2), output_axis=-1, bias="b_out")
    after = l1inf.project_params(params, 0.5, layers={"w_*": numbers})
    total = jnp.abs(after["block"]["w_out"]).sum((1, 2)) + jnp.abs(after["block"]["b_out"])
    np.testing.assert_allclose(total, 0.5, rtol=1e-6)
    assert after["block"]["b_out"].shape == (2, 5)
    np.testing.assert_array_equal(after["kernel"], params["kernel"])  # nothing else is looked for


@pytest.mark.parametrize("numbers", [Numbers(1, 0), optax.contrib.MuonDimensionNumbers(1, 0)])
def test_layers_may_be_globs_a_tree_or_a_function(numbers):
    params = shapes(a__w=(4, 3), b__w=(4, 3))
    tree = {"a": {"w": numbers}, "b": {"w": None}}
    for layers in ({"a/w": numbers}, {"b/*": None, "*": numbers}, tree, lambda params: tree):
        assert found(params, layers) == {"a/w": ((1,), False)}


def test_dimension_numbers_may_sit_in_a_module_that_can_be_called():
    model = eqx.nn.MLP(4, 2, 8, 1, key=KEY)
    params = eqx.filter(model, eqx.is_inexact_array)
    numbers = jax.tree.map(lambda p: Numbers(1, 0) if p.ndim == 2 else None, params)
    assert callable(numbers)
    assert set(found(params, numbers)) == {"layers/0/weight", "layers/1/weight"}


def test_patterns_match_from_any_slash_on():
    params = shapes(params__hidden_0__kernel=(2, 2), params__out__hidden__kernel=(2, 2))
    for pattern, paths in {
        "hidden_*": ["params/hidden_0"],
        "hidden": ["params/out/hidden"],
        "out/*": ["params/out/hidden"],
        "params/hidden_0": ["params/hidden_0"],
        "*": ["params/hidden_0", "params/out/hidden"],
        "hidden_0/kernel": ["params/hidden_0"],
    }.items():
        after = l1inf.project_params(jax.tree.map(lambda x: x + 1, params), {pattern: 0.5})
        shrunk = [layer.path for layer in find_layers(after) if at(after, layer.path).max() < 1]
        assert shrunk == paths


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree["kernel"]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ({"nothing": Numbers()}, ("layers", "'nothing'", "matches nothing", "a/w")),
        ({"a/w": Numbers(2, 1)}, ("layers", "'a/w'", "(4, 3)", "out of range")),
        ({"a/w": Numbers(0, 0)}, ("layers", "'a/w'", "two of reduction, output and stack")),
        ({"a/w": Numbers(0, 1, stack_axis=0)}, ("layers", "'a/w'", "two of reduction, output")),
        ({"a/w": Numbers(stack_axis=2)}, ("layers", "'a/w'", "stack_axis=2", "out of range")),
        ({"a/w": Numbers(0, 1, bias="c")}, ("layers", "'a/c'", "not in params")),
        ({"a/w": Numbers(1, 0, bias="b")}, ("bias", "'a/w'", "(3,)", "(4, 3)")),
        ({"z": {"w": Numbers()}}, ("layers", "'z/w'", "structure of the parameters", "a/w")),
        ({"a": {"*": Numbers()}}, ("layers", "'a/*'", "structure of the parameters", "a/w")),
        ({"a": {"w": 3}}, ("layers holds 3 at 'a/w'", "dimension numbers")),
    ],
)
def test_wrong_dimension_numbers_are_an_error(layers, names):
    params = shapes(a__w=(4, 3), a__b=(3,))
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, names))):
        l1inf.project_params(params, 1.0, layers=layers)


# --- between plain and augmented parameters -------------------------------------------------------


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(6, use_bias=False, name="hidden")(x))
        return nn.Dense(3, name="readout")(nn.LayerNorm(name="norm")(x))


class Augmented(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(l1inf.linen.AugmentedConv(4, (3, 3), name="conv")(x)).reshape(x.shape[0], -1)
        x = nn.relu(l1inf.linen.AugmentedDense(6, use_bias=False, name="hidden")(x))
        return nn.Dense(3, name="readout")(nn.LayerNorm(name="norm")(x))


def test_plain_linen_parameters_convert_to_augmented_ones_and_back_bit_for_bit():
    x = jax.random.normal(KEY, (2, 5, 5, 2))
    plain = jax.tree.map(lambda p: p + 0.1, Plain().init(KEY, x))
    like = jax.eval_shape(Augmented().init, KEY, x)
    augmented = l1inf.convert_params(plain, like)
    assert jax.tree.structure(augmented) == jax.tree.structure(like)
    np.testing.assert_array_equal(
        augmented["params"]["conv"]["augmented_kernel"][0], np.float32(0.1)
    )
    np.testing.assert_array_equal(Augmented().apply(augmented, x), Plain().apply(plain, x))
    chex.assert_trees_all_equal(l1inf.convert_params(augmented, plain), plain)


def test_nnx_states_convert_and_can_be_loaded():
    class Model(nnx.Module):
        def __init__(self, linear, rngs):
            self.hidden = linear(4, 6, rngs=rngs)
            self.readout = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.readout(nnx.relu(self.hidden(x)))

    plain = Model(nnx.Linear, nnx.Rngs(0))
    augmented = Model(l1inf.nnx.AugmentedLinear, nnx.Rngs(1))
    state = l1inf.convert_params(nnx.state(plain, nnx.Param), nnx.state(augmented, nnx.Param))
    nnx.update(augmented, state)
    x = jnp.ones((3, 4))
    np.testing.assert_array_equal(augmented(x), plain(x))
    back = l1inf.convert_params(nnx.state(augmented, nnx.Param), nnx.state(plain, nnx.Param))
    chex.assert_trees_all_equal(nnx.to_pure_dict(back), nnx.to_pure_dict(nnx.state(plain)))


def test_stacked_and_16_bit_layers_convert():
    kernel = jnp.arange(2 * 3 * 4, dtype=jnp.bfloat16).reshape(2, 3, 4)
    plain = {"kernel": kernel, "bias": -jnp.ones((2, 4), jnp.bfloat16)}
    augmented = l1inf.convert_params(plain, {"augmented_kernel": jnp.zeros((2, 4, 4))})
    assert augmented["augmented_kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(augmented["augmented_kernel"][:, 0], plain["bias"])
    chex.assert_trees_all_equal(l1inf.convert_params(augmented, plain), plain)


@pytest.mark.parametrize(
    ("params", "like", "names"),
    [
        (shapes(a__kernel=(2, 3)), shapes(b__augmented_kernel=(3, 3)), ("b/augmented", "a/kernel")),
        (shapes(kernel=(2, 3), bias=(3,)), shapes(augmented_kernel=(2, 3)), ("(2, 3)", "(3, 3)")),
        (shapes(kernel=(2, 3)), shapes(kernel=(3, 3)), ("(3, 3)", "'kernel'", "(2, 3)")),
    ],
)
def test_trees_that_do_not_correspond_are_an_error(params, like, names):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, names))):
        l1inf.convert_params(params, like)
