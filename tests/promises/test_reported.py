"""What users of neighbouring tools have reported, tried with this library.

Every test names the public thread it follows. What is asserted is what a user of that thread would
want here. Cases whose promise is kept elsewhere in the tests are not repeated.
"""

import copy
import functools
import io
import math
import pickle

import chex
import equinox as eqx
import flax
import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.core import freeze
from flax.traverse_util import flatten_dict
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, PartitionSpec

import l1inf_optax as l1inf
from l1inf_optax import LayerDimensionNumbers as Numbers
from tests.support.oracle import project


def normal(*shape, key=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), dtype)


def filled(make):
    """What ``make`` returns, with numbers in the place of its shapes: nothing is compiled."""
    return jax.tree.map(lambda x: normal(*x.shape), eqx.filter_eval_shape(make))


def network(dtype=jnp.float32):
    """Parameters whose columns are outside the ball; all tests share the programs of its shapes."""
    return {
        "hidden": {"kernel": 3 * normal(4, 3, dtype=dtype), "bias": normal(3, key=1, dtype=dtype)},
        "out": {"kernel": normal(3, 2, key=2, dtype=dtype), "bias": normal(2, key=3, dtype=dtype)},
    }


def hidden(dtype=jnp.float32):
    """One layer of it, with the same program."""
    return {"hidden": network(dtype)["hidden"]}


def chained(c, **options):
    return optax.chain(optax.sgd(0.1, momentum=0.9), l1inf.keep_params_in_l1inf_ball(c, **options))


def adam(c, **options):
    return l1inf.constrain(optax.adam(0.1), c, **options)


def stepped(tx, params, state=None, steps=2):
    """Parameters and state after some steps along ones."""
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def norms(kernel, *bias, rows=None):
    """Norms of the columns in float64; ``rows`` are the axes that are added up, by default all but
    the last.
    """
    kernel = np.abs(np.asarray(kernel, np.float64))
    columns = kernel.sum(tuple(range(kernel.ndim - 1)) if rows is None else rows)
    return columns + sum(np.abs(np.asarray(x, np.float64)).reshape(columns.shape) for x in bias)


def inside(layer, c=1.0):
    return (norms(layer["kernel"], layer["bias"]) <= c).all()


def reported(params, **options):
    """Number of columns and largest norm of each layer, which no program is compiled for."""
    layers = l1inf.sparsity_report(params, **options).layers
    return {layer.path: (layer.columns, pytest.approx(layer.largest_norm)) for layer in layers}


def same(a, b):
    equal = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(equal)


# --- what a column is -----------------------------------------------------------------------------


def test_kernel_and_bias_are_one_vector():
    # keras-team/keras#14954: a constraint on the weights of a unit and its bias together.
    params = {"kernel": normal(4, 3), "bias": normal(3, key=1)}
    projected = l1inf.project_params(params, 1.5)
    for unit in range(3):
        column = np.append(params["kernel"][:, unit], params["bias"][unit])
        result = np.append(projected["kernel"][:, unit], projected["bias"][unit])
        np.testing.assert_allclose(result, [float(x) for x in project(column, 1.5)], atol=1e-6)
        assert math.fsum(np.abs(result.astype(np.float64))) <= 1.5


def test_a_filter_of_a_grouped_or_depthwise_convolution_is_a_column():
    # vlawhern/arl-eegmodels#1 and #4, patrick-kidger/equinox#809: max-norm constraints in EEGNet
    # took the wrong axes of its convolutions.
    model = nn.Sequential(
        [
            nn.Conv(4, (1, 5), use_bias=False),
            nn.Conv(8, (3, 1), feature_group_count=4, use_bias=False),
            nn.Conv(6, (1, 3), feature_group_count=2),
        ]
    )
    params = filled(lambda: model.init(jax.random.key(0), jnp.ones((1, 3, 8, 1))))["params"]
    filters = {"*/kernel": l1inf.LayerDimensionNumbers((0, 1, 2), 3)}
    told = {"layers_2/kernel": filters["*/kernel"]._replace(bias="bias"), **filters}
    assert reported(params, layers=told) == {
        f"{name}/kernel": (
            units,
            norms(*(params[name][k] for k in sorted(params[name], reverse=True))).max(),
        )
        for name, units in (("layers_0", 4), ("layers_1", 8), ("layers_2", 6))
    }
    plain = filled(lambda: eqx.nn.Conv2d(4, 8, (3, 1), groups=4, key=jax.random.key(0)))
    assert reported(plain) == {"": (8, norms(plain.weight, plain.bias, rows=(1, 2, 3)).max())}
    haiku = {"w": normal(3, 1, 1, 8), "b": normal(8, key=1)}  # of a DepthwiseConv2D
    assert reported(haiku) == {"": (8, norms(haiku["w"], haiku["b"]).max())}


def test_every_projection_of_an_attention_layer_is_constrained():
    # keras-team/keras#18883: MultiHeadAttention dropped the constraints it was given.
    model = nn.MultiHeadDotProductAttention(2, qkv_features=4)
    params = filled(lambda: model.init(jax.random.key(0), jnp.ones((1, 3, 4))))["params"]
    assert reported(params, c=1.0) == {
        name: (4, norms(layer["kernel"], layer["bias"], rows=(0, 1) if name == "out" else 0).max())
        for name, layer in params.items()
    }


def test_rows_of_an_embedding_can_be_bounded():
    # pytorch/pytorch#1278: max_norm of the rows of an embedding.
    table = filled(lambda: eqx.nn.Embedding(5, 4, key=jax.random.key(0)))
    largest = norms(table.weight, rows=1).max()
    assert reported(table, c=1.0, layers={"weight": Numbers(1, 0)}) == {"weight": (5, largest)}


def test_members_of_an_ensemble_have_columns_of_their_own():
    # patrick-kidger/equinox#693 and #359: an ensemble by filter_vmap, all sizes alike.
    @eqx.filter_vmap
    def make(key):
        return eqx.filter(eqx.nn.MLP(2, 2, 2, 2, key=key), eqx.is_inexact_array)

    ensemble = filled(lambda: make(jax.random.split(jax.random.key(0), 2)))
    assert reported(ensemble) == {
        f"layers/{i}": (4, norms(layer.weight, layer.bias, rows=2).max())
        for i, layer in enumerate(ensemble.layers)
    }


# --- trees ----------------------------------------------------------------------------------------


@flax.struct.dataclass
class FlaxLayer:
    kernel: jax.Array
    bias: jax.Array


@chex.dataclass
class Actor:
    hidden: FlaxLayer
    out: dict


@jax.tree_util.register_pytree_node_class
class WithoutKeys:
    """A node that gives its children no names, as those registered without keys."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_dataclasses_of_several_libraries_may_hold_each_other():
    # google/brax#480: the parameters of an agent are a dataclass of networks.
    params = network()
    agent = Actor(hidden=FlaxLayer(**params["hidden"]), out=params["out"])
    agent, _ = stepped(chained(1.0), agent)
    expected, _ = stepped(chained(1.0), params)
    assert same(agent.hidden.kernel, expected["hidden"]["kernel"])
    assert same(agent.hidden.bias, expected["hidden"]["bias"])
    assert same(agent.out, expected["out"])


def test_frozen_dicts_take_a_transformation_for_each_layer():
    # google-deepmind/optax#160, google/flax#3050: masks and labels of frozen dicts.
    params = freeze(network())
    labels = freeze(jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params))
    tx = optax.multi_transform({"hidden": chained(1.0), "out": chained(0.25)}, labels)
    params, _ = stepped(tx, params)
    assert inside(params["hidden"])
    assert inside(params["out"], 0.25)


def test_labels_of_an_nnx_model_take_a_transformation_for_each_layer():
    # google-deepmind/optax#1148: multi_transform and the state of an NNX model.
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))

    def labels(state):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "first" if "0" in jax.tree_util.keystr(path) else "rest", state
        )

    tx = optax.partition({"first": chained(0.5), "rest": chained(1.0)}, labels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))["layers"]
    assert inside(state[0], 0.5)
    assert inside(state[1])


def test_a_flattened_dict_is_the_same_network():
    # google/flax#1794 (keys joined by a slash) and #93 (keys that are tuples).
    params = network()
    expected = flatten_dict(l1inf.project_params(params, 1.0))
    joined = l1inf.project_params(flatten_dict(params, sep="/"), 1.0)
    assert same(joined, {"/".join(path): value for path, value in expected.items()})
    tuples = flatten_dict(params)
    with pytest.raises(ValueError, match=r"nothing to constrain.*\('hidden', 'kernel'\)"):
        l1inf.project_params(tuples, 1.0)
    layers = {f"('{name}', 'kernel')": Numbers(0, 1, bias=f"('{name}', 'bias')") for name in params}
    assert same(l1inf.project_params(tuples, 1.0, layers=layers), expected)


def test_names_of_a_torch_checkpoint_can_be_told():
    # google/flax#866: a flat state_dict, weights (out, in).
    layer = hidden()["hidden"]
    flat = {"fc1.weight": layer["kernel"].T, "fc1.bias": layer["bias"]}
    with pytest.raises(ValueError, match=r"nothing to constrain.*fc1\.weight"):
        l1inf.project_params(flat, 1.0)
    layers = {"fc1.weight": Numbers(1, 0, bias="fc1.bias")}
    expected = {"fc1.weight": (3, norms(layer["kernel"], layer["bias"]).max())}
    assert reported(flat, c=1.0, layers=layers) == expected


def test_numbers_for_keys_may_come_back_as_strings():
    # google/flax#5030 and #5438: the keys of an nnx.List are integers, those of its checkpoint not.
    layers = network()
    params = {"layers": {1: layers["hidden"], 10: layers["out"]}}
    c = {"layers/1": 0.25, "layers/10": 0.5}
    params, state = stepped(chained(c), params)
    assert inside(params["layers"][1], 0.25)
    assert inside(params["layers"][10], 0.5)
    restored = {"layers": {str(key): layer for key, layer in params["layers"].items()}}
    keep = l1inf.keep_params_in_l1inf_ball(c)
    ones = jax.tree.map(jnp.ones_like, (params, restored))
    updates, _ = keep.update(ones[0], state[1], params)
    again, _ = keep.update(ones[1], state[1], restored)
    assert same(list(updates["layers"].values()), [again["layers"][key] for key in ("1", "10")])


def test_children_without_names_are_told_by_number():
    # google-deepmind/dm-haiku#191: an immutable Haiku dict is a node without keys.
    params = network()["hidden"]
    immutable = hk.data_structures.to_immutable_dict({"linear": {"b": params["bias"]}})
    assert jax.tree.leaves(immutable)[0] is params["bias"]
    with pytest.raises(ValueError, match=r"nothing to constrain\. The leaves are: 0"):
        l1inf.project_params(immutable, 1.0)
    node = WithoutKeys(params["kernel"], params["bias"])
    projected = l1inf.project_params(node, 1.0, layers={"0": Numbers(0, 1, bias="1")})
    expected = l1inf.project_params(params, 1.0)
    assert same((projected.w, projected.b), (expected["kernel"], expected["bias"]))


def test_keys_of_random_numbers_pass_through():
    # jax-ml/jax#14046: typed keys among parameters.
    params = {**network(), "rng": jax.random.key(0), "old": jax.random.PRNGKey(0)}
    projected = l1inf.project_params(params, 1.0)
    assert projected["rng"] is params["rng"]
    assert projected["old"] is params["old"]
    assert inside(projected["hidden"])
    assert len(l1inf.sparsity_report(projected, c=1.0).layers) == 2


def test_a_table_that_is_input_and_output_is_free_and_the_rest_is_not():
    # google/flax#3516 and #1263: embeddings that are tied to the output layer.
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 4, rngs=rngs)
            self.hidden = nnx.Linear(4, 3, rngs=rngs)
            self.back = nnx.Linear(3, 2, rngs=rngs)
            self.logits = self.embed  # the same table

    model = Model(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert set(params) == {"embed", "hidden", "back"}
    projected = l1inf.project_params(params, 0.5)
    assert same(projected["embed"], params["embed"])
    assert inside(projected["hidden"], 0.5)
    assert inside(projected["back"], 0.5)


def test_low_rank_adapters_alone_are_told_and_the_base_stays():
    # google/flax#3988, AI-Hypercomputer/maxtext#4501: an optimizer of LoRA parameters only.
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = nnx.LoRA(4, 3, 3, base_module=base, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"nothing to constrain\. The leaves are: lora_a, lora_b"):
        nnx.Optimizer(model, chained(1.0), wrt=nnx.LoRAParam)
    before = base.kernel[...]
    tx = chained(1.0, layers={"lora_a": Numbers(0, 1)})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.LoRAParam)))
    assert (norms(model.lora_a[...]) <= 1).all()
    assert same(base.kernel[...], before)


def test_a_sparse_matrix_is_no_kernel():
    # google-deepmind/optax#994: parameters in sparse formats.
    sparse = {"hidden": {"kernel": BCOO.fromdense(jnp.eye(3)), "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"nothing to constrain.*hidden/kernel/0"):
        l1inf.project_params(sparse, 1.0)


def test_empty_matrices_are_layers():
    # jax-ml/jax#26555: norms of matrices without rows or columns.
    params = network() | {
        "rowless": {"kernel": jnp.zeros((0, 3)), "bias": jnp.full(3, 5.0)},
        "unitless": {"kernel": jnp.zeros((3, 0)), "bias": jnp.zeros(0)},
    }
    params, _ = stepped(chained(1.0), params, steps=1)
    assert (np.abs(params["rowless"]["bias"]) == 1).all()
    assert params["unitless"]["kernel"].shape == (3, 0)
    assert inside(params["hidden"])
    assert len(l1inf.sparsity_report(params, c=1.0).layers) == 4


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.complex64], ids=["int8", "float8", "complex"]
)
def test_kernels_that_are_no_real_floats_are_refused_by_name_or_left_alone(dtype):
    # Alpha-VLLM/LLaMA2-Accessory#42 (integers), google/jaxopt#169 (complex numbers).
    params = network()
    params["hidden"]["kernel"] = jnp.ones((4, 3), dtype)
    with pytest.raises(ValueError, match=f"'hidden' has dtype {jnp.dtype(dtype)}: convert"):
        l1inf.project_params(params, 1.0)
    with pytest.raises(ValueError, match=f"'hidden' has dtype {jnp.dtype(dtype)}: convert"):
        l1inf.sparsity_report(params, c=1.0)
    projected = l1inf.project_params(params, {"out": 1.0})
    assert projected["hidden"]["kernel"] is params["hidden"]["kernel"]
    assert inside(projected["out"])


@pytest.mark.parametrize(
    "dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.complex64], ids=["int8", "float8", "complex"]
)
def test_a_report_without_a_radius_refuses_the_same_dtypes(dtype):
    # The same threads. KeyError: 1 for one byte, and imaginary parts are dropped.
    params = {"hidden": {"kernel": jnp.ones((4, 3), dtype)}}
    with pytest.raises(ValueError, match=f"has dtype {jnp.dtype(dtype)}: convert"):
        l1inf.sparsity_report(params)


def test_complex_parameters_beside_the_constrained_ones_are_trained():
    # netket/netket#1009: complex parameters with Adam.
    params = hidden() | {"spectral": {"modes": normal(3, 3) + 1j * normal(3, 3, key=4)}}
    constrained, _ = stepped(adam(1.0), params, steps=1)
    plain, _ = stepped(optax.adam(0.1), params, steps=1)
    assert same(constrained["spectral"], plain["spectral"])
    assert inside(constrained["hidden"])


def test_hyperparameters_of_numpy_or_injected_keep_dtypes_and_precision():
    # google-deepmind/optax#1405: a bfloat16 NumPy scalar promotes updates to float32. #1414:
    # inject_hyperparams casts to the dtype of the parameters, where 0.3 would be 0.30078.
    rate = np.array(0.1, ml_dtypes.bfloat16)
    inject = optax.inject_hyperparams(l1inf.keep_params_in_l1inf_ball, hyperparam_dtype=jnp.float32)
    tx = optax.chain(optax.sgd(rate), inject(c=0.3))
    params, _ = stepped(tx, hidden(jnp.bfloat16), steps=1)
    assert params["hidden"]["kernel"].dtype == jnp.bfloat16
    assert inside(params["hidden"], float(np.float32(0.3)))


@pytest.mark.parametrize("make", [chained, adam])
def test_nothing_is_promoted_to_64_bits(x64, make):
    # google/flax#924, google-deepmind/optax#1051: Adam and Prodigy promoted float32 to float64.
    results = jax.eval_shape(functools.partial(stepped, make(1.0)), hidden())
    assert all(x.dtype != jnp.float64 for x in jax.tree.leaves(results))


def test_float64_arrays_of_numpy_are_taken_without_a_warning():
    # google/jaxopt#201: parameters that are not yet arrays of JAX.
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), hidden())
    assert inside(stepped(chained(1.0), params, steps=1)[0]["hidden"])


def test_a_copy_in_fewer_bits_is_projected_once_more():
    # NVIDIA/apex#1728: float32 master weights and a bfloat16 copy of them.
    master = l1inf.project_params(hidden(), 0.3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), master)
    projected = l1inf.project_params(half, 0.3)
    assert inside(projected["hidden"], 0.3)
    for a, b in zip(*map(jax.tree.leaves, (half, projected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=0.3 * 2**-7)


# --- steps ----------------------------------------------------------------------------------------


def test_values_that_satisfy_the_constraint_are_not_touched():
    # lezcano/geotorch#28: a constraint that was already satisfied moved the values.
    start = l1inf.project_params(hidden(), 1.0)
    assert same(l1inf.project_params(start, 1.0), start)
    tx = optax.chain(optax.sgd(0.0), l1inf.keep_params_in_l1inf_ball(1.0))
    assert same(stepped(tx, start, steps=1)[0], start)


def test_a_constraint_at_the_start_only_is_found():
    # amrzhd/EEGNet#3, tensorflow/tfjs#3345: max-norm that was applied once, in __init__.
    start = l1inf.project_params(hidden(), 1.0)
    finding, *_ = l1inf.diagnose(optax.sgd(0.1), start, 1.0).findings
    assert (finding.name, finding.severity) == ("not kept", "error")


def test_weights_that_were_pruned_by_hand_stay_pruned():
    # ruihangdu/PyTorch-Deep-Compression#2, he-y/filter-pruning-geometric-median#47: momentum that
    # was gathered before the pruning revives the weights.
    params, state = stepped(chained(1.0), hidden())
    params["hidden"]["kernel"] = params["hidden"]["kernel"].at[1].set(0).at[0, 0].set(0)
    params, _ = stepped(chained(1.0, hold_zeros_from=0), params, state)
    assert (params["hidden"]["kernel"][1] == 0).all()
    assert params["hidden"]["kernel"][0, 0] == 0
    assert inside(params["hidden"])


def test_a_path_of_radii_goes_on_from_the_last_state():
    # scikit-learn/scikit-learn#568, QB3/sparse-ho#20: warm starts along a path of penalties.
    params, state = stepped(chained(2.0), hidden())
    for c in (1.0, 0.5, 0.25):
        params, state = stepped(chained(c), params, state, steps=1)
        assert inside(params["hidden"], c)


def test_decay_of_kernels_alone_keeps_columns_inside():
    # google-deepmind/optax#25 and #1007: biases are left out of the weight decay by a mask.
    tx = optax.adamw(0.1, weight_decay=0.5, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    params, _ = stepped(l1inf.constrain(tx, 1.0), hidden(), steps=1)
    assert inside(params["hidden"])


def test_weights_that_are_not_negative_stay_so_in_the_ball():
    # google-deepmind/optax#921, keras-team/keras#7628: projections onto the nonnegative weights.
    params = jax.tree.map(jnp.abs, hidden())
    keep = l1inf.keep_params_in_l1inf_ball(1.0)
    tx = optax.chain(optax.sgd(0.2), optax.keep_params_nonnegative(), keep)
    params, _ = stepped(tx, params)
    assert inside(params["hidden"])
    assert min(x.min() for x in jax.tree.leaves(params)) == 0


def test_a_stateless_link_that_looks_at_the_parameters_hides_no_metric():
    # The same threads. Nothing here is negative, so that the link changes no step.
    params = jax.tree.map(lambda x: jnp.abs(x) + 1, hidden())
    grads = jax.tree.map(lambda x: normal(*x.shape, key=5), params)
    inner = optax.chain(optax.adam(0.01), optax.keep_params_nonnegative())
    results = []
    for optimizer in (optax.adam(0.01), inner):
        tx = l1inf.constrain(optimizer, 4.0)
        updates, _ = tx.update(grads, tx.init(params), params)
        results.append(optax.apply_updates(params, updates)["hidden"]["kernel"])
    np.testing.assert_allclose(*results, atol=1e-5)


def test_a_line_search_may_come_before_the_projection():
    # patrick-kidger/optimistix#121, google/flax#4144: value, grad and value_fn go through a chain.
    def loss(params):
        return jnp.sum(params["kernel"] ** 2) + jnp.sum(params["bias"] ** 2)

    params = network()["hidden"]
    search = optax.scale_by_backtracking_linesearch(3)
    tx = optax.chain(optax.sgd(1.0), search, l1inf.keep_params_in_l1inf_ball(1.0))
    value, grads = jax.value_and_grad(loss)(params)
    updates, _ = jax.jit(functools.partial(tx.update, value_fn=loss))(
        grads, tx.init(params), params, value=value, grad=grads
    )
    assert inside(optax.apply_updates(params, updates))
    with pytest.raises(ValueError, match="finds no metric in ScaleByLBFGSState"):
        l1inf.constrain(optax.lbfgs(), 1.0).init(params)


# --- states ---------------------------------------------------------------------------------------


def through_flax(state, fresh):
    return serialization.from_bytes(fresh, serialization.to_bytes(state))


def through_equinox(state, fresh):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, fresh)


@pytest.mark.parametrize(
    "keep",
    [
        through_flax,  # google/flax#1432 and #1464
        through_equinox,  # patrick-kidger/equinox#632
        lambda state, _: pickle.loads(pickle.dumps(state)),  # lezcano/geotorch#6
        lambda state, _: copy.deepcopy(state),
    ],
    ids=["flax", "equinox", "pickle", "deepcopy"],
)
@pytest.mark.parametrize("make", [chained, adam])
def test_a_state_survives_what_users_keep_it_in(make, keep):
    tx = make(1.0)
    params, state = stepped(tx, hidden(), steps=1)
    kept = keep(state, tx.init(params))
    assert same(kept, state)
    assert same(stepped(tx, params, kept, steps=1), stepped(copy.deepcopy(tx), params, state, 1))


# --- transformations of JAX -----------------------------------------------------------------------


def test_a_fresh_state_is_like_every_later_one():
    # google-deepmind/optax#1059: state and parameters shared a buffer, and could not be donated.
    # #1175 and #1207: the first update changed the types of the state, and the second compiled.
    start = {"kernel": jax.lax.full((4, 3), 2.0), "bias": jax.lax.full((3,), 2.0)}
    params = l1inf.project_params({"hidden": start}, 1.0)
    tx = chained(1.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        return stepped(tx, params, state, steps=1)

    params, state = step(params, tx.init(params))
    params, _ = step(params, state)
    assert inside(params["hidden"])
    assert step._cache_size() == 1


def test_another_radius_compiles_nothing():
    # google-deepmind/optax#197: hyperparameters in closures, and static transformations.
    @jax.jit
    def step(params, c):
        return stepped(chained(c), params, steps=1)[0]["hidden"]

    for c in (0.5, 0.25):
        assert inside(step(hidden(), c), c)
    assert step._cache_size() == 1
    assert hash(chained(1.0)) is not None


def test_a_step_can_run_where_nothing_is_promoted_and_nan_are_errors():
    # google/flax#1534 (ranks), jax-ml/jax#7368 (dtypes), jax-ml/jax#5698 (false alarms of
    # jax_debug_nans): strict modes of JAX, with a unit that is all zeros.
    params = jax.tree.map(lambda x: x.at[..., 0].set(0), hidden())
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with strict[0], strict[1], jax.debug_nans(True), jax.debug_infs(True):
        params, _ = jax.jit(functools.partial(stepped, chained(1.0), steps=1))(params)
    assert inside(params["hidden"])


def test_bfloat16_needs_no_promotion_of_dtypes():
    # jax-ml/jax#7368.
    with jax.numpy_dtype_promotion("strict"):
        projected = l1inf.projection_l1inf_ball(jnp.ones((3, 2), jnp.bfloat16), 1.0)
    assert (norms(projected) <= 1).all()


def test_checks_of_floats_find_nothing_in_a_projection():
    # jax-ml/jax#18680 (disable_jit with debug_nans); jax-ml/jax#11905: checkify says the same.
    with jax.disable_jit(), jax.debug_nans(True):
        projected = l1inf.projection_l1inf_ball(jnp.array([[2.0], [1.0]]), 1.0)
    assert (norms(projected) <= 1).all()


def test_devices_that_average_gradients_take_the_same_step():
    # google/flax#4261 (shard_map): parameters replicated, the batch split.
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    tx = chained(1.0)
    params = hidden()
    everywhere, split = PartitionSpec(), PartitionSpec("batch")

    def loss(params, x):
        return jnp.mean((x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) ** 2)

    def step(params, state, x):
        grads = jax.lax.pmean(jax.grad(loss)(params, x), "batch")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    specs = {"in_specs": (everywhere, everywhere, split), "out_specs": (everywhere, everywhere)}
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    params, _ = sharded(params, tx.init(params), normal(4, 4))
    assert inside(params["hidden"])


def test_the_learning_rate_has_a_gradient_through_a_constrained_step():
    # google-deepmind/optax#882 and #247: learning a hyperparameter through the update, with remat.
    start = hidden()["hidden"]
    target = normal(4, 3, key=2)

    def loss(params):
        return jnp.sum((params["kernel"] - target) ** 2) + jnp.sum(params["bias"] ** 2)

    @jax.checkpoint
    def after(rate):
        tx = optax.chain(optax.sgd(rate), l1inf.keep_params_in_l1inf_ball(1.0))
        updates, _ = tx.update(jax.grad(loss)(start), tx.init(start), start)
        return loss(optax.apply_updates(start, updates))

    slope = (after(0.051) - after(0.049)) / 0.002
    np.testing.assert_allclose(jax.jit(jax.grad(after))(0.05), slope, rtol=0.02)


# --- what is not in the ball, and who says so -----------------------------------------------------


@pytest.mark.parametrize(
    ("params", "unseen"),
    [
        # google/flax#3516, patrick-kidger/equinox#476: a kernel that two layers share stands beside
        # the bias of one; the column of the other has a norm of 5 and more.
        ({"a": network()["hidden"], "b": {"bias": jnp.full(3, 5.0)}}, "b"),
        # google-deepmind/dm-haiku#191: a node without keys beside a layer that is found.
        ({"a": network()["hidden"], "node": WithoutKeys(normal(4, 3), normal(3))}, "node"),
        # google-deepmind/optax#994: a sparse kernel beside a layer that is found.
        ({"a": network()["hidden"], "sparse": {"kernel": BCOO.fromdense(jnp.eye(3))}}, "sparse"),
        # google/flax#3988: the layer adds lora_a lora_b to the kernel, which alone is bounded.
        ({"a": network()["hidden"], "lora_a": normal(4, 2), "lora_b": normal(2, 3)}, "lora_a"),
    ],
    ids=["shared kernel", "no keys", "sparse", "low rank"],
)
def test_what_no_layer_owns_is_listed_as_free(params, unseen):
    start = l1inf.project_params(params, 1.0)
    printed = str(l1inf.diagnose(chained(1.0), start, 1.0))
    assert unseen in next(line for line in printed.splitlines() if line.startswith("free:"))


def test_a_weight_that_is_normalised_before_it_is_used_is_a_finding():
    # patrick-kidger/equinox#624, pytorch/pytorch#7313: weight normalisation undoes the ball.
    layer = eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=jax.random.key(0)), "weight")
    params = eqx.filter(layer, eqx.is_inexact_array)
    params = jax.tree.map(lambda x: jnp.full_like(x, 0.125), params)  # norms of 5/8
    names = [finding.name for finding in l1inf.diagnose(chained(0.625), params, 0.625).findings]
    assert "weight norm" in names


def test_a_bias_that_is_frozen_outside_is_found_with_all_parameters():
    # patrick-kidger/equinox#908, google-deepmind/optax#1274: only kernels are trained.
    params = hidden()
    params["hidden"]["bias"] = jnp.full(3, 5.0)
    kernels = {name: {"kernel": layer["kernel"]} for name, layer in params.items()}
    trained, state = stepped(chained(1.0), kernels)
    merged = {name: params[name] | trained[name] for name in params}
    names = [
        finding.name for finding in l1inf.diagnose(chained(1.0), merged, 1.0, state=state).findings
    ]
    assert "left the ball" in names
