"""A network in small balls trains as in larger ones: the same function, the same steps."""

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import l1inf_optax as l1inf

INPUTS = jax.random.normal(jax.random.key(9), (16, 6))
REFERENCE = 5.0


def mlp(key=0, widths=(6, 12, 10, 8, 3), biases=False):
    keys = jax.random.split(jax.random.key(key), len(widths))
    names = [f"layer_{i}" for i in range(len(widths) - 2)] + ["a_readout"]  # first by its name
    return {
        name: {
            "kernel": jax.random.normal(k, (a, b)) * jnp.sqrt(2 / a),
            "bias": 0.1 * jax.random.normal(k, (b,)) if biases else jnp.zeros(b),
        }
        for name, k, a, b in zip(names, keys, widths[:-1], widths[1:], strict=False)
    }


def apply(params, x):
    for i in range(len(params) - 1):
        layer = params[f"layer_{i}"]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params["a_readout"]["kernel"] + params["a_readout"]["bias"]


C = {"layer_*": 0.5}


@pytest.mark.parametrize("biases", [False, True])
def test_it_is_the_same_function_with_weights_scaled_down(biases):
    params = mlp(biases=biases)
    small, scales = l1inf.rescale_params(apply, params, INPUTS, C)
    np.testing.assert_allclose(apply(small, INPUTS), apply(params, INPUTS), rtol=1e-4, atol=1e-5)
    for i in range(3):
        name = f"layer_{i}"
        np.testing.assert_allclose(small[name]["kernel"], 0.1 * params[name]["kernel"], rtol=1e-5)
        np.testing.assert_allclose(scales[name]["kernel"], 0.1, rtol=1e-4)
        np.testing.assert_allclose(scales[name]["bias"], 0.1 ** (i + 1), rtol=1e-4)
        np.testing.assert_allclose(small[name]["bias"], scales[name]["bias"] * params[name]["bias"])
    np.testing.assert_allclose(scales["a_readout"]["kernel"], 1000, rtol=1e-4)
    np.testing.assert_allclose(scales["a_readout"]["bias"], 1, rtol=1e-4)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.02),
    "momentum": lambda: optax.sgd(0.01, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "adagrad": lambda: optax.adagrad(0.02),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_same_steps(name):
    """Without a ball: the functions stay the same, step by step."""
    params = mlp(biases=True)
    small, scales = l1inf.rescale_params(apply, params, INPUTS, C)
    targets = jax.random.normal(jax.random.key(5), (16, 3))

    def loss(params):
        return jnp.mean((apply(params, INPUTS) - targets) ** 2)

    outputs = []
    for start, tx in (
        (params, OPTIMIZERS[name]()),
        (small, l1inf.with_scales(OPTIMIZERS[name](), scales)),
    ):
        params, state = start, tx.init(start)

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(30):
            params, state = step(params, state)
        outputs.append(apply(params, INPUTS))
    np.testing.assert_allclose(*outputs, rtol=2e-3, atol=2e-3)
    assert not np.allclose(outputs[0], apply(mlp(biases=True), INPUTS), atol=0.05)


@pytest.mark.parametrize(
    "make", [lambda: optax.sgd(0.05), lambda: optax.adam(2e-2)], ids=["sgd", "adam"]
)
def test_constrain_projects_in_the_scaled_metric(make):
    """Without biases a ball of 0.5 is that of 5, scaled: the same zeros and the same outputs."""
    targets = jax.random.normal(jax.random.key(5), (16, 3))

    def without_biases(params, x):
        zero = {k: {**v, "bias": jnp.zeros_like(v["bias"])} for k, v in params.items()}
        return apply(zero, x)

    def loss(params):
        return jnp.mean((without_biases(params, INPUTS) - targets) ** 2)

    ends = []
    for c in (REFERENCE, 0.5):
        radii = {"layer_*": l1inf.shrink(0.3 * c, over=40)}
        params, scales = l1inf.rescale_params(
            without_biases, mlp(), INPUTS, radii, reference=0.3 * REFERENCE
        )
        tx = l1inf.constrain(l1inf.with_scales(make(), scales), radii)
        state = tx.init(params)

        def step(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.jit(lambda x, step=step: jax.lax.scan(step, x, length=60))(
            (params, state)
        )
        ends.append(params)
    for name in ("layer_0", "layer_1", "layer_2"):
        zeros = [np.asarray(params[name]["kernel"] == 0) for params in ends]
        assert zeros[0].mean() > 0.02
        assert (zeros[0] == zeros[1]).mean() > 0.99
    np.testing.assert_allclose(
        without_biases(ends[0], INPUTS), without_biases(ends[1], INPUTS), rtol=5e-3, atol=5e-3
    )


def test_larger_balls_change_nothing():
    params = mlp(biases=True)
    same, scales = l1inf.rescale_params(apply, params, INPUTS, {"layer_*": 7.0})
    chex.assert_trees_all_close(same, params)
    chex.assert_trees_all_close(scales, jax.tree.map(lambda x: jnp.ones([]), params))


def test_free_layers_share_what_is_missing():
    _, scales = l1inf.rescale_params(apply, mlp(), INPUTS, {"layer_[01]": 0.5})
    np.testing.assert_allclose(scales["layer_2"]["kernel"], 10, rtol=1e-4)
    np.testing.assert_allclose(scales["a_readout"]["kernel"], 10, rtol=1e-4)
    np.testing.assert_allclose(scales["layer_2"]["bias"], 0.1, rtol=1e-4)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.relu(nn.LayerNorm(epsilon=1e-12)(nn.Dense(12, name=f"hidden_{i}")(x)))
        return nn.Dense(3, name="readout")(x)


def test_a_norm_behind_a_layer_makes_its_scale_harmless():
    model = Normed()
    params = model.init(jax.random.key(0), INPUTS)
    small, scales = l1inf.rescale_params(model.apply, params, INPUTS, {"hidden_*": 0.5})
    np.testing.assert_allclose(model.apply(small, INPUTS), model.apply(params, INPUTS), atol=1e-3)
    np.testing.assert_allclose(scales["params"]["readout"]["kernel"], 1, rtol=1e-3)
    for i in range(3):  # the norm sets the unit for what comes next, so biases do not multiply up
        for leaf in ("kernel", "bias"):
            np.testing.assert_allclose(scales["params"][f"hidden_{i}"][leaf], 0.1, rtol=1e-2)


def linen():
    model = l1inf.linen.AugmentedMLP((12, 10, 3))
    return model.apply, model.init(jax.random.key(0), INPUTS), {"hidden_*": 0.5}


def nnx_module():
    model = l1inf.nnx.AugmentedMLP(6, (12, 10, 3), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    return lambda p, x: nnx.merge(graph, p)(x), params, {"hidden_*": 0.5}


def equinox():
    model = eqx.nn.MLP(6, 3, 12, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return (
        lambda p, x: jax.vmap(eqx.combine(p, static))(x),
        params,
        {"layers/2": None, "*": 0.5},
    )


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 10, 3])(x)))
    return net.apply, net.init(jax.random.key(0), INPUTS), {"mlp/~/linear_2": None, "*": 0.5}


def convolutional():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x.reshape(-1, 3, 2, 1)))
            return nn.Dense(3, name="readout")(x.reshape(len(x), -1))

    model = Network()
    return model.apply, model.init(jax.random.key(0), INPUTS), {"conv": 0.5}


@pytest.mark.parametrize("make", [linen, nnx_module, equinox, haiku, convolutional])
def test_models_of_all_libraries(make):
    function, params, c = make()
    small, scales = l1inf.rescale_params(function, params, INPUTS, c)
    np.testing.assert_allclose(function(small, INPUTS), function(params, INPUTS), atol=2e-5)
    tx = l1inf.constrain(l1inf.with_scales(optax.adam(1e-2), scales), c)
    state = tx.init(small)
    for _ in range(3):
        grads = jax.grad(lambda p: jnp.sum(function(p, INPUTS) ** 2))(small)
        updates, state = jax.jit(tx.update)(grads, state, small)
        small = optax.apply_updates(small, updates)
    report = l1inf.sparsity_report(small)
    assert all(layer.max_norm <= 0.5 for layer in report.layers if layer.sparsity > 0.2)


@pytest.mark.parametrize(("depth", "c"), [(5, 1e-3), (10, 0.05), (20, 0.3)])
def test_products_of_radii_below_the_smallest_float(depth, c):
    params = mlp(widths=(6, *[12] * depth, 3))
    small, scales = l1inf.rescale_params(apply, params, INPUTS, {"layer_*": c})
    before = apply(params, INPUTS)
    np.testing.assert_allclose(apply(small, INPUTS), before, atol=1e-3 * float(before.std()))
    for i in range(depth):
        expected = (c / REFERENCE) ** (i + 1)
        if expected > 1e-36:
            np.testing.assert_allclose(scales[f"layer_{i}"]["bias"], expected, rtol=0.2)


def saturating(params, x):
    for i in range(len(params) - 1):
        layer = params[f"layer_{i}"]
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params["a_readout"]["kernel"]


def residual(params, x):
    x = x @ params["layer_0"]["kernel"]
    for _ in range(2):
        x += jax.nn.relu(x @ params["layer_1"]["kernel"]) @ params["layer_2"]["kernel"]
    return x @ params["a_readout"]["kernel"]


@pytest.mark.parametrize(
    ("function", "c"), [(saturating, C), (residual, {"layer_1": 0.5, "layer_2": 0.5})]
)
def test_what_is_not_homogeneous_is_refused(function, c):
    params = mlp(widths=(6, 10, 10, 10, 3), biases=True)
    with pytest.raises(ValueError, match=r"changes the outputs|no free layer"):
        l1inf.rescale_params(function, params, INPUTS, c)


def test_a_line_search_sees_the_loss_where_it_is():
    params = mlp(widths=(6, 8, 3))
    small, scales = l1inf.rescale_params(apply, params, INPUTS, C)
    targets = jax.random.normal(jax.random.key(5), (16, 3))

    def loss(params):
        return jnp.mean((apply(params, INPUTS) - targets) ** 2)

    losses = []
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20))
    for start, tx in ((params, search), (small, l1inf.with_scales(search, scales))):
        p, state = start, tx.init(start)
        for _ in range(5):
            value, grad = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=loss)
            p = optax.apply_updates(p, updates)
        losses.append(float(loss(p)))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert losses[0] < 0.9 * float(loss(params))


def test_the_ball_goes_around():
    small, scales = l1inf.rescale_params(apply, mlp(), INPUTS, C)
    with pytest.raises(ValueError, match="put constrain around"):
        l1inf.with_scales(l1inf.constrain(optax.adam(1e-3), C), scales).init(small)
    with pytest.raises(ValueError, match="the optimizer first"):
        l1inf.with_scales(optax.adam, scales)
    with pytest.raises(ValueError, match="not positive"):
        l1inf.with_scales(optax.adam(1e-3), jax.tree.map(jnp.zeros_like, scales))
    with pytest.raises(ValueError, match="one array"):
        l1inf.rescale_params(lambda p, x: (apply(p, x), x), mlp(), INPUTS, C)
    with pytest.raises(ValueError, match="one array"):
        l1inf.rescale_params(lambda p, x: apply(p, x).sum(), mlp(), INPUTS, C)


def test_an_augmented_kernel_has_a_scale_for_its_bias():
    function, params, c = linen()
    scales = l1inf.rescale_params(function, params, INPUTS, c).scales["params"]
    own = scales["hidden_1"]["augmented_kernel"]
    assert own.shape == (13, 1)
    np.testing.assert_allclose(own[0], 0.01, rtol=1e-4)
    np.testing.assert_allclose(own[1:], 0.1, rtol=1e-4)


def test_the_modules_rescale_themselves():
    function, params, c = linen()
    model = l1inf.linen.AugmentedMLP((12, 10, 3))
    expected = l1inf.rescale_params(function, params, INPUTS, c)
    chex.assert_trees_all_equal(model.rescale(params, INPUTS, c), expected)

    function, params, c = nnx_module()
    model = l1inf.nnx.AugmentedMLP(6, (12, 10, 3), rngs=nnx.Rngs(0))
    before = model(INPUTS)
    scales = model.rescale(INPUTS, c)
    np.testing.assert_allclose(model(INPUTS), before, atol=2e-5)
    expected = l1inf.rescale_params(function, params, INPUTS, c)
    chex.assert_trees_all_close(scales, expected.scales)
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), expected.params)
    tx = l1inf.constrain(l1inf.with_scales(optax.adam(1e-2), scales), c)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(INPUTS) ** 2))(model))


def test_map_params_and_checkpoints_see_an_ordinary_state():
    small, scales = l1inf.rescale_params(apply, mlp(), INPUTS, C)
    tx = l1inf.constrain(l1inf.with_scales(optax.adam(1e-2), scales), C)
    state = tx.init(small)
    marked = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert float(optax.tree.get(marked, "mu")["layer_0"]["kernel"][0, 0]) == 1.0
    assert isinstance(state.inner_state, l1inf.WithScalesState)


def test_diagnose_tells_whether_outputs_vary():
    c = {"layer_*": 0.3}
    lost = l1inf.project_params(mlp(), c)
    tx = l1inf.constrain(optax.adam(1e-3), c)
    names = [x.name for x in l1inf.diagnose(tx, lost, c, outputs=apply(lost, INPUTS)).findings]
    assert "outputs hardly vary" in names
    small, scales = l1inf.rescale_params(apply, mlp(), INPUTS, c)
    tx = l1inf.constrain(l1inf.with_scales(optax.adam(1e-3), scales), c)
    names = [x.name for x in l1inf.diagnose(tx, small, c, outputs=apply(small, INPUTS)).findings]
    assert not {"outputs hardly vary", "c too small"} & set(names)
    with pytest.raises(ValueError, match="outputs"):
        l1inf.diagnose(tx, small, c, outputs=jnp.ones(()))


def test_wrong_use_is_named():
    params = mlp()
    with pytest.raises(ValueError, match="reference=0"):
        l1inf.rescale_params(apply, params, INPUTS, C, reference=0)
    with pytest.raises(ValueError, match="no free layer"):
        l1inf.rescale_params(apply, params, INPUTS, 0.5)
    with pytest.raises(ValueError, match="that it ends at"):
        l1inf.rescale_params(apply, params, INPUTS, {"layer_*": lambda step: 1.0})
    with pytest.raises(ValueError, match="the same for all inputs"):
        l1inf.rescale_params(apply, jax.tree.map(jnp.zeros_like, params), INPUTS, C)
    with pytest.raises(ValueError, match="scales has no leaf at"):
        l1inf.with_scales(optax.adam(1e-3), {"other": 1.0}).init(params)
