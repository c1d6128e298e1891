import functools
import itertools
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

import l1inf_optax as l1inf
from l1inf_optax._projection.shrink import Projected
from l1inf_optax._transform import _keep_params_in_ball
from tests.support import oracle

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def norms(kernel, bias=None):
    """L1 norms of the columns of a Dense layer, bias included, added up in float64."""
    total = np.abs(np.asarray(kernel, np.float64)).sum(-2)
    return total if bias is None else total + np.abs(np.asarray(bias, np.float64))


def dense(rng, n=60, m=12, scale=0.1, dtype=jnp.float32):
    kernel = jnp.asarray(scale * rng.normal(size=(n, m)), dtype)
    return {"layer": {"kernel": kernel, "bias": jnp.zeros(m, dtype)}}


def like(rng, tree, scale, dtype=None):
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.normal(size=x.shape), dtype or x.dtype), tree
    )


# --- the promises ---------------------------------------------------------------------------------


@pytest.mark.parametrize("updates_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_feasible_after_every_step(dtype, updates_dtype):
    c = 0.7

    # In one jit with the step size, the optimizer's product may be fused with the addition.
    def chained(scale):
        return optax.chain(optax.sgd(scale, momentum=0.9), l1inf.keep_params_in_l1inf_ball(c))

    @jax.jit
    def step(scale, params, state, grads):
        updates, state = chained(scale).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for scale in (1e-6, 1e-3, 0.3):
        rng = np.random.default_rng(0)
        params = dense(rng, dtype=DTYPES[dtype])
        state = chained(scale).init(jax.tree.map(lambda p: p.astype(DTYPES[updates_dtype]), params))
        for _ in range(12):
            grads = like(rng, params, 1.0, DTYPES[updates_dtype])
            params, state = step(scale, params, state, grads)
            assert params["layer"]["kernel"].dtype == DTYPES[dtype]
            assert (norms(**params["layer"]) <= c).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_inside_keeps_its_update_bit_for_bit(dtype):
    rng = np.random.default_rng(1)
    params = dense(rng, dtype=DTYPES[dtype])
    updates = like(rng, params, 0.05)
    after = optax.apply_updates(params, updates)
    column_norms = norms(**after["layer"])
    # Half of the columns are inside, one next to the sphere, by more than rounding.
    c = float(np.sort(column_norms)[6]) * (1 + 2.0**-20)
    inside = column_norms <= c
    tx = l1inf.keep_params_in_l1inf_ball(c)
    projected, _ = tx.update(updates, tx.init(params), params)
    for name in ("kernel", "bias"):
        kept, given_ = np.asarray(projected["layer"][name]), np.asarray(updates["layer"][name])
        np.testing.assert_array_equal(kept[..., inside], given_[..., inside])
    assert inside.sum() == 7
    assert (np.asarray(projected["layer"]["kernel"]) != updates["layer"]["kernel"])[
        :, ~inside
    ].any()


@pytest.mark.parametrize("updates_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_zero_of_the_projection_is_one_of_the_parameters(dtype, updates_dtype):
    rng = np.random.default_rng(2)
    params = dense(rng, dtype=DTYPES[dtype])
    updates = like(rng, params, 0.1, DTYPES[updates_dtype])
    stepped = optax.apply_updates(params, updates)["layer"]
    columns = jnp.vstack([stepped["bias"], stepped["kernel"]])
    projection = l1inf.projection_l1inf_ball(columns, 0.5)
    tx = l1inf.keep_params_in_l1inf_ball(0.5)
    projected, _ = tx.update(updates, tx.init(params), params)
    after = optax.apply_updates(params, projected)["layer"]
    after = np.asarray(jnp.vstack([after["bias"], after["kernel"]]), np.float64)
    zeros = np.asarray(projection == 0)
    assert 0.3 < zeros.mean() < 0.99
    assert (after[zeros] == 0).all()
    # Next to the projection on the side of zero, within what the updates' dtype can express.
    target = np.asarray(projection, np.float64)
    eps = float(jnp.finfo(jnp.promote_types(DTYPES[dtype], DTYPES[updates_dtype])).eps)
    eps = max(eps, float(jnp.finfo(DTYPES[dtype]).eps))
    np.testing.assert_allclose(after, target, atol=2 * eps * 0.4)


@settings(max_examples=60)
@given(
    data=st.lists(
        st.tuples(*[st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60)] * 2),
        min_size=5,
        max_size=5,
    ),
    c=st.floats(min_value=2.0**-40, max_value=2.0**62),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_every_finite_step_lands_in_the_ball(data, c, dtype):
    params = {"kernel": jnp.asarray(data, dtype)[:, :1]}
    updates = {"kernel": jnp.asarray(data, dtype)[:, 1:]}
    tx = l1inf.keep_params_in_l1inf_ball(c)
    projected, _ = tx.update(updates, tx.init(params), params)
    after = optax.apply_updates(params, projected)
    assert oracle.norm64(np.asarray(after["kernel"], np.float64)) <= c


def test_it_is_the_projection_of_the_step():
    rng = np.random.default_rng(3)
    params = {"kernel": jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)}
    updates = like(rng, params, 0.3)
    tx = l1inf.keep_params_in_l1inf_ball(2.0)
    projected, _ = tx.update(updates, tx.init(params), params)
    after = np.asarray(optax.apply_updates(params, projected)["kernel"])
    stepped = np.asarray(optax.apply_updates(params, updates)["kernel"])
    for j in range(4):
        exact = [float(e) for e in oracle.project(stepped[:, j], 2.0)]
        np.testing.assert_allclose(after[:, j], exact, atol=1e-6)


def test_a_nan_update_spoils_its_column_only_and_no_later_step():
    rng = np.random.default_rng(4)
    params = dense(rng)
    updates = like(rng, params, 0.1)
    tx = l1inf.keep_params_in_l1inf_ball(0.5)
    state = tx.init(params)
    clean, _ = tx.update(updates, state, params)
    updates["layer"]["kernel"] = updates["layer"]["kernel"].at[3, 5].set(jnp.nan)
    spoilt, _ = tx.update(updates, state, params)
    for name in ("kernel", "bias"):
        assert np.isnan(spoilt["layer"][name][..., 5]).all()
        np.testing.assert_array_equal(
            np.delete(spoilt["layer"][name], 5, -1), np.delete(clean["layer"][name], 5, -1)
        )
    updates["layer"]["kernel"] = updates["layer"]["kernel"].at[3, 5].set(jnp.inf)
    infinite, _ = tx.update(updates, state, params)
    after = optax.apply_updates(params, infinite)["layer"]
    assert (norms(**after) <= 0.5).all()
    assert after["kernel"][3, 5] == 0.5


# --- every optimizer ------------------------------------------------------------------------------

# name: learning rate. All that optax.chain accepts; those that need the loss get it as an argument.
OPTIMIZERS = {
    "adabelief": 3e-3, "adadelta": 1.0, "adafactor": 1e-2, "adagrad": 3e-2, "adam": 3e-3,
    "adamax": 3e-3, "adamaxw": 3e-3, "adamw": 3e-3, "adan": 3e-3, "amsgrad": 3e-3, "fromage": 3e-2,
    "lamb": 1e-2, "lars": 3e-2, "lion": 3e-3, "nadam": 3e-3, "nadamw": 3e-3,
"novograd": 3e-3, "optimistic_adam_v2": 3e-3,
    "optimistic_gradient_descent": 1e-2, "radam": 3e-3, "rmsprop": 3e-3,
    "rprop": 1e-3, "sgd": 3e-2, "sign_sgd": 1e-3, "signum": 1e-3, "sm3": 3e-2, "yogi": 1e-2,
}  # fmt: skip
CONTRIB = {
    "acprop": 3e-3, "ademamix": 3e-3, "adopt": 3e-3, "cocob": 1.0, "dadapt_adamw": 1.0,
    "dog": 1.0, "dowg": 1.0, "galore": 3e-3, "madgrad": 3e-3, "momo": 1e-1, "momo_adam": 1e-2,
    "muon": 3e-3, "prodigy": 1.0, "schedule_free_adamw": 3e-3, "schedule_free_sgd": 3e-2,
    "simplified_ademamix": 1e-3,
}  # fmt: skip
MAKERS = {
    **{name: functools.partial(getattr(optax, name, None), rate)
       for name, rate in OPTIMIZERS.items() if hasattr(optax, name)},
    **{f"contrib.{name}": functools.partial(getattr(optax.contrib, name), rate)
       for name, rate in CONTRIB.items() if hasattr(optax.contrib, name)},
    "momentum": lambda: optax.sgd(3e-2, momentum=0.9, nesterov=True),
    "centred_rmsprop": lambda: optax.rmsprop(3e-3, centered=True, momentum=0.9),
    "clipped_adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3)),
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-2)),
}  # fmt: skip
MAKERS["noisy_sgd"] = lambda: optax.noisy_sgd(1e-2, key=jax.random.key(0))
MAKERS["polyak_sgd"] = lambda: optax.polyak_sgd(0.05)
MAKERS["lbfgs"] = lambda: optax.lbfgs(0.1, linesearch=None)


class Task(NamedTuple):
    params: dict
    loss: callable


@functools.cache
def task():
    """A small network, its hidden layer to be constrained, on data it can fit."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 12)), jnp.float32)
    y = jnp.sin(x[:, :1]) + 0.5 * x[:, 1:2]
    model = l1inf.linen.AugmentedMLP((16, 1))
    params = model.init(jax.random.key(0), x)
    return Task(params, lambda params: jnp.mean((model.apply(params, x) - y) ** 2))


def train(tx, params, loss, steps):
    """Trains in one scan; returns the parameters after every step and the losses before it."""

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, value)

    carry = (params, tx.init(params))
    _, (history, values) = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))(carry)
    return history, np.asarray(values)


def compiled(optimizer, loss):
    """The optimizer with its update compiled alone: what follows it in a chain is not, each time.

    It gets the loss, which optimizers that search along a line ask for.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    update = jax.jit(functools.partial(optimizer.update, value_fn=loss))
    return optax.GradientTransformationExtraArgs(optimizer.init, update)


@functools.cache
def slope():
    """The loss and its gradient, compiled once for all optimizers."""
    return jax.jit(jax.value_and_grad(task().loss))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_optimizer_can_be_chained(name):
    params, loss = task()
    c = 0.6
    params = l1inf.project_params(params, {"hidden_*": c})
    tx = optax.chain(
        compiled(MAKERS[name](), loss), l1inf.keep_params_in_l1inf_ball({"hidden_*": c})
    )
    state, kernels, values = tx.init(params), [], []
    for _ in range(60):
        value, grads = slope()(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads)
        params = optax.apply_updates(params, updates)
        kernels.append(np.asarray(params["params"]["hidden_0"]["augmented_kernel"]))
        values.append(float(value))
    assert (norms(np.stack(kernels)) <= c).all()
    assert (np.stack(kernels) == 0).any(), "the ball makes exact zeros"
    assert np.mean(values[-5:]) < values[0]


C = 1.5


def hidden(params):
    """True at the leaves of hidden layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "hidden" in jax.tree_util.keystr(path), params
    )


def labels(params):
    return jax.tree.map(lambda is_hidden: "in" if is_hidden else "free", hidden(params))


SGD = optax.sgd(3e-2, momentum=0.9)
KEEP = l1inf.keep_params_in_l1inf_ball
CHAINED = optax.chain(SGD, KEEP({"hidden_*": C}))
WRAPPED = {
    "MultiSteps": optax.MultiSteps(CHAINED, 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(CHAINED, 3),
    "masked": optax.chain(SGD, optax.masked(KEEP(C), hidden)),
    "multi_transform": optax.multi_transform(
        {"in": optax.chain(SGD, KEEP(C)), "free": SGD}, labels
    ),
    "partition": optax.partition({"in": optax.chain(SGD, KEEP(C)), "free": SGD}, labels),
    "inject_hyperparams": optax.chain(SGD, optax.masked(optax.inject_hyperparams(KEEP)(C), hidden)),
    "named_chain": optax.named_chain(("step", SGD), ("ball", KEEP({"hidden_*": C}))),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_works_under_every_wrapper(name):
    params, loss = task()
    params = l1inf.project_params(params, {"hidden_*": C})
    history, values = train(WRAPPED[name], params, loss, steps=80)
    kernels = np.asarray(history["params"]["hidden_0"]["augmented_kernel"])
    assert (norms(kernels) <= C).all()
    assert (norms(np.asarray(history["params"]["readout"]["kernel"])) > C).any()
    assert (kernels[-1] == 0).any()
    assert values[-5:].mean() < values[0]


def test_fast_and_slow_parameters_of_lookahead_stay_in_the_ball():
    params, loss = task()
    params = optax.LookaheadParams.init_synced(l1inf.project_params(params, {"hidden_*": C}))
    tx = optax.chain(optax.lookahead(SGD, 5, 0.5), KEEP({"hidden_*": C}))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params.fast)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, history = jax.lax.scan(step, (params, tx.init(params)), None, 40)
    for copy in history:
        assert (norms(copy["params"]["hidden_0"]["augmented_kernel"]) <= C).all()


def test_a_non_finite_step_is_skipped_and_the_next_is_feasible():
    params, _ = task()
    tx = WRAPPED["apply_if_finite"]
    state = tx.init(params)
    for factor in (jnp.nan, 1.0, jnp.inf, 1.0):
        grads = jax.tree.map(lambda g, factor=factor: g * factor, slope()(params)[1])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if factor == 1:
            assert (norms(params["params"]["hidden_0"]["augmented_kernel"]) <= C).all()
    chex.assert_tree_all_finite(params)


# --- the radius -----------------------------------------------------------------------------------


def test_a_schedule_is_read_at_the_step_kept_in_the_state():
    rng = np.random.default_rng(5)
    params = dense(rng, scale=1.0)
    schedule = optax.linear_schedule(3.0, 1.0, 4)
    tx = KEEP(schedule)
    state = tx.init(params)
    for step in range(6):
        assert state.step == step
        updates, state = tx.update(like(rng, params, 0.1), state, params)
        params = optax.apply_updates(params, updates)
        radius = max(3.0 - 0.5 * step, 1.0)
        np.testing.assert_allclose(norms(**params["layer"]), radius, rtol=1e-5)
        assert (norms(**params["layer"]) <= radius).all()


def test_the_radius_can_be_set_and_read_as_a_hyperparameter():
    rng = np.random.default_rng(6)
    params = dense(rng, scale=1.0)
    tx = optax.inject_hyperparams(KEEP)(c=2.0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    assert state.hyperparams["c"] == 2.0
    for radius in (2.0, 0.5):
        state.hyperparams["c"] = jnp.float32(radius)
        updates, state = update(like(rng, params, 0.1), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(norms(**params["layer"]), radius, rtol=1e-5)


def test_every_layer_may_have_its_own_radius():
    params = {f"hidden_{i}": dense(np.random.default_rng(i), scale=1.0)["layer"] for i in range(3)}
    params["readout"] = dense(np.random.default_rng(9), scale=1.0)["layer"]
    c = {"hidden_0": 1.0, "hidden_1": optax.constant_schedule(2.0), "readout": None, "*_2": 3}
    projected = l1inf.project_params(params, c)
    for i in range(3):
        np.testing.assert_allclose(norms(**projected[f"hidden_{i}"]), i + 1, rtol=1e-5)
    chex.assert_trees_all_equal(projected["readout"], params["readout"])


def test_the_first_matching_pattern_wins_and_no_match_is_free():
    params = {
        name: dense(np.random.default_rng(0), scale=1.0)["layer"] for name in ("a1", "a2", "b")
    }
    projected = l1inf.project_params(params, {"a1": None, "a*": 1.0})
    assert (norms(**projected["a2"]) <= 1).all()
    for name in ("a1", "b"):
        chex.assert_trees_all_equal(projected[name], params[name])


def test_a_radius_may_be_given_for_each_column():
    params = {"layer": dense(np.random.default_rng(0), scale=1.0)["layer"]}
    c = np.linspace(0.5, 2, 12)
    projected = l1inf.project_params(params, c)
    np.testing.assert_allclose(norms(**projected["layer"]), c, rtol=1e-5)


# --- held zeros -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda **k: optax.chain(SGD, KEEP(0.3, **k)), lambda **k: l1inf.constrain(SGD, 0.3, **k)],
)
def test_zeros_are_held_from_the_update_that_was_asked_for(make):
    rng = np.random.default_rng(0)
    history = {}
    for start in (None, 3):
        params = l1inf.project_params(dense(np.random.default_rng(1)), 0.3)
        tx = make(hold_zeros_from=start)
        state = tx.init(params)
        rng = np.random.default_rng(2)
        history[start] = [params]
        for _ in range(8):
            updates, state = tx.update(like(rng, params, 1.0), state, params)
            params = optax.apply_updates(params, updates)
            assert (norms(**params["layer"]) <= 0.3).all()
            history[start].append(params)
    chex.assert_trees_all_equal(history[3][:4], history[None][:4])
    zeros = [np.asarray(params["layer"]["kernel"]) == 0 for params in history[3]]
    assert zeros[3].any()
    assert (zeros[2] & ~zeros[3]).any(), "until then they may come back"
    for before, after in itertools.pairwise(zeros[3:]):
        assert (after | ~before).all()


# --- jax ------------------------------------------------------------------------------------------


def test_vmap_over_seeds_and_radii_is_the_loop():
    rng = np.random.default_rng(7)
    params, updates = dense(rng), like(rng, dense(rng), 0.1)
    radii = jnp.array([0.3, 1.0, 100.0])

    def update(c, params, updates):
        tx = KEEP(c)
        return tx.update(updates, tx.init(params), params)[0]

    over_c = jax.vmap(update, in_axes=(0, None, None))(radii, params, updates)
    for i, c in enumerate(radii):
        expected = update(c, params, updates)
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], over_c), expected)
    seeds = jax.tree.map(lambda *x: jnp.stack(x), params, like(rng, params, 0.2))
    batch = jax.vmap(update, in_axes=(None, 0, None))(0.5, seeds, updates)
    for i in range(2):
        expected = update(0.5, jax.tree.map(lambda x, i=i: x[i], seeds), updates)
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], batch), expected)


@pytest.mark.usefixtures("x64")
def test_the_step_can_be_differentiated_in_the_radius_and_the_updates():
    rng = np.random.default_rng(8)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), dense(rng))
    updates = like(rng, params, 0.1)

    def after(c, updates):
        tx = KEEP(c)
        projected, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, projected)["layer"]["kernel"]

    jax.test_util.check_grads(after, (0.7, updates), order=1, modes=["fwd", "rev"], eps=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0, 1e30])
def test_wrong_thresholds_in_the_state_change_nothing_but_last_bits(wrong):
    params, _ = task()
    tx = KEEP({"hidden_*": 0.5})
    updates = like(np.random.default_rng(0), params, 0.3)
    state = tx.init(params)
    spoilt = state._replace(thresholds=jax.tree.map(lambda t: t + wrong, state.thresholds))
    expected, got = (
        optax.apply_updates(params, tx.update(updates, s, params)[0]) for s in (state, spoilt)
    )
    chex.assert_trees_all_close(got, expected, atol=1e-6)
    assert (norms(got["params"]["hidden_0"]["augmented_kernel"]) <= 0.5).all()


def test_layers_of_one_shape_are_projected_as_if_alone():
    rng = np.random.default_rng(0)
    tree = {
        f"layer_{i}": {
            "kernel": jnp.asarray(rng.normal(size=(40, 7)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=7), jnp.float32),
        }
        for i in range(3)
    }
    for c in (2.0, lambda step: 2.0 + 0 * step):  # known when it is compiled, and not
        together = run(tree, c)
        updates = like(np.random.default_rng(1), tree, 0.3)
        for name, layer in tree.items():
            tx = KEEP(c)
            alone, _ = tx.update(updates[name], tx.init(layer), layer)
            chex.assert_trees_all_equal(together[name], optax.apply_updates(layer, alone))


@pytest.mark.parametrize("c", [1.0, l1inf.shrink(zeros=0.9, over=3)], ids=["number", "shrink"])
def test_the_state_is_a_pytree_of_arrays_that_orbax_restores(tmp_path, c):
    import orbax.checkpoint as ocp

    params, _ = task()
    tx = optax.chain(optax.adam(1e-3), KEEP({"hidden_*": c}))
    _, state = tx.update(params, tx.init(params), params)
    step, *arrays = jax.tree.leaves(state[1])
    assert step == 1
    assert [x.shape for x in arrays] == [(16,), (16,), *([] if c == 1.0 else [(), ()])]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    chex.assert_trees_all_equal(restored, state)


# --- trees ----------------------------------------------------------------------------------------


def run(tree, c=0.5, **kwargs):
    """One update on a tree of parameters; returns the parameters after it."""
    tx = KEEP(c, **kwargs)
    updates = like(np.random.default_rng(1), tree, 0.3)
    updates, _ = tx.update(updates, tx.init(tree), tree)
    return optax.apply_updates(tree, updates)


def test_linen_params_with_and_without_their_outer_dict():
    for params in (task().params, task().params["params"]):
        after = run(params, {"hidden_*": 0.5})
        after = after.get("params", after)
        assert (norms(after["hidden_0"]["augmented_kernel"]) <= 0.5).all()


def test_boxed_linen_params_keep_their_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    params = nn.Dense(3, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 4)))
    after = run(params)["params"]
    assert after["kernel"].names == (None, "model")
    assert (norms(after["kernel"].value, after["bias"]) <= 0.5).all()


def test_an_nnx_model_trains_in_the_ball_through_its_optimizer():
    model = l1inf.nnx.AugmentedMLP(5, (7, 2), rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), KEEP({"hidden_*": 0.5}))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((3, 5))) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    assert (norms(model.hidden_0.augmented_kernel[...]) <= 0.5).all()
    assert optimizer.opt_state[1].step[...] == 3
    state = l1inf.project_params(nnx.state(model, nnx.Param), {"hidden_*": 0.25})
    nnx.update(model, state)
    assert (norms(model.hidden_0.augmented_kernel[...]) <= 0.25).all()


def test_a_train_state_applies_gradients_in_the_ball():
    params, loss = task()
    tx = optax.chain(optax.sgd(0.1), KEEP({"hidden_*": 0.5}))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))(state)
    assert (norms(state.params["params"]["hidden_0"]["augmented_kernel"]) <= 0.5).all()


def test_an_equinox_model_trains_in_the_ball():
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)  # non-arrays become None
    after = run(params, {"layers/0": 0.5})
    assert (norms(after.layers[0].weight.T, after.layers[0].bias) <= 0.5).all()
    assert (norms(after.layers[1].weight.T, after.layers[1].bias) > 0.5).all()
    assert eqx.combine(after, static)(jnp.ones(4)).shape == (2,)


class Net(NamedTuple):
    first: dict
    second: dict
    extra: jax.Array | None


@chex.dataclass
class DataNet:
    first: dict
    second: dict


@pytest.mark.parametrize("names", [("kernel", "bias"), ("w", "b")])
@pytest.mark.parametrize("container", [Net, DataNet, dict])
def test_named_tuples_dataclasses_and_haiku_style_dicts(container, names):
    rng = np.random.default_rng(0)
    kernel, bias = names
    layers = {
        name: {
            kernel: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            bias: jnp.asarray(rng.normal(size=3), jnp.float32),
        }
        for name in ("first", "second")
    }
    extra = {"extra": None} if container is Net else {}
    after = run(container(**layers, **extra), {"first": 0.5})
    get = after.get if isinstance(after, dict) else functools.partial(getattr, after)
    assert (norms(get("first")[kernel], get("first")[bias]) <= 0.5).all()
    assert (norms(get("second")[kernel], get("second")[bias]) > 0.5).any()


def test_stacked_layers_are_a_batch_of_matrices():
    model = nn.vmap(
        l1inf.linen.AugmentedDense, variable_axes={"params": 0}, split_rngs={"params": True}
    )(6)
    params = model.init(jax.random.key(0), jnp.ones((3, 2, 4)))
    assert params["params"]["augmented_kernel"].shape == (3, 5, 6)
    layers = {"*": l1inf.LayerDimensionNumbers(stack_axis=0)}
    assert (norms(run(params, layers=layers)["params"]["augmented_kernel"]) <= 0.5).all()
    plain = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(6)
    after = run(plain.init(jax.random.key(0), jnp.ones((3, 2, 4))))["params"]
    assert after["kernel"].shape == (3, 4, 6)
    np.testing.assert_array_less(norms(after["kernel"], after["bias"]), 0.5 + 1e-12)


# --- wrong use ------------------------------------------------------------------------------------


def test_forgotten_params_are_an_error():
    params = dense(np.random.default_rng(0))
    tx = KEEP(1.0)
    with pytest.raises(ValueError, match=r"params=None.*update\(updates, state, params\)"):
        tx.update(params, tx.init(params))


def test_updates_of_another_structure_are_an_error():
    params = dense(np.random.default_rng(0))
    tx = KEEP(1.0)
    with pytest.raises(ValueError, match="structure"):
        tx.update({"layer": {"kernel": params["layer"]["kernel"]}}, tx.init(params), params)


def test_a_layer_without_updates_is_an_error():
    params = dense(np.random.default_rng(0))
    tx = KEEP(1.0)
    with pytest.raises(ValueError, match="'layer' has no array: give updates for all of it"):
        tx.update({"layer": {**params["layer"], "bias": None}}, tx.init(params), params)


@pytest.mark.parametrize("c", [0.0, -1.0, np.nan, {"layer": -3.0}])
def test_a_radius_that_is_not_positive_is_an_error(c):
    for make in (KEEP, lambda c: l1inf.project_params(dense(np.random.default_rng(0)), c)):
        with pytest.raises(ValueError, match=r"c=.* is not positive"):
            make(c)


def test_an_unknown_method_is_an_error():
    with pytest.raises(ValueError, match="method='bisection' is unknown: use one of newton, sort"):
        KEEP(1.0, method="bisection")


def test_a_pattern_without_a_match_is_an_error_from_init_on():
    params = task().params
    with pytest.raises(
        ValueError, match=r"'hiden_.*matches nothing.*params/hidden_0, params/readout"
    ):
        KEEP({"hiden_*": 1.0}).init(params)


def test_nothing_to_constrain_is_an_error():
    with pytest.raises(ValueError, match=r"nothing to constrain.*embed/embedding"):
        KEEP(1.0).init({"embed": {"embedding": jnp.ones((3, 2))}})


def test_integer_weights_are_an_error():
    params = {"kernel": jnp.ones((3, 2), jnp.int32)}
    with pytest.raises(ValueError, match="int32"):
        l1inf.project_params(params, 1.0)


@pytest.mark.parametrize("make", [lambda: KEEP(1.0), lambda: l1inf.constrain(optax.sgd(0.1), 1.0)])
def test_the_state_of_something_else_is_an_error(make):
    params, wider = (dense(np.random.default_rng(0), m=m) for m in (12, 13))
    tx = make()
    with pytest.raises(ValueError, match=r"is a dict, not the .*update\(updates, state, params\)"):
        tx.update(params, params, params)
    with pytest.raises(ValueError, match=r"shape \(13,\) for 'layer/kernel', .* ask for \(12,\)"):
        tx.update(params, tx.init(wider), params)


@pytest.mark.parametrize("inner", [KEEP(1.0), l1inf.constrain(optax.sgd(0.1), 1.0)])
@pytest.mark.parametrize("metric", ["auto", "euclidean"])
def test_a_projection_inside_constrain_is_an_error(inner, metric):
    tx = l1inf.constrain(optax.chain(optax.sgd(0.1), inner), 1.0, metric=metric)
    with pytest.raises(ValueError, match="keeps its parameters in a ball already"):
        tx.init(dense(np.random.default_rng(0)))


def test_a_radius_in_a_list_is_an_error():
    with pytest.raises(ValueError, match=r"c=\[1.0, 2.0\] is a list: give a number, or a mapping"):
        KEEP([1.0, 2.0])


@pytest.mark.parametrize("empty", [{}, [], ()], ids=str)
def test_empty_parameters_are_an_error(empty):
    for call in (
        KEEP(1.0).init,
        KEEP({"hidden_*": 1.0}).init,
        l1inf.constrain(optax.adam(0.1), 1.0).init,
        lambda params: l1inf.project_params(params, 1.0),
    ):
        with pytest.raises(ValueError, match="holds no arrays: give the parameters themselves"):
            call(empty)


# --- zeros that stick -----------------------------------------------------------------------------


def stuck(p, u, c, d, share):
    """In float64: the projection, but for zeros that would not survive in a smaller ball.

    ``d`` is the metric, columns are along axis 0; nothing here is shared with the library.
    """
    v = np.asarray(p, np.float64) + np.asarray(u, np.float64)
    kept, norm = oracle.project_many(v, c, d)[0], np.abs(v).sum(0)
    kept = np.asarray(kept, np.float64) * np.sign(v)
    slopes = np.where(kept != 0, 1 / d, 0).sum(0)
    rise = share * c / np.maximum(slopes, 1e-30) / d
    lifted = (np.asarray(p) == 0) & (kept != 0)
    sticks = lifted & (np.abs(kept) <= rise) & (norm >= (1 - share) * c)
    # Where rounding decides either is right.
    sure = np.abs(np.abs(kept) - rise) > 1e-5 * rise
    return np.where(sticks, 0, kept), sure


def after_larger_steps(ball):
    """A state in which any threshold that follows is small."""
    largest = jax.tree.map(lambda t: jnp.full_like(t, 1e9), ball.largest_thresholds)
    return ball._replace(step=jnp.int32(1), largest_thresholds=largest)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("share", [1e-4, 0.01, 0.2])
def test_a_zero_sticks_to_small_steps_unless_a_smaller_ball_would_let_it_go(share, metric, small):
    rng = np.random.default_rng(0)
    p = rng.normal(size=(40, 60)) * (rng.random((40, 60)) < 0.3)
    p *= 0.5 * rng.uniform(0.9, 1, 60) / np.abs(p).sum(0)  # inside by up to a tenth
    u = rng.normal(size=p.shape) * 10 ** rng.uniform(-6, -2, size=p.shape)
    d = np.exp(rng.normal(size=p.shape)) if metric else np.ones_like(p)
    p, u, d = (x.astype(np.float32) for x in (p, u, d))
    tx = l1inf.constrain(
        optax.identity(),
        0.5,
        metric=lambda state, params: {"augmented_kernel": jnp.asarray(d)},
        stickiness=share,
    )
    params = {"augmented_kernel": jnp.asarray(p)}
    state = tx.init(params)
    if small:
        state = state._replace(ball=after_larger_steps(state.ball))
    updates, _ = tx.update({"augmented_kernel": jnp.asarray(u)}, state, params)
    w = np.asarray(optax.apply_updates(params, updates)["augmented_kernel"])
    expected, sure = stuck(p, u, 0.5, d.astype(np.float64), share if small else 0)
    np.testing.assert_array_equal((w == 0)[sure], (expected == 0)[sure])
    np.testing.assert_allclose(w[sure], expected[sure], atol=1e-6)
    assert (norms(w) <= 0.5).all()
    was_zero = (p == 0).sum()
    assert 0 < ((p == 0) & (w == 0)).sum() < was_zero


def test_steps_are_small_at_a_fiftieth_of_the_largest_threshold():
    """But for that of the first update, which may have come from outside."""
    p = jnp.asarray([[0.5], [0.0], [0.0]])
    tx = KEEP(0.5, stickiness=0.2)
    params = {"augmented_kernel": 10 * p}
    state = tx.init(params)
    sizes = {0.0: False, 0.04: False, 0.0012: False, 0.0007: True, 0.02: False}
    for size, sticks in sizes.items():
        # Two entries rise alike and a third falls: the threshold is a third of both rises.
        u = {"augmented_kernel": jnp.asarray([[0.0], [size], [0.9 * size]])}
        updates, state = tx.update(u, state, params)
        moved = optax.apply_updates(params, updates)
        assert bool((moved["augmented_kernel"][1:] == 0).all()) == (sticks or size == 0)
        params = {"augmented_kernel": p}


STICKY = {
    "momentum": lambda rate, **how: optax.chain(optax.sgd(rate, momentum=0.9), KEEP(3.0, **how)),
    "adam": lambda rate, **how: l1inf.constrain(optax.adam(rate), 3.0, **how),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STICKY)
def test_zeros_outlast_a_learning_rate_that_goes_to_zero(name, dtype):
    """Least squares, of which a constant rate keeps few entries, and one that ends at 0 all."""
    data = np.random.default_rng(0).normal(size=(60, 100))

    def nonzero(stickiness, end, dtype):
        x = jnp.asarray(data, DTYPES[dtype])
        y = x[:, :5].sum(1, keepdims=True)
        rate = optax.linear_schedule(0.02, end, 600)
        layers = {"w": l1inf.LayerDimensionNumbers(0, 1)}
        tx = STICKY[name](rate, layers=layers, stickiness=stickiness)
        params = {"w": jnp.zeros((100, 1), DTYPES[dtype])}

        @jax.jit
        def run(params):
            def step(carry, _):
                params, state = carry
                gradient = {"w": x.T @ (x @ params["w"] - y) / 60}
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), None, 800)[0][0]

        return int((run(params)["w"] != 0).sum())

    if dtype == "float32":
        few = nonzero(0.0, 2e-4, dtype)
        assert nonzero(0.03, 0.0, dtype) <= few + 2 <= 20
    else:  # in which the gradient itself is noise
        assert nonzero(0.0, 0.0, dtype) >= 80
        assert nonzero(0.03, 0.0, dtype) <= 60


@pytest.mark.parametrize("share", [-0.1, 1, np.nan, "0.1", None])
def test_stickiness_is_a_share(share):
    for make in (KEEP, functools.partial(l1inf.constrain, optax.adam(1e-3))):
        with pytest.raises(ValueError, match=r"stickiness=.*give the share"):
            make(1.0, stickiness=share)


def test_stickiness_can_be_set_and_read_as_a_hyperparameter():
    params = {"augmented_kernel": jnp.asarray([[0.5, 0.0], [0.0, 0.5]])}
    updates = {"augmented_kernel": jnp.asarray([[0.1, 0.004], [0.004, 0.1]])}
    tx = optax.inject_hyperparams(KEEP)(0.5, stickiness=0.1)
    state = tx.init(params)
    state = state._replace(inner_state=after_larger_steps(state.inner_state))
    landed = optax.apply_updates(params, tx.update(updates, state, params)[0])
    np.testing.assert_allclose(landed["augmented_kernel"], np.eye(2) * 0.5, atol=1e-2)
    assert (np.asarray(landed["augmented_kernel"])[~np.eye(2, dtype=bool)] == 0).all()
    state = optax.tree.set(state, stickiness=0.0)
    back = jax.tree.map(lambda u: u * jnp.asarray([[-1, 1], [1, -1]]), updates)
    landed = optax.apply_updates(params, tx.update(back, state, params)[0])
    assert (np.asarray(landed["augmented_kernel"]) != 0).all()


# --- another ball ---------------------------------------------------------------------------------


def onto_l2_balls(make, requests):
    """Columns of an L2 norm of at most c, as Keras's MaxNorm keeps them."""

    def project(request):
        parts = make(*request.operands)
        squares = sum(jnp.sum(x**2, request.axes, keepdims=True) for x in parts)
        norm = jnp.sqrt(squares)
        shorter = request.c / norm * (1 - 4 * jnp.finfo(norm.dtype).eps)
        inside = norm <= request.c
        return Projected(
            parts=tuple(jnp.where(inside, x, x * shorter) for x in parts),
            threshold=jnp.zeros_like(jnp.squeeze(norm, request.axes)),
            inside=inside,
            slope=jnp.ones_like(norm),
            on_sphere=~inside,
            passes=jnp.int32(1),
        )

    return [project(request) for request in requests]


def test_another_ball_takes_one_function():
    rng = np.random.default_rng(0)
    params = dense(rng)
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), _keep_params_in_ball(onto_l2_balls, 0.5, None, None, 0.0)
    )
    state = tx.init(params)
    for _ in range(10):
        updates, state = tx.update(like(rng, params, 0.3), state, params)
        params = optax.apply_updates(params, updates)
        columns = np.vstack([params["layer"]["bias"], params["layer"]["kernel"]])
        lengths = np.sqrt((columns.astype(np.float64) ** 2).sum(0))
        assert (lengths <= 0.5).all()
    assert (lengths > 0.49).any()
