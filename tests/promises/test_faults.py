"""NaN and infinity anywhere in a training, at any step: nothing hangs, spreads or stays infeasible.

A fault is something added to gradients or parameters, or a factor of the loss; without one it is 0,
or 1. So one compiled training serves every fault, and the run without.
"""

import functools
import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import l1inf_optax as l1inf

C = 0.7
BALL = {"hidden_*": C}
EPS = float(jnp.finfo(jnp.float32).eps)
WRONG = np.nan, np.inf, -np.inf
STEPS = 24
WIDTH = 6
MODEL = l1inf.linen.AugmentedMLP((WIDTH, WIDTH, 1))
X = jnp.asarray(np.random.default_rng(0).normal(size=(32, WIDTH)), jnp.float32)
Y = jnp.sin(X[:, :1]) + X[:, 1:2]
INSIDE_BALL = {"hidden_*": C * (1 - 2.0**-20)}  # by more than rounding, so that 0 moves nothing
PARAMS = jax.jit(lambda key: l1inf.project_params(MODEL.init(key, X), INSIDE_BALL))(
    jax.random.key(0)
)
HIDDEN = "hidden_0", "hidden_1"

KEEP = l1inf.keep_params_in_l1inf_ball
MOMENTUM = optax.chain(optax.sgd(0.05, momentum=0.9), KEEP(BALL))
ADAM = optax.adam(0.02)


def loss(params, dtype=jnp.float32):
    outputs = MODEL.apply(jax.tree.map(lambda p: p.astype(dtype), params), X.astype(dtype))
    return jnp.mean((outputs - Y.astype(dtype)) ** 2)


def norms(params):
    """L1 norms of the constrained columns, in float64; leading axes are steps."""
    kernels = [np.asarray(params["params"][name]["augmented_kernel"]) for name in HIDDEN]
    return np.abs(np.stack(kernels, axis=-3).astype(np.float64)).sum(-2)


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


class Fault(NamedTuple):
    """What is done to every step: leaves with a leading axis of steps."""

    loss: Any
    grads: Any


def no_fault():
    none = jax.tree.map(lambda p: np.zeros((STEPS, *p.shape), np.float32), PARAMS)
    return Fault(np.ones(STEPS, np.float32), none)


def spoil(array, place, wrong, rng):
    """Puts something wrong into one entry, a column or all of a matrix."""
    row, column = (rng.integers(n) for n in array.shape)
    array[{"entry": (row, column), "column": (slice(None), column), "layer": ...}[place]] = wrong


def some_faults(seed):
    """Faults of every kind at random steps, and which steps those are."""
    rng = np.random.default_rng(seed)
    fault, faulty = no_fault(), rng.random(STEPS) < 0.3
    for step in np.flatnonzero(faulty):
        place, wrong = rng.choice(["loss", "entry", "column", "layer"]), rng.choice(WRONG)
        if place == "loss":
            fault.loss[step] = wrong
        else:
            kernels = jax.tree.leaves(fault.grads)
            spoil(kernels[rng.integers(len(kernels) // 2)][step], place, wrong, rng)
    return fault, faulty


@functools.cache
def training(tx):
    """A compiled training, ``(fault, loss scale) -> (params, state) after every step``."""

    def step(scale, carry, fault):
        params, state = carry
        grads = jax.grad(lambda p: scale * fault.loss * loss(p))(params)
        grads = jax.tree.map(lambda g, f: g / scale + f, grads, fault.grads)
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    @jax.jit
    def train(scale, fault):
        start = PARAMS, tx.init(PARAMS)
        return jax.lax.scan(functools.partial(step, scale), start, fault)[1]

    return lambda fault, scale=1.0: train(scale, fault)


# --- faulty steps are skipped ---------------------------------------------------------------------

SKIP = {"should_skip_update_fn": optax.skip_not_finite}
OUTSIDE = {
    "momentum": optax.apply_if_finite(MOMENTUM, STEPS),
    "adam": optax.apply_if_finite(l1inf.constrain(ADAM, BALL), STEPS),
    "accumulated": optax.MultiSteps(MOMENTUM, 2, **SKIP).gradient_transformation(),
}
INSIDE = {
    "adam": l1inf.constrain(optax.apply_if_finite(ADAM, STEPS), BALL),
    "accumulated": l1inf.constrain(
        optax.MultiSteps(ADAM, 2, **SKIP).gradient_transformation(), BALL
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_with_the_skip_around_the_ball_faulty_steps_have_never_been(name):
    train = training(OUTSIDE[name])
    start = PARAMS, OUTSIDE[name].init(PARAMS)
    clean, clean_state = jax.tree.map(
        lambda first, rest: np.concatenate([np.asarray(first)[None], rest]),
        start,
        train(no_fault()),
    )
    assert (norms(clean) > 0.99 * C).any(), "the ball matters"
    for seed in range(4):
        fault, faulty = some_faults(seed)
        params, state = train(fault)
        taken = np.cumsum(~faulty)
        assert_same(params, jax.tree.map(lambda x, taken=taken: x[taken], clean))
        assert (norms(params) <= C).all()
        thresholds = optax.tree.get(state, "thresholds")
        expected = optax.tree.get(clean_state, "thresholds")
        assert_same(thresholds, jax.tree.map(lambda x, taken=taken: x[taken], expected))


@pytest.mark.parametrize("name", INSIDE)
def test_with_the_skip_inside_the_ball_faulty_steps_move_nothing(name):
    train = training(INSIDE[name])
    for seed in range(4):
        fault, faulty = some_faults(seed)
        params, state = train(fault)
        before = jax.tree.map(lambda p, x: np.concatenate([p[None], x[:-1]]), PARAMS, params)
        assert_same(*(jax.tree.map(lambda x, f=faulty: x[f], p) for p in (params, before)))
        assert (norms(params) <= C).all()
        jax.tree.map(lambda t: np.testing.assert_array_less(-1, t), state.ball.thresholds)
        assert float(loss(jax.tree.map(lambda x: x[-1], params))) < float(loss(PARAMS))


# --- faulty steps are taken -----------------------------------------------------------------------

UNPROTECTED = {
    "sgd": optax.chain(optax.sgd(0.05), KEEP(BALL)),
    "momentum": MOMENTUM,
    "adam": l1inf.constrain(ADAM, BALL),
}


def some_gradients(seed, steps):
    """Gradients that depend on no parameters, so that no network spreads what is wrong."""
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)
        for _ in range(steps)
    ]


def healed(state):
    """A state with zeros for what is not finite in the optimizer's own part, not in the ball's."""
    own, ball = state
    own = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), own)
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves((own, ball)))


@pytest.mark.parametrize("name", UNPROTECTED)
def test_a_fault_stays_in_its_columns_and_ends_with_it(name):
    tx = UNPROTECTED[name]
    update = jax.jit(lambda g, s, p: applied(p, *tx.update(g, s, p)))
    kinds = itertools.product(["gradients", "parameters"], ["entry", "column", "layer"], WRONG)
    for seed, (where, place, wrong) in enumerate(kinds):
        fault = np.zeros((WIDTH + 1, WIDTH), np.float32)
        spoil(fault, place, wrong, np.random.default_rng(seed))
        touched = (fault != 0).any(0)  # NaN is not 0 either
        gradients = some_gradients(seed, 6)
        clean = params = PARAMS
        clean_state = state = tx.init(PARAMS)
        for step, grads in enumerate(gradients):
            clean, clean_state = update(grads, clean_state, clean)
            if step == 2 and where == "gradients":
                grads = with_fault(grads, fault)
            if step == 2 and where == "parameters":
                params = with_fault(params, fault)
            params, state = update(grads, state, params)
            for one, other in ((params, clean), (state[1].thresholds, clean_state[1].thresholds)):
                assert_same(untouched(one, touched), untouched(other, touched))
            if step >= 2 and name == "sgd" and where == "gradients" and np.isinf(wrong):
                assert (norms(params) <= C).all(), "an infinite step ends in the ball"
        if np.isnan(wrong):
            assert np.isnan(norms(params)[0, touched]).all(), "a NaN does not go away by itself"
        params, state = update(gradients[0], healed(state), healed((params, ()))[0])
        assert (norms(params) <= C).all()
        assert all(np.isfinite(t).all() for t in jax.tree.leaves(state[1].thresholds))


def applied(params, updates, state):
    return optax.apply_updates(params, updates), state


def with_fault(tree, fault):
    """A tree like the parameters, with a fault added to the first hidden layer."""
    leaves = dict(tree["params"])
    leaves["hidden_0"] = {"augmented_kernel": leaves["hidden_0"]["augmented_kernel"] + fault}
    return {"params": leaves}


def untouched(tree, touched):
    """All of it but the touched columns of the first hidden layer."""

    def keep(path, leaf):
        return np.asarray(leaf)[..., ~touched] if "hidden_0" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(keep, tree)


def test_a_fault_in_one_leaf_does_not_reach_the_metric_of_others():
    """Of an optimizer whose steps differ by a factor from leaf to leaf, and so from w to b."""
    rng = np.random.default_rng(0)
    shapes = {name: {"w": (7, 6), "b": (6,)} for name in ("first", "second")}
    params, clean = (
        jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(2)
    )
    params = l1inf.project_params(params, C)
    tx = l1inf.constrain(optax.lamb(0.02), C)
    update = jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])
    expected = update(clean)["second"]
    for wrong in (*WRONG, 3e38):
        faulty = clean["first"]["w"].copy()
        faulty[1, 2] = wrong
        got = update({**clean, "first": {**clean["first"], "w": faulty}})["second"]
        chex.assert_trees_all_close(got, expected, atol=1e-7)


def test_an_infinite_parameter_is_brought_back_by_a_projection_of_the_parameters():
    """No update does that: what is added to infinity leaves it infinite, or NaN."""
    fault = np.zeros((WIDTH + 1, WIDTH), np.float32)
    fault[2, 3], fault[4, 3] = np.inf, -np.inf
    projected = l1inf.project_params(with_fault(PARAMS, fault), BALL)
    assert (norms(projected) <= C).all()
    expected = np.zeros(WIDTH + 1)
    expected[[2, 4]] = C / 2, -C / 2
    column = projected["params"]["hidden_0"]["augmented_kernel"][:, 3]
    np.testing.assert_allclose(column, expected, rtol=1e-6)


def test_a_radius_that_is_wrong_for_a_step_is_felt_in_its_layer_and_step_only():
    @jax.jit
    def update(radius, grads, state, params):
        tx = KEEP({"hidden_0": lambda step: jnp.where(step == 1, radius, C), "hidden_1": C})
        return applied(params, *tx.update(grads, state, params))

    def run(radius):
        params, state, history = PARAMS, KEEP(BALL).init(PARAMS), []
        for grads in some_gradients(0, 3):
            params, state = update(radius, grads, state, params)
            history.append(norms(params))
        return np.array(history)

    expected = run(C)
    for radius in (np.nan, np.inf, 0.0, -1.0, 1e-45):
        got = run(radius)
        np.testing.assert_array_equal(got[:, 1], expected[:, 1])
        if np.isnan(radius):
            assert np.isnan(got[1:, 0]).all()
        else:
            assert (got[1, 0] > C).all() if radius == np.inf else (got[1, 0] == 0).all()
            assert (got[2, 0] <= C).all()


# --- loss scaling ---------------------------------------------------------------------------------


def test_a_loss_scaled_by_a_power_of_two_trains_to_the_same_bits():
    train = training(OUTSIDE["momentum"])
    assert_same(train(no_fault(), 1024.0), train(no_fault(), 1.0))


def test_a_loss_scale_that_overflows_float16_is_lowered_and_the_step_left_out():
    tx = MOMENTUM

    def step(carry, _):
        params, state, scale = carry
        scale, finite, _, grads = scale.value_and_grad(lambda p: loss(p, jnp.float16))(params)
        stepped = applied(params, *tx.update(grads, state, params))
        params, state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), stepped, (params, state)
        )
        return (params, state, scale), (params, finite)

    scale = DynamicScale(growth_interval=3, fin_steps=jnp.int32(0), scale=jnp.float32(2**17))
    start = PARAMS, tx.init(PARAMS), scale
    _, (params, finite) = jax.jit(lambda start: jax.lax.scan(step, start, None, STEPS))(start)
    assert 2 < STEPS - finite.sum() < STEPS / 2
    assert (norms(params) <= C).all()
    assert float(loss(jax.tree.map(lambda x: x[-1], params))) < float(loss(PARAMS))


# --- averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 1e-2, 1e-3])
def test_averages_of_parameters_are_feasible_to_rounding_and_projected_for_good(share):
    """Exact averages are convex: rounding is all there is.

    A step adds up to 1.5 eps of c to a norm and keeps all but a share of what there was; dividing
    by what the weights add up to, as `optax.ema` does, adds up to 0.5 eps / share once.
    """
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(300, 32)).astype(np.float32) for name in HIDDEN}
    params = {"params": {name: {"augmented_kernel": kernel} for name, kernel in params.items()}}
    params = l1inf.project_params(params, BALL)
    ema = optax.ema(1 - share)

    def step(carry, _):
        average, state = carry
        debiased, state = ema.update(params, state)
        return (optax.incremental_update(params, average, share), state), (average, debiased)

    start = params, ema.init(params)
    averages = jax.jit(lambda start: jax.lax.scan(step, start, None, 1000)[1])(start)
    grown = [norms(average) - norms(params) for average in averages]
    assert 0 < np.max(grown) <= 2 * EPS * C / share
    for average in averages:
        average = jax.tree.map(lambda x: x[-1], average)
        projected = l1inf.project_params(average, BALL)
        assert (norms(projected) <= C).all()
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), projected, average)
        assert max(jax.tree.leaves(moved)) <= max(norms(average).max() - C, 0) + EPS * C


@pytest.mark.parametrize("projected", [False, True])
def test_lookahead_keeps_both_copies_feasible_to_rounding_and_for_good_in_a_chain(projected):
    tx = optax.lookahead(l1inf.constrain(optax.adam(1e-4), BALL), 3, 0.3)
    if projected:
        tx = optax.chain(tx, KEEP(BALL))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params.fast)
        carry = applied(params, *tx.update(grads, state, params))
        return carry, carry[0]

    start = optax.LookaheadParams.init_synced(PARAMS)
    run = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), None, 60)[1])
    for copy in run(start):
        assert (norms(copy) <= (C if projected else C * (1 + 2 * EPS))).all()
        assert (np.diff(norms(copy)[:, 0], axis=0) != 0).any(), "it moves"
