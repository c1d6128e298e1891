"""What Optax asks of its own optimizers, asked of both transformations.

Optax runs every optimizer of its own through one matrix of tests (`optax/contrib/_common_test.py`,
`optax/_src/alias_test.py`, `optax/_src/sharding_test.py`). This file asks the same of
`keep_params_in_l1inf_ball`, after SGD with momentum, and of `constrain`, around others:

    accepts extra arguments                   handed on, whole, by both transformations
    does not recompile                        nor while c and the step size change
    converges                                 to the solution of the constrained problem
    can be wrapped in inject_hyperparams      the step size, and c as a number and as a schedule
    preserves dtypes, state stable under cond float16, bfloat16, float32, float64
    works under MultiSteps                    and under what else goes around an optimizer
    tree.map_params                           thresholds are no parameters
    takes a schedule where it takes a number  of c
    init with abstract input                  of `keep_params_in_l1inf_ball` here
    explicit meshes                           in `test_sharding`

Its parabolas are there, each with the projection of its target as the solution, and its Rosenbrock
function, in whose ball the solution lies on an edge. Not asked are these of its cases:

- Complex parameters. A soft threshold of complex numbers is another projection: an error says so.
- A scalar or a vector as the only parameter. There is no unit whose incoming weights it could be.
- `mu_dtype` and `accumulator_dtype`: the optimizer's own moments, which nothing here touches.
- `mechanize`, `schedule_free` and `sophia` inside `constrain`. The first two step somewhere else
  than they say, the last clips to signs: `metric="auto"` refuses all three. Chained before
  `keep_params_in_l1inf_ball` they are in `test_transform`.
- Microbatches, which concern gradients before any optimizer sees them.
"""

import functools

import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import l1inf_optax as l1inf
from tests.support import oracle

KEEP = l1inf.keep_params_in_l1inf_ball
C = 1.5


def keep(rate=1e-3, c=C):
    return optax.chain(optax.sgd(rate, momentum=0.9), KEEP(c))


def constrain(rate=0.03, c=C):
    return l1inf.constrain(optax.adam(rate), c)


KEPT, CONSTRAINED = "keep momentum", "constrain adam"
PAIR = {KEPT: keep, CONSTRAINED: constrain}
MAKERS = {**PAIR, "constrain adagrad": lambda: l1inf.constrain(optax.adagrad(0.5), C)}

# --- Optax's targets, side by side in one layer ---------------------------------------------------

# A column each, the bias above: its parabola, its matrix (two columns), its mixed tensors (two).
TARGETS = np.array(
    [[1.0, 3.0, -2.0, 1.0, -1.0], [-1.0, 1.0, 4.0, 1.0, 0.0], [1.0, 0.0, 0.0, -1.0, 1.0]]
)
# And its Rosenbrock function of the weights of a last column.
STARTS = np.array([[-1.0, 0, 0, 0, 0, 0], [10.0, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0]])


def start(dtype=jnp.float32):
    bias, *kernel = STARTS
    return {"params": {"hidden": arrays({"kernel": kernel, "bias": bias}, dtype)}}


def arrays(tree, dtype):
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype), tree, is_leaf=lambda x: not isinstance(x, dict)
    )


def augmented(params, module=np):
    layer = params["params"]["hidden"]
    return module.concatenate([layer["bias"][None], layer["kernel"]])


@jax.jit
def slope(params):
    def loss(params):
        *_, (bias, x, y) = columns = augmented(params, jnp).T
        squares = jnp.sum((jnp.stack(columns[:-1]).T - TARGETS.astype(columns.dtype)) ** 2)
        return squares + bias**2 + (1 - x) ** 2 + 100 * (y - x**2) ** 2

    return jax.value_and_grad(loss)(params)


def solution():
    """Where in the ball the loss is least: projected targets, and a point on an edge."""
    x = np.linspace(0, C, 1_000_001)  # (1, 1) is outside: search where x + y = C
    x = x[np.argmin((1 - x) ** 2 + 100 * (C - x - x**2) ** 2)]
    projected = [[float(e) for e in oracle.project(v, C)] for v in TARGETS.T]
    return np.array([*projected, [0, x, C - x]]).T


@functools.cache
def compiled(name):
    """A transformation, its compiled update, and a list that is longer by one for every trace."""
    tx, traces = MAKERS[name](), []

    @jax.jit
    def update(updates, state, params, **extra):
        traces.append(name)
        return optax.with_extra_args_support(tx).update(updates, state, params, **extra)

    return tx, functools.partial(update, value=1.0, unexpected=1), traces


@pytest.mark.parametrize("name", MAKERS)
def test_it_converges_to_the_solution_in_the_ball_and_compiles_once(name):
    tx, update, traces = compiled(name)
    params = start()
    # As Optax does: a map that changes nothing.
    state = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    for _ in range(1500):
        updates, state = update(slope(params)[1], state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(augmented(params), solution(), rtol=3e-2, atol=3e-2)
    assert (np.abs(augmented(params).astype(np.float64)).sum(0) <= C).all()
    assert traces == [name]


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["keep", "constrain"])
def test_other_arguments_reach_the_optimizer(kind):
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    after = {"keep": lambda: optax.chain(spy, KEEP(C))}
    tx = after.get(kind, lambda: l1inf.constrain(spy, C, metric="euclidean"))()
    params = start()
    extra = {"value": 1.0, "grad": params, "value_fn": slope, "unexpected": "too"}
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, **extra), params)
    assert [seen] == [[extra]]


def test_a_search_along_a_line_gets_value_gradient_and_function():
    params = start()
    tx = optax.chain(optax.lbfgs(), KEEP(C))
    value_fn = lambda params: slope(params)[0]  # noqa: E731

    def step(params, state):
        value, grads = slope(params)
        updates, _ = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates)

    assert types(jax.eval_shape(step, params, tx.init(params))) == types(params)


# --- hyperparameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR)
def test_step_size_and_radius_can_be_injected(name):
    params = start()
    grads = jax.tree.map(jnp.ones_like, params)
    alone, update_alone, _ = compiled(name)
    rate = {KEPT: 1e-3, CONSTRAINED: 0.03}[name]
    tx = optax.inject_hyperparams(PAIR[name])(rate=rate, c=C)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(params), params)
    assert_close((updates, state.inner_state), update_alone(grads, alone.init(params), params))

    state = tx.init(params)
    state.hyperparams.update(rate=jnp.float32(0.1), c=jnp.float32(0.75))
    updates, _ = update(grads, state, params)
    after = augmented(optax.apply_updates(params, updates))
    np.testing.assert_allclose(np.abs(after[:, 0]).sum(), 0.75, rtol=1e-5)  # it started outside
    np.testing.assert_allclose(after[:, 1:], -0.1, rtol=1e-5)  # these are inside, and step freely


def test_the_radius_of_constrain_itself_can_be_injected():
    params = start()
    tx = optax.inject_hyperparams(l1inf.constrain)(optax.adam(0.1), c=2.0)
    state = tx.init(params)
    assert state.hyperparams["c"] == 2
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert (types(updates), types(after)) == (types(params), types(state))


def test_a_schedule_of_c_is_the_same_from_optax_and_from_here():
    params = start()
    grads = jax.tree.map(jnp.ones_like, params)
    schedule = optax.linear_schedule(3.0, 1.0, 2)
    both = optax.inject_hyperparams(KEEP)(c=schedule), KEEP(schedule)

    @jax.jit
    def update(states):
        done = [tx.update(grads, s, params) for tx, s in zip(both, states, strict=True)]
        return tuple(zip(*done, strict=True))

    states = tuple(tx.init(params) for tx in both)
    for c in (3.0, 2.0, 1.0, 1.0):
        updates, states = update(states)
        assert_close(*updates)
        for each in updates:
            after = augmented(optax.apply_updates(params, each))
            np.testing.assert_allclose(np.abs(after).sum(0)[0], c, rtol=1e-6)


def assert_close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# --- dtypes ---------------------------------------------------------------------------------------


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def assert_stable(tx, params, grads):
    """Types of updates and state are those of parameters and state, or `cond` would refuse."""
    state = tx.init(params)

    def step(params, state, grads):
        return jax.lax.cond(
            is_odd(params), lambda: tx.update(grads, state, params), lambda: (params, state)
        )

    updates, after = jax.eval_shape(step, params, state, grads)
    assert types(updates) == types(params)
    assert types(after) == types(state)


def is_odd(params):
    """A condition that is not known before it runs."""
    return sum(jnp.sum(x) for x in jax.tree.leaves(params)) % 2 > 1


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_updates_and_state_keep_their_dtypes_under_cond(name, dtype):
    params = start(dtype)
    assert_stable(MAKERS[name](), params, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_updates_and_state_keep_their_dtypes_under_cond_with_x64(name, dtype):
    params = start(dtype)
    assert_stable(MAKERS[name](), params, params)


def test_complex_parameters_are_an_error():
    params = {"kernel": jnp.ones((3, 2), jnp.complex64)}
    for tx in (KEEP(1.0), l1inf.constrain(optax.sgd(0.1), 1.0)):
        with pytest.raises(ValueError, match="has dtype complex64: convert it"):
            tx.init(params)


# --- wrappers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR)
def test_gradients_accumulate_until_the_last_of_them(name):
    params = start()
    grads = jax.tree.map(jnp.ones_like, params)
    inner, alone, _ = compiled(name)
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(params), params)
    assert all((x == 0).all() for x in jax.tree.leaves(updates))
    assert state.inner_opt_state[-1].step == 0
    updates, state = update(grads, state, params)
    assert state.inner_opt_state[-1].step == 1
    assert_close(updates, alone(grads, inner.init(params), params)[0])


NARROW = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda n: n < 9),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda n: n < 9),
}


def types_of_update(tx, grads, params):
    return types(jax.eval_shape(tx.update, grads, tx.init(params), params)[0])


@pytest.mark.parametrize("wrapper", NARROW)
def test_gradients_narrower_than_parameters_are_cast_before_a_choice_of_branches(wrapper):
    params, grads = start(), start(jnp.bfloat16)
    tx = NARROW[wrapper](MAKERS[KEPT]())
    # Optax's own optimizers want it too: the branch that does nothing returns what came in.
    for refuses in (tx, NARROW[wrapper](optax.adam(0.1))):
        with pytest.raises(TypeError, match=r"float32.*bfloat16"):
            types_of_update(refuses, grads, params)
    assert types_of_update(tx, optax.tree.cast_like(grads, params), params) == types(params)
    chain = optax.chain(optax.stateless(optax.tree.cast_like), tx)
    assert types_of_update(chain, grads, params) == types(params)


@pytest.mark.parametrize("name", PAIR)
def test_where_nothing_is_chosen_between_gradients_may_be_narrow(name):
    params, grads = start(), start(jnp.bfloat16)
    tx = optax.MultiSteps(MAKERS[name](), 2)
    assert types_of_update(tx, grads, params) == types(params)


# --- optax.tree -----------------------------------------------------------------------------------

AROUND = {
    "alone": lambda tx: tx,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "masked": lambda tx: optax.masked(tx, {"params": {"hidden": {"kernel": True, "bias": True}}}),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("one", tx)),
    "partition": lambda tx: optax.partition(
        {"in": tx}, {"params": {"hidden": {"kernel": "in", "bias": "in"}}}
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: tx)(rate=0.1),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", PAIR)
def test_map_params_maps_moments_and_neither_thresholds_nor_counters(name, around):
    tx = AROUND[around](MAKERS[name]())
    params = start()
    state = jax.tree.map(lambda x: x + 1, tx.init(params))
    mapped = optax.tree.map_params(tx, lambda x, y: 100 * y + x, state, params)
    moments = 0
    for (path, before), (_, after) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (state, mapped)), strict=True
    ):
        keys = jax.tree_util.keystr(path)
        entry = [k for k in ("kernel", "bias") if keys.endswith(f"['{k}']")]
        moment = bool(entry) and "thresholds" not in keys
        moments += moment
        expected = 100 * params["params"]["hidden"][entry[0]] + before if moment else before
        np.testing.assert_array_equal(after, expected)
    assert moments >= (2 if name == KEPT else 4)
    assert len(jax.tree.leaves(optax.tree.get(state, "thresholds"))) == 1


@pytest.mark.parametrize("name", PAIR)
def test_map_params_gives_what_is_no_parameter_to_the_other_function(name):
    tx, params = MAKERS[name](), start()
    state = tx.init(params)
    ball = optax.tree.map_params(
        tx,
        lambda x: x,
        state,
        transform_non_params=lambda field: jax.tree.map(lambda x: x - 3, field),
    )[-1]
    assert ball.step == -3
    np.testing.assert_array_equal(ball.thresholds["params"]["hidden"]["kernel"], [-3] * 6)


def test_map_params_makes_shardings_of_a_state():
    tx, params = MAKERS[CONSTRAINED](), start()
    state = tx.init(params)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    shardings = optax.tree.map_params(
        tx, lambda _: split, state, transform_non_params=lambda _: whole
    )
    placed = jax.device_put(state, shardings)
    assert placed.inner_state[0].mu["params"]["hidden"]["kernel"].sharding == split
    assert placed.ball.thresholds["params"]["hidden"]["kernel"].sharding == whole
    assert types(jax.jit(lambda x: x, out_shardings=shardings)(state)) == types(state)


@pytest.mark.parametrize("name", PAIR)
def test_tree_get_and_set_find_step_and_thresholds(name):
    params = start()
    tx, update, _ = compiled(name)
    state = tx.init(params)
    assert optax.tree.get(state, "step") == 0
    thresholds = {"params": {"hidden": {"kernel": jnp.full(6, 2.0)}}}
    assert_close(optax.tree.get(state, "thresholds"), jax.tree.map(jnp.zeros_like, thresholds))
    state = optax.tree.set(state, step=jnp.int32(7), thresholds=thresholds)
    _, state = update(params, state, params)
    assert optax.tree.get(state, "step") == 8
    # Only the first column starts outside.
    found = np.asarray(optax.tree.get(state, "thresholds")["params"]["hidden"]["kernel"])
    assert (found > 0).tolist() == [True] + [False] * 5


# --- trees ----------------------------------------------------------------------------------------


@functools.cache
def linen_params():
    return l1inf.linen.AugmentedMLP((5, 2)).init(jax.random.key(0), jnp.ones((1, 3)))


@functools.cache
def boxed_params():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    return nn.Dense(3, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 4)))


@functools.cache
def nnx_params():
    return nnx.state(l1inf.nnx.AugmentedMLP(3, (5, 2), rngs=nnx.Rngs(0)), nnx.Param)


@functools.cache
def equinox_params():
    model = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_inexact_array)


@functools.cache
def haiku_params():
    net = hk.transform(lambda x: hk.nets.MLP([5, 2])(x))
    return net.init(jax.random.key(0), jnp.ones((1, 3)))


# The places of the thresholds: those of the kernels.
TREES = {
    "linen": (
        linen_params,
        {"params": {"hidden_0": {"augmented_kernel": (5,)}, "readout": {"kernel": (2,)}}},
    ),
    "linen, boxed": (boxed_params, {"params": {"kernel": (3,)}}),
    "nnx": (nnx_params, {"hidden_0": {"augmented_kernel": (5,)}, "readout": {"kernel": (2,)}}),
    "equinox": (equinox_params, {"layers": {"0": {"weight": (5,)}, "1": {"weight": (2,)}}}),
    "haiku": (haiku_params, {"mlp/~/linear_0": {"w": (5,)}, "mlp/~/linear_1": {"w": (2,)}}),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", PAIR)
def test_trees_of_every_library_keep_their_structure_and_types(name, tree):
    make, places = TREES[tree]
    tx, params = MAKERS[name](), make()
    state = tx.init(params)
    thresholds = optax.tree.get(state, "thresholds")
    assert jax.tree.map(jnp.shape, thresholds) == places
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert_close(optax.tree.get(mapped, "thresholds"), thresholds)
    moment = "trace" if name == KEPT else "mu"
    assert all((x == 1).all() for x in jax.tree.leaves(optax.tree.get(mapped, moment)))
    if name == CONSTRAINED:  # which does all that the other does
        assert_stable(tx, params, params)


def test_trees_of_every_library_are_feasible_after_a_step():
    """All trees in one, which is one program."""
    trees = {tree.replace(", ", "_"): make() for tree, (make, _) in TREES.items()}
    c = {"*hidden_0": 0.5, "*layers/0": 0.5, "*linear_0": 0.5}
    tx = l1inf.constrain(optax.adam(0.03), c)
    updates, _ = jax.jit(tx.update)(trees, tx.init(trees), trees)
    after = optax.apply_updates(trees, updates)
    equinox, haiku = after["equinox"].layers[0], after["haiku"]["mlp/~/linear_0"]
    for columns in (
        [after["linen"]["params"]["hidden_0"]["augmented_kernel"]],
        [after["nnx"]["hidden_0"]["augmented_kernel"][...]],
        [equinox.weight.T, equinox.bias[None]],
        [haiku["w"], haiku["b"][None]],
    ):
        norms = sum(np.abs(np.asarray(x, np.float64)).sum(0) for x in columns)
        assert (norms <= 0.5).all()
        np.testing.assert_allclose(norms, 0.5, rtol=1e-5)


@pytest.mark.parametrize("name", PAIR)
def test_a_state_taken_apart_by_slashes_is_put_together_again(name):
    tx, update, _ = compiled(name)
    params = start()
    _, state = update(params, tx.init(params), params)
    flat = flax.traverse_util.flatten_dict(
        flax.serialization.to_state_dict(state), sep="/", keep_empty_nodes=True
    )
    assert any(key.endswith("thresholds/params/hidden/kernel") for key in flat)
    nested = flax.traverse_util.unflatten_dict(flat, sep="/")
    restored = flax.serialization.from_state_dict(tx.init(params), nested)
    assert_close(restored, state)


def test_leaves_whose_paths_continue_one_another_keep_their_own_thresholds():
    """As a Haiku module with a weight `w` and a submodule `w` has them."""
    params = {"mlp": {"w": jnp.ones((3, 2))}, "mlp/w": {"w": jnp.ones((4, 5)), "b": jnp.ones(5)}}
    tx = KEEP(1.0)
    assert types(tx.init(params).thresholds) == {
        "mlp": {"w": ((2,), jnp.float32)},
        "mlp/w": {"w": ((5,), jnp.float32)},
    }
    assert_stable(tx, params, params)


def test_two_leaves_of_one_path_are_an_error():
    params = {"a/b": {"kernel": jnp.ones((3, 2))}, "a": {"b": {"kernel": jnp.ones((4, 5))}}}
    for call in (KEEP(1.0).init, lambda params: l1inf.project_params(params, 1.0)):
        with pytest.raises(ValueError, match=r"two leaves with the path 'a/b/kernel'.*rename one"):
            call(params)


def test_init_takes_shapes_for_parameters():
    params = linen_params()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types(keep().init(abstract)) == types(keep().init(params))
