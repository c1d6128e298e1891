"""What `constrain` adds: the metric of the step, and what is gained by projecting in it."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

import l1inf_optax as l1inf
from l1inf_optax import _layers, _metric
from tests.support import oracle

C = 0.7


def some_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (30, 4), "bias": (4,)}
    return {"layer": {k: jnp.asarray(0.1 * rng.normal(size=s), dtype) for k, s in shapes.items()}}


def some_grads(seed, params):
    """Gradients of very different sizes, some of them zero at every step."""
    sizes, rng = np.random.default_rng(9), np.random.default_rng(seed)

    def grad(p):
        size = np.exp(2 * sizes.normal(size=p.shape)) * (sizes.random(p.shape) > 0.1)
        return jnp.asarray(size * rng.normal(size=p.shape), p.dtype)

    return jax.tree.map(grad, params)


def steps(optimizer, n, params):
    """The last of n steps from one point: states before and after, gradients, updates, slopes."""
    optimizer = optax.with_extra_args_support(optimizer)
    after = optimizer.init(params)
    for seed in range(n):
        before, grads = after, some_grads(seed, params)
        updates, after = optimizer.update(grads, before, params)
    layers = _layers.find_layers(params)
    slopes = _metric.slopes(optimizer, before, after, grads, updates, params, {}, layers)
    if slopes is None:
        slopes = jax.tree.map(jnp.ones_like, params)
    return before, after, grads, updates, slopes


# --- the metric is that of the step ---------------------------------------------------------------


def corrected(x, t, decay=0.999):
    return x / (1 - decay**t)


# name: optimizer, and its metric in one leaf from its state after t steps. Those whose leaves may
# have factors of their own say so with None and are compared leaf by leaf.
FORMULAS = {
    "adam": (optax.adam(0.1), lambda s, t: np.sqrt(corrected(s["nu"], t)) + 1e-8),
    "adam_with_its_own_numbers": (
        optax.adam(0.1, b1=0.5, b2=0.9, eps=1e-2, eps_root=1e-3),
        lambda s, t: np.sqrt(corrected(s["nu"], t, 0.9) + 1e-3) + 1e-2,
    ),
    "adamw": (
        optax.adamw(0.1, weight_decay=0.3),
        lambda s, t: np.sqrt(corrected(s["nu"], t)) + 1e-8,
    ),
    "nadam": (optax.nadam(0.1), lambda s, t: np.sqrt(corrected(s["nu"], t)) + 1e-8),
    "amsgrad": (optax.amsgrad(0.1), lambda s, t: np.sqrt(s["nu_max"]) + 1e-8),
    "adabelief": (optax.adabelief(0.1), lambda s, t: np.sqrt(corrected(s["nu"], t)) + 1e-16),
    "radam": (
        optax.radam(0.1, threshold=-1e9),
        lambda s, t: np.sqrt(corrected(s["nu"], t)) + 1e-8,
    ),
    "yogi": (optax.yogi(0.1), lambda s, t: np.sqrt(corrected(s["nu"], t)) + 1e-3),
    "rmsprop": (optax.rmsprop(0.1), lambda s, t: np.sqrt(s["nu"] + 1e-8)),
    "rmsprop_momentum": (
        optax.rmsprop(0.1, momentum=0.9, eps_in_sqrt=False),
        lambda s, t: np.sqrt(s["nu"]) + 1e-8,
    ),
    "centred_rmsprop": (
        optax.rmsprop(0.1, centered=True),
        lambda s, t: np.sqrt(s["nu"] - s["mu"] ** 2 + 1e-8),
    ),
    "adagrad": (optax.adagrad(0.1), lambda s, t: np.sqrt(s["sum_of_squares"] + 1e-7)),
    "adafactor_unfactored": (
        optax.adafactor(0.1, multiply_by_parameter_scale=False, clipping_threshold=None),
        lambda s, t: np.sqrt(s["v"]),
    ),
    "adan": (
        optax.adan(0.1),
        lambda s, t: np.sqrt(corrected(s["n"], t, 0.99) + 1e-8) + 1e-8,
    ),
    "ademamix": (
        optax.contrib.ademamix(0.1),
        lambda s, t: np.sqrt(corrected(s["nu"], t)) + 1e-8,
    ),
    "simplified_ademamix": (
        optax.contrib.simplified_ademamix(0.1, b2=0.9),
        lambda s, t: np.sqrt(corrected(s["n"], t, 0.9)) + 1e-8,
    ),
    "sgd": (optax.sgd(0.1, momentum=0.9), lambda s, t: 1.0),
}


@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_the_preconditioner_of_the_step_just_taken(name, t):
    optimizer, formula = FORMULAS[name]
    params = some_params()
    _, after, _, _, slopes = steps(optimizer, t, params)
    ratios = []
    for leaf in ("kernel", "bias"):
        state = {
            field: np.asarray(getattr(after[0], field)["layer"][leaf], np.float64)
            for field in ("mu", "nu", "nu_max", "n", "v", "sum_of_squares")
            if hasattr(after[0], field)
        }
        weights = formula(state, t)
        ratios.append((weights * np.asarray(slopes["layer"][leaf], np.float64)).ravel())
    ratios = np.concatenate(ratios)
    np.testing.assert_allclose(ratios, np.median(ratios), rtol=1e-4)


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_lamb_has_the_trust_ratio_of_each_leaf(weight_decay, t):
    params = some_params()
    _, after, _, _, slopes = steps(optax.lamb(0.1, weight_decay=weight_decay), t, params)
    adam, ratios = after[0], []
    for leaf in ("kernel", "bias"):
        p, mu, nu = (np.asarray(x["layer"][leaf], np.float64) for x in (params, adam.mu, adam.nu))
        d = np.sqrt(corrected(nu, t)) + 1e-6
        direction = corrected(mu, t, 0.9) / d + weight_decay * p
        trust = np.linalg.norm(p) / np.linalg.norm(direction)
        ratios.append((np.asarray(slopes["layer"][leaf]) * d / trust).ravel())
    ratios = np.concatenate(ratios)
    np.testing.assert_allclose(ratios, np.median(ratios), rtol=1e-4)


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("factored", [False, True])
def test_adafactor_steps_by_its_slopes_times_the_gradient(factored, t):
    params = some_params()
    optimizer = optax.adafactor(0.1, min_dim_size_to_factor=2 if factored else 128)
    _, _, grads, updates, slopes = steps(optimizer, t, params)
    ratios = [
        np.abs(np.asarray(u)[g != 0] / (np.asarray(s) * np.asarray(g))[g != 0])
        for u, s, g in zip(*map(jax.tree.leaves, (updates, slopes, grads)), strict=True)
    ]
    ratios = np.concatenate(ratios)
    np.testing.assert_allclose(ratios, np.median(ratios), rtol=1e-4)


def test_sm3_steps_by_its_slopes_times_the_gradient():
    params = some_params()
    optimizer = optax.sm3(0.1, momentum=0.0)
    _, _, grads, updates, slopes = steps(optimizer, 3, params)
    for u, s, g in zip(*map(jax.tree.leaves, (updates, slopes, grads)), strict=True):
        np.testing.assert_allclose(u, s * g, rtol=1e-5)
        assert (s < 0).all()


# --- through wrappers -----------------------------------------------------------------------------

ADAM = optax.adam(0.02)
WRAPPED = {
    "chain": optax.chain(optax.clip_by_global_norm(1e6), ADAM),
    "named_chain": optax.named_chain(("clip", optax.clip(1e6)), ("adam", ADAM)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.02, b2=0.999),
    "masked": optax.masked(ADAM, {"layer": {"kernel": True, "bias": True}}),
    "partition": optax.partition({"a": ADAM, "b": ADAM}, {"layer": {"kernel": "a", "bias": "b"}}),
    "unsorted_partition": optax.partition(
        {"b": ADAM, "a": ADAM}, {"layer": {"kernel": "a", "bias": "b"}}
    ),
    "MultiSteps": optax.MultiSteps(ADAM, 1).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
    "schedule": optax.adam(optax.constant_schedule(0.02)),
}


def compiled(tx):
    """For wrappers whose branches would be compiled at every step, or that jit might disturb."""
    return tx._replace(update=jax.jit(tx.update))


def train(tx, n=6, repeat=1, params=None):
    """Parameters after n updates, each gradient given ``repeat`` times.

    Not compiled as a whole: then all optimizers share one compiled search.
    """
    params = some_params() if params is None else params
    state = tx.init(params)
    for seed in range(n):
        for _ in range(repeat):
            updates, state = tx.update(some_grads(seed, params), state, params)
            params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_optimizer_is_constrained_like_a_bare_one(name):
    tx = l1inf.constrain(WRAPPED[name], C)
    if name in ("MultiSteps", "apply_if_finite", "unsorted_partition", "inject_hyperparams"):
        tx = compiled(tx)
    expected, got = train(l1inf.constrain(ADAM, C)), train(tx)
    chex.assert_trees_all_close(got, expected, atol=2e-6)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x == 0, tree) for tree in (got, expected)))


def test_accumulated_gradients_are_projected_when_they_are_applied():
    tx = compiled(l1inf.constrain(optax.MultiSteps(ADAM, 2).gradient_transformation(), C))
    params = l1inf.project_params(some_params(), C)
    expected = train(l1inf.constrain(ADAM, C), params=params)
    chex.assert_trees_all_close(train(tx, repeat=2, params=params), expected, atol=2e-6)
    updates, _ = tx.update(some_grads(0, params), tx.init(params), params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))


def test_leaves_with_step_sizes_of_their_own_are_projected_by_them():
    rates = {"kernel": 0.02, "bias": 0.3}
    tx = optax.partition(
        {k: optax.sgd(rate) for k, rate in rates.items()},
        {"layer": {"kernel": "kernel", "bias": "bias"}},
    )
    params = some_params()
    grads = some_grads(1, params)
    after = train_once(l1inf.constrain(tx, C), params, grads)
    check_projection(params, grads, after, {k: 1 / r for k, r in rates.items()}, rates)


def train_once(tx, params, grads):
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def check_projection(params, grads, after, weights, rates):
    """After a gradient step, the columns are their projections in rational arithmetic."""
    stepped = {
        k: np.asarray(params["layer"][k] + jnp.float32(-rates[k]) * grads["layer"][k], np.float64)
        for k in rates
    }
    for j in range(4):
        v = [stepped["bias"][j], *stepped["kernel"][:, j]]
        d = [weights["bias"], *[weights["kernel"]] * 30]
        exact = np.array([float(x) for x in oracle.project(v, C, d)])
        got = [after["layer"]["bias"][j], *after["layer"]["kernel"][:, j]]
        np.testing.assert_allclose(got, exact, atol=2e-6)


# --- what cannot be told is an error --------------------------------------------------------------


class Unheard(NamedTuple):
    square: jax.Array


def unheard_of(rate=0.02):
    """A new optimizer: RMSProp, under a name of its own."""

    def init(params):
        return Unheard(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        square = jax.tree.map(lambda s, g: 0.9 * s + 0.1 * g**2, state.square, updates)
        steps = jax.tree.map(lambda g, s: -rate * g * jax.lax.rsqrt(s + 1e-8), updates, square)
        return steps, Unheard(square)

    return optax.GradientTransformation(init, update)


def with_weights(like):
    """A link of one's own that scales entries by constants, and has no state to say so."""
    weights = jax.tree.map(lambda x: jnp.linspace(1, 9, x.size).reshape(x.shape), like)
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, weights))


FIT_NO_METRIC = {
    "centralize": optax.chain(optax.centralize(), ADAM),
    "centralize_and_sgd": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "centralize_after": optax.chain(ADAM, optax.centralize()),
    "centralize_in_apply_if_finite": optax.apply_if_finite(
        optax.chain(optax.centralize(), ADAM), 3
    ),
    "centralize_in_MultiSteps": optax.MultiSteps(
        optax.chain(optax.centralize(), ADAM), 400
    ).gradient_transformation(),
    "centralize_and_noise": optax.chain(
        optax.centralize(), optax.add_noise(0.1, 0.55, jax.random.key(0)), ADAM
    ),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "adaptive_grad_clip_after": optax.chain(ADAM, optax.adaptive_grad_clip(0.01)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(1.0), ADAM),
    "clip_after": optax.chain(optax.scale_by_adam(), optax.clip(0.5), optax.scale(-0.1)),
    "tanh_after": optax.chain(
        optax.scale_by_adam(),
        optax.stateless_with_tree_map(lambda u, _: jnp.tanh(u)),
        optax.scale(-0.1),
    ),
    "weights": optax.chain(optax.sgd(0.1), with_weights(some_params())),
    "times_parameters": optax.chain(
        ADAM, optax.stateless_with_tree_map(lambda u, p: u * jnp.abs(p))
    ),
}


@pytest.mark.parametrize("name", FIT_NO_METRIC)
def test_a_link_that_leaves_no_metric_is_an_error_that_says_what_to_write(name):
    remedy = r"in front: optax\.chain\(optax\.centralize\(\), l1inf\.constrain\(optax\.adam"
    with pytest.raises(ValueError, match=f"a link mixes entries.*{remedy}.*metric=f"):
        l1inf.constrain(FIT_NO_METRIC[name], C).init(some_params())


CHANGE_THE_GRADIENT = {
    "centralize": optax.centralize(),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    "clip_by_global_norm": optax.clip_by_global_norm(0.01),
}


@pytest.mark.parametrize("name", CHANGE_THE_GRADIENT)
def test_in_front_they_leave_adams_own_metric(name):
    def adams(state, params):
        del params
        nu, count = (optax.tree.get(state, x) for x in ("nu", "count"))
        return jax.tree.map(lambda v: jnp.sqrt(v / (1 - 0.999**count)) + 1e-8, nu)

    link = CHANGE_THE_GRADIENT[name]
    got = train(optax.chain(link, l1inf.constrain(ADAM, C)))
    chex.assert_trees_all_close(
        got, train(l1inf.constrain(optax.chain(link, ADAM), C, metric=adams)), atol=2e-6
    )


@pytest.mark.parametrize("name", ["clip", "clip_by_global_norm"])
def test_a_clip_that_binds_is_the_same_inside_and_in_front(name):
    link = getattr(optax, name)(0.05)
    chex.assert_trees_all_close(
        train(l1inf.constrain(optax.chain(link, ADAM), C)),
        train(optax.chain(link, l1inf.constrain(ADAM, C))),
        atol=2e-6,
    )


def test_leaves_that_a_link_scales_are_projected_by_their_factors():
    params, rates = some_params(), {"kernel": 3e-3, "bias": 1e-3}
    grads = some_grads(1, params)
    factors = {
        k: rates[k] * float(jnp.linalg.norm(params["layer"][k]) / jnp.linalg.norm(g))
        for k, g in grads["layer"].items()
    }
    sgd = optax.partition(
        {k: optax.sgd(r) for k, r in rates.items()}, {"layer": {k: k for k in rates}}
    )
    after = train_once(
        l1inf.constrain(optax.chain(optax.scale_by_trust_ratio(), sgd), C), params, grads
    )
    check_projection(params, grads, after, {k: 1 / r for k, r in factors.items()}, factors)


def test_positive_parameters_stay_positive_in_the_ball():
    tx = l1inf.constrain(optax.chain(ADAM, optax.keep_params_nonnegative()), C)
    params = jax.tree.map(jnp.abs, some_params())
    got = train(tx, params=params)["layer"]
    assert all((x >= 0).all() for x in got.values())
    assert (got["kernel"].sum(0) + got["bias"] <= C).all()
    assert ((got["kernel"] > 0).sum(0) > 1).all()


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        pytest.param(
            unheard_of(),
            "does not know Unheard.*metric=f.*neutral=.Unheard,.*all entries scaled alike",
            id="unheard_of",
        ),
        pytest.param(optax.sign_sgd(0.1), "sign-SGD", id="sign_sgd"),
        pytest.param(optax.chain(optax.clip(1.0), optax.sign_sgd(0.1)), "sign-SGD", id="clipped"),
    ],
)
def test_auto_never_guesses(optimizer, said):
    with pytest.raises(ValueError, match=rf"metric='auto'.*{said}"):
        l1inf.constrain(optimizer, C).init(some_params())


class Watched(NamedTuple):
    largest: jax.Array


def watch(factor):
    """Keeps the largest update that it has seen, and scales updates; by the entry if it may."""

    def update(updates, state, params=None):
        del params
        top = jnp.max(jnp.stack([jnp.abs(u).max() for u in jax.tree.leaves(updates)]))
        return jax.tree.map(factor, updates), Watched(jnp.maximum(state.largest, top))

    return optax.GradientTransformation(lambda params: Watched(jnp.zeros([])), update)


def test_a_state_of_ones_own_is_neutral_if_one_says_so():
    params = some_params()
    watched = optax.chain(watch(lambda u: 2 * u), optax.adam(0.01), watch(lambda u: 2 * u))
    with pytest.raises(ValueError, match=r"does not know Watched.*neutral=\(Watched,\)"):
        l1inf.constrain(watched, C).init(params)
    got = train(l1inf.constrain(watched, C, neutral=(Watched,)))
    chex.assert_trees_all_close(got, train(l1inf.constrain(ADAM, C)), atol=2e-6)


def test_a_state_that_is_said_to_be_neutral_is_tried_all_the_same():
    crooked = watch(lambda u: u * jnp.arange(1.0, 1 + u.shape[-1]))
    with pytest.raises(ValueError, match="a link mixes entries"):
        l1inf.constrain(optax.chain(optax.sgd(0.1), crooked), C, neutral=(Watched,)).init(
            some_params()
        )


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ValueError, match=r"metric='l2' is unknown: use 'auto', 'euclidean'"):
        l1inf.constrain(ADAM, C, metric="l2")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(
            lambda: l1inf.constrain(optax.adam, C),
            r"optimizer=adam is a function that makes one: call it, as in adam\(1e-3\)",
            id="not_called",
        ),
        pytest.param(
            lambda: l1inf.constrain(C, ADAM), r"optimizer=0\.7 is no optimizer.*first", id="order"
        ),
        pytest.param(
            lambda: l1inf.constrain(ADAM, ADAM), "c is an optimizer.*constrain", id="c_is_one"
        ),
        pytest.param(
            lambda: l1inf.keep_params_in_l1inf_ball(ADAM),
            r"c is an optimizer.*optax\.chain\(optimizer, keep_params_in_l1inf_ball\(c\)\)",
            id="keep_params_of_an_optimizer",
        ),
    ],
)
def test_an_optimizer_in_the_wrong_place_is_an_error_that_names_the_right_one(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_forgotten_params_are_an_error():
    params = some_params()
    tx = l1inf.constrain(ADAM, C)
    with pytest.raises(ValueError, match="params=None"):
        tx.update(params, tx.init(params))


def test_an_optimizer_may_hand_over_its_own_metric():
    def metric(state, params):
        del params
        return jax.tree.map(lambda s: jnp.sqrt(s + 1e-8), state.square)

    expected = train(l1inf.constrain(optax.rmsprop(0.02), C))
    got = train(l1inf.constrain(unheard_of(), C, metric=metric))
    chex.assert_trees_all_close(got, expected, atol=2e-6)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)])
def test_sgd_is_projected_as_if_chained(optimizer):
    chained = optax.chain(optimizer, l1inf.keep_params_in_l1inf_ball(C))
    chex.assert_trees_all_equal(train(l1inf.constrain(optimizer, C)), train(chained))
    euclidean = l1inf.constrain(ADAM, C, metric="euclidean")
    chained = optax.chain(ADAM, l1inf.keep_params_in_l1inf_ball(C))
    chex.assert_trees_all_equal(train(euclidean), train(chained))


# --- the promises ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_parameters_are_feasible_after_every_step_and_zeros_exact(dtype):
    params = some_params(dtype)
    tx = l1inf.constrain(optax.adam(0.02, eps=1e-4), C)
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(12):
        updates, state = update(some_grads(seed, params), state, params)
        params = optax.apply_updates(params, updates)
        layer = {k: np.abs(np.asarray(x, np.float64)) for k, x in params["layer"].items()}
        assert layer["kernel"].dtype == np.float64
        assert (layer["kernel"].sum(0) + layer["bias"] <= C).all()
    assert (layer["kernel"] == 0).mean() > 0.2


def test_a_column_inside_keeps_its_update_bit_for_bit():
    params = some_params()
    grads = some_grads(0, params)
    steps_, _ = ADAM.update(grads, ADAM.init(params), params)
    tx = l1inf.constrain(ADAM, 1e3)
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates, steps_)


def test_other_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, factor, **extra):
        del params, extra
        return jax.tree.map(lambda g: -factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = l1inf.constrain(inner, 1e3, metric="euclidean")
    params = some_params()
    updates, _ = tx.update(params, tx.init(params), params, factor=0.5)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda p: -0.5 * p, params))


@pytest.mark.parametrize(
    "name", ["adamw", "nadamw", "adamaxw", "lamb", "lars", "adafactor", "decayed_sgd"]
)
def test_shapes_are_enough_to_start_from(name):
    if name == "decayed_sgd":
        optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1))
    else:
        optimizer = getattr(optax, name)(0.1)
    tx, params = l1inf.constrain(optimizer, C), some_params()
    shapes = jax.eval_shape(lambda: params)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(params))
    for state in (tx.init(shapes), jax.eval_shape(tx.init, params)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == expected


def test_an_optimizer_with_a_traced_learning_rate_can_be_made_under_jit():
    params = some_params()

    def once(rate):
        tx = l1inf.constrain(optax.chain(optax.clip(1.0), optax.sgd(rate)), C)
        return train_once(tx, params, some_grads(0, params))

    tx = l1inf.constrain(optax.sgd(0.1), C)
    expected = train_once(tx, params, jax.tree.map(lambda g: g.clip(-1, 1), some_grads(0, params)))
    chex.assert_trees_all_close(jax.jit(once)(0.1), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["polyak_sgd", "backtracking", "reduce_on_plateau"])
def test_optimizers_that_are_told_the_loss_are_constrained(name):
    link = {
        "polyak_sgd": optax.polyak_sgd(),
        "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9)),
        "reduce_on_plateau": optax.chain(ADAM, optax.contrib.reduce_on_plateau(patience=1)),
    }[name]
    tx, params = l1inf.constrain(link, C), l1inf.project_params(some_params(), C)
    target = jax.tree.map(lambda x: x + 0.1, params)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), loss(params)
    for _ in range(8):
        params, state = step(params, state)
    assert loss(params) < 0.9 * start
    layer = {k: np.abs(np.asarray(x, np.float64)) for k, x in params["layer"].items()}
    assert (layer["kernel"].sum(0) + layer["bias"] <= C).all()


def test_arguments_that_only_the_user_knows_are_named():
    def update(updates, state, params=None, *, factor, **extra):
        del params, extra
        return jax.tree.map(lambda g: -factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    with pytest.raises(ValueError, match=r"'factor'.*metric=f.*metric='euclidean'"):
        l1inf.constrain(inner, C).init(some_params())


def test_lookahead_goes_around():
    tx = optax.lookahead(l1inf.constrain(ADAM, C), 3, 0.5)
    start = l1inf.project_params(some_params(), C)
    params = optax.LookaheadParams.init_synced(start)
    state = tx.init(params)
    for seed in range(6):
        updates, state = tx.update(some_grads(seed, start), state, params)
        params = optax.apply_updates(params, updates)
        columns = jnp.vstack([params.slow["layer"]["bias"], params.slow["layer"]["kernel"]])
        assert l1inf.l1inf_norm(columns) <= C * (1 + 1e-6)


def test_orbax_restores_the_state(tmp_path):
    import orbax.checkpoint as ocp

    params = some_params()
    tx = l1inf.constrain(optax.adam(1e-3), C)
    _, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    chex.assert_trees_all_equal(restored, state)


# --- what it is for -------------------------------------------------------------------------------

N, D, STEPS = 200, 500, 3000


class Convex(NamedTuple):
    """Least squares and logistic regression in an L1 ball, and their solutions."""

    losses: callable
    radii: dict
    optima: dict


@functools.cache
def convex():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)) * np.exp(0.5 * rng.normal(size=D))
    truth = np.where(rng.random(D) < 0.1, 2 * rng.normal(size=D), 0) / np.abs(x).mean(0)
    y = (x @ truth + 0.5 * rng.normal(size=N)) / 10
    z = np.where(x @ truth + rng.logistic(size=N) > 0, 1.0, -1.0)

    def square(w):
        return ((x @ w - y) ** 2).mean() / 2, x.T @ (x @ w - y) / N

    def logistic(w):
        m = z * (x @ w)
        return np.logaddexp(0, -m).mean(), -x.T @ (z * scipy.special.expit(-m)) / N

    optima = {"square": penalised(square, 0.02), "logistic": penalised(logistic, 0.01)}

    def losses(params):
        w = {k: leaf["kernel"][:, 0] for k, leaf in params.items()}
        return {
            "square": jnp.mean((x @ w["square"] - y) ** 2) / 2,
            "logistic": jnp.mean(jnp.logaddexp(0, -z * (x @ w["logistic"]))),
        }

    return Convex(losses, {k: float(np.abs(w).sum()) for k, w in optima.items()}, optima)


def penalised(value_and_grad, strength):
    """The minimiser of loss + strength ||w||_1, which is that of the loss in the ball it reaches.

    With w = p - q it is a smooth problem with bounds.
    """

    def split(pq):
        value, grad = value_and_grad(pq[:D] - pq[D:])
        return value + strength * pq.sum(), np.concatenate([grad + strength, strength - grad])

    result = scipy.optimize.minimize(
        split,
        np.zeros(2 * D),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * (2 * D),
        options={"maxiter": 10**5, "maxfun": 10**6, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 50},
    )
    return result.x[:D] - result.x[D:]


def fit(tx):
    problem = convex()

    def loss(params):
        losses = problem.losses(params)
        return losses["square"] + 20 * losses["logistic"]

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = {k: {"kernel": jnp.full((D, 1), 1e-3)} for k in problem.radii}
    start = l1inf.project_params(start, problem.radii)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, STEPS))(
        (start, tx.init(start))
    )
    return params


def excess(params):
    """How far the losses are above their optima, relatively."""
    problem = convex()
    best = problem.losses({k: {"kernel": w[:, None]} for k, w in problem.optima.items()})
    got = problem.losses(params)
    return {k: float(got[k] / best[k] - 1) for k in best}


def decaying(rate):
    return optax.cosine_decay_schedule(rate, STEPS)


COVERED = {
    "momentum": lambda: optax.sgd(decaying(0.02), momentum=0.97, nesterov=True),
    "adam": lambda: optax.adam(decaying(0.03)),
    "nadam": lambda: optax.nadam(decaying(0.03)),
    "amsgrad": lambda: optax.amsgrad(decaying(0.3)),
    "adabelief": lambda: optax.adabelief(decaying(0.03)),
    "radam": lambda: optax.radam(decaying(0.03)),
    "yogi": lambda: optax.yogi(decaying(0.03)),
    "lamb": lambda: optax.lamb(decaying(0.3)),
    "novograd": lambda: optax.novograd(decaying(0.03)),
    "adamax": lambda: optax.adamax(decaying(0.1)),
    "rmsprop": lambda: optax.rmsprop(decaying(0.03)),
    "centred_rmsprop": lambda: optax.rmsprop(decaying(0.03), centered=True),
    "adagrad": lambda: optax.adagrad(decaying(0.6)),
    "adadelta": lambda: optax.adadelta(decaying(3.0)),
    "adafactor": lambda: optax.adafactor(decaying(0.1), multiply_by_parameter_scale=False),
    "sm3": lambda: optax.chain(optax.scale_by_sm3(), optax.scale_by_learning_rate(decaying(1.0))),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", COVERED)
def test_it_reaches_the_constrained_optimum(name):
    params = fit(l1inf.constrain(COVERED[name](), convex().radii))
    for problem, above in excess(params).items():
        support = np.abs(convex().optima[problem]) > 1e-7
        assert 0.15 < support.mean() < 0.25
        assert above < 1e-6
        got = np.asarray(params[problem]["kernel"][:, 0])
        np.testing.assert_array_equal(got != 0, support)


@pytest.mark.usefixtures("x64")
def test_a_euclidean_projection_after_adam_does_not():
    tx = optax.chain(COVERED["adam"](), l1inf.keep_params_in_l1inf_ball(convex().radii))
    assert all(above > 1 for above in excess(fit(tx)).values())
