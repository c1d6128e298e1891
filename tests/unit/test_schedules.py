import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import l1inf_optax as l1inf

KEEP = l1inf.keep_params_in_l1inf_ball
BOTH = {
    "keep": lambda c, **how: optax.chain(optax.sgd(0.05, momentum=0.9), KEEP(c, **how)),
    "constrain": lambda c, **how: l1inf.constrain(optax.adam(0.01), c, **how),
}
ROWS, UNITS = 40, 6


def layer(seed=0, scale=1.0, dtype=jnp.float32):
    """A kernel, and a bias at zero."""
    kernel = scale * np.random.default_rng(seed).normal(size=(ROWS, UNITS))
    return {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.zeros(UNITS, dtype)}


def two_layers():
    return {"hidden_0": layer(0), "hidden_1": layer(1, 3.0), "readout": layer(2)}


def norm(part):
    """The largest L1 norm of a unit, in float64."""
    parts = [np.asarray(x, np.float64) for x in part.values()]
    return max(np.abs(np.vstack(parts)).sum(0))


def zeros(part):
    return float((np.asarray(part["kernel"]) == 0).mean())


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, key):
    """One update by a noisy gradient that pulls a third of the entries outwards without an end."""

    def gradient(x, key):
        pull = jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)
        noise = jax.random.normal(key, x.shape, x.dtype)
        outwards = jnp.where(x == 0, jnp.sign(pull), jnp.sign(x))
        return -outwards * jnp.maximum(jnp.abs(pull) - 1, 0.01) - 0.1 * noise

    leaves, structure = jax.tree.flatten(params)
    grads = map(gradient, leaves, jax.random.split(key, len(leaves)))
    updates, state = tx.update(jax.tree.unflatten(structure, grads), state, params)
    return optax.apply_updates(params, updates), state


def train(tx, params, steps, state=None, first=0):
    """Parameters and state before the first update and after each."""
    state = tx.init(params) if state is None else state
    trace = [(params, state)]
    for i in range(first, first + steps):
        trace.append(step(tx, *trace[-1], jax.random.key(i)))
    return trace


# --- how it falls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_each_layer_falls_geometrically_from_its_own_norm(name):
    params = two_layers()
    c = {"hidden_*": l1inf.shrink(0.5, over=20), "readout": None}
    trace = train(BOTH[name](c), params, 25)
    for path in ("hidden_0", "hidden_1"):
        start = norm(params[path])
        assert start > 20
        for i, (after, _) in enumerate(trace[1:]):
            radius = start * (0.5 / start) ** min((i + 1) / 20, 1)
            assert norm(after[path]) <= radius * (1 + 1e-5)
            assert norm(after[path]) >= radius * (1 - 1e-2)
        assert norm(trace[-1][0][path]) <= 0.5  # without a tolerance
    assert norm(trace[-1][0]["readout"]) > 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_last_radius_is_kept_to_the_last_bit(dtype):
    trace = train(
        BOTH["keep"](l1inf.shrink(0.1, over=7, start=30.0)), {"a": layer(dtype=dtype)}, 12
    )
    assert norm(trace[1][0]["a"]) > 10
    assert all(norm(params["a"]) <= 0.1 for params, _ in trace[7:])


def test_where_the_norm_is_below_the_end_the_radius_is_the_end():
    trace = train(BOTH["keep"](l1inf.shrink(100.0, over=5)), {"a": layer()}, 200)
    assert norm(trace[5][0]["a"]) < 100
    assert norm(trace[-1][0]["a"]) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_it_stops_when_each_layer_has_its_zeros(name):
    params = {**two_layers(), "hidden_2": layer(3)}
    c = {"hidden_1": l1inf.shrink(zeros=0.5, over=200), "*": l1inf.shrink(zeros=0.9, over=200)}
    trace = train(BOTH[name](c), params, 201)
    ends = {}
    for path in params:
        wanted = 0.5 if path == "hidden_1" else 0.9
        reached = next(i for i, (p, _) in enumerate(trace) if zeros(p[path]) >= wanted)
        held = trace[-1][1]
        held = held[-1] if name == "keep" else held.ball
        ends[path] = int(held.shrinking.held_from[path]["kernel"])
        assert ends[path] == reached < 200
        mask = np.asarray(trace[reached][0][path]["kernel"]) == 0
        assert (np.asarray(trace[-1][0][path]["kernel"])[mask] == 0).all()
        # The radius has stopped: every column is at the norm it had.
        assert norm(trace[-1][0][path]) == pytest.approx(
            norm(trace[reached + 1][0][path]), rel=1e-4
        )
    assert len(set(ends.values())) > 1


def test_zeros_that_are_out_of_reach_end_with_the_updates():
    params = {"a": {"kernel": jnp.ones((4, 3))}}  # equal magnitudes never part
    tx = KEEP(l1inf.shrink(zeros=0.5, over=10, start=2.0))
    state = tx.init(params)
    for _ in range(15):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.shrinking.held_from["a"]["kernel"]) == 10
    np.testing.assert_allclose(np.asarray(params["a"]["kernel"]).sum(0), 2e-3, rtol=1e-4)


def test_a_layer_that_starts_at_zero_learns_first():
    params = {"lora_b": {"kernel": jnp.zeros((ROWS, UNITS))}}
    trace = train(BOTH["constrain"](l1inf.shrink(zeros=0.8, over=100)), params, 100)
    assert zeros(trace[2][0]["lora_b"]) < 0.8 <= zeros(trace[-1][0]["lora_b"]) < 1


@pytest.mark.parametrize("bias", [0.0, 1e-3])
@pytest.mark.parametrize("name", ["warm-up", "multi_steps", "nan"])
def test_zeros_of_the_start_are_none_that_were_made(name, bias):
    """While nothing moves yet, or next to nothing."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.05, 20, 200)
    inner = {
        "warm-up": optax.adam(rate),
        "multi_steps": optax.MultiSteps(optax.adam(0.05), 4).gradient_transformation(),
        "nan": optax.apply_if_finite(optax.adam(0.05), 5),
    }[name]
    tx = l1inf.constrain(inner, l1inf.shrink(zeros=0.5, over=150))
    params = {"a": {"kernel": jnp.zeros((ROWS, UNITS)), "bias": jnp.full(UNITS, bias)}}
    state = tx.init(params)
    assert state.ball.shrinking.start["a"]["kernel"] == 1
    if name == "nan":
        updates, state = tx.update(jax.tree.map(lambda x: x * jnp.nan, params), state, params)
        params = optax.apply_updates(params, updates)
    params, state = train(tx, params, 200, state)[-1]
    assert 1 < int(state.ball.shrinking.held_from["a"]["kernel"]) <= 150
    assert 0.5 <= zeros(params["a"]) < 1


def test_a_nan_stays_in_its_column():
    params = {"a": layer()}
    params["a"]["kernel"] = params["a"]["kernel"].at[0, 1].set(jnp.nan)
    tx = KEEP(l1inf.shrink(0.5, over=20))
    updates, _ = jax.jit(tx.update)({"a": layer(1)}, tx.init(params), params)
    is_nan = jnp.isnan(optax.apply_updates(params, updates)["a"]["kernel"]).any(0)
    np.testing.assert_array_equal(is_nan, np.arange(UNITS) == 1)


def test_more_zeros_than_leave_a_weight_to_a_unit_are_an_error():
    params = {"a": {"augmented_kernel": jnp.ones((5, 16))}}
    KEEP(l1inf.shrink(zeros=0.75, over=10)).init(params)
    with pytest.raises(ValueError, match=r"zeros=0.9 leaves less than one of 4 .* at most 0.75"):
        KEEP(l1inf.shrink(zeros=0.9, over=10)).init(params)


# --- what is held ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_zero_weights_are_held_and_biases_are_not(name):
    trace = train(BOTH[name](l1inf.shrink(0.5, over=20)), {"a": layer()}, 80)
    at_end = np.asarray(trace[20][0]["a"]["kernel"]) == 0
    assert at_end.mean() > 0.3
    assert all((np.asarray(p["a"]["kernel"])[at_end] == 0).all() for p, _ in trace[20:])


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("layout", ["plain", "augmented"])
def test_only_weights_are_held_and_only_if_asked(layout, hold):
    bias, kernel = jnp.zeros((1, 2)), jnp.ones((3, 2)).at[1:].set(0)
    plain, augmented = {"bias": bias[0], "kernel": kernel}, jnp.vstack([bias, kernel])
    params = {"a": plain if layout == "plain" else {"augmented_kernel": augmented}}
    tx = KEEP(l1inf.shrink(5.0, over=1, hold=hold), stickiness=0.0)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(lambda x: 0.1 + 0 * x, params), state, params)
    moved = jnp.vstack(jax.tree.leaves(updates))
    held = 0 if hold else 0.1
    np.testing.assert_allclose(moved, [[0.1] * 2, [0.1] * 2, [held] * 2, [held] * 2], rtol=1e-6)


@pytest.mark.parametrize("radius", [4.0, np.inf])  # the first is smaller than where it stops
def test_a_released_radius_opens_once_zeros_are_held(radius):
    tx = BOTH["keep"](l1inf.shrink(zeros=0.7, over=50, release=radius))
    trace = train(tx, {"a": layer()}, 300)
    held = int(trace[-1][1][-1].shrinking.held_from["a"]["kernel"])
    mask = np.asarray(trace[held][0]["a"]["kernel"]) == 0
    assert 0.7 <= mask.mean() < 1
    assert (np.asarray(trace[-1][0]["a"]["kernel"])[mask] == 0).all()
    fallen = [norm(params["a"]) for params, _ in trace[held:]]
    if radius == np.inf:  # every update moves outwards
        assert fallen[-1] > fallen[0]
    else:
        assert fallen[0] > radius >= max(fallen[1:])


# --- where it goes --------------------------------------------------------------------------------


def test_each_member_of_a_stack_has_its_own_start_and_end():
    members = [layer(i, 10.0**i) for i in range(3)]
    stacked = {"a": jax.tree.map(lambda *x: jnp.stack(x), *members)}
    layers = {"*": l1inf.LayerDimensionNumbers(stack_axis=0)}
    c = l1inf.shrink(zeros=0.8, over=60)
    tx = BOTH["keep"](c, layers=layers)
    (params, state) = train(tx, stacked, 100)[-1]
    shrinking = state[-1].shrinking
    starts = np.ravel(shrinking.start["a"]["kernel"])
    np.testing.assert_allclose(starts, [norm(x) for x in members], rtol=1e-5)
    shares = (np.asarray(params["a"]["kernel"]) == 0).mean((1, 2))
    assert ((shares >= 0.8) & (shares < 1)).all()
    assert len(set(np.ravel(shrinking.held_from["a"]["kernel"]))) > 1
    report = l1inf.sparsity_report(params, c=c, layers=layers, state=state)
    assert report.total.columns_on_boundary >= 3
    largest = np.abs(np.asarray(params["a"]["kernel"], np.float64)).sum(1).max(1)
    assert report.total.largest_norm == pytest.approx(largest.max(), rel=0.01)


def test_a_traced_end_trains_like_a_number():
    ends = [0.5, 1.0, 3.0, np.inf]  # and its start, as an experiment's lanes trace it

    def last(to):
        tx = BOTH["constrain"](l1inf.shrink(to, over=10, start=20 * jnp.asarray(to)))
        return train(tx, {"a": layer()}, 15)[-1][0]["a"]["kernel"]

    together = jax.jit(jax.vmap(last))(jnp.asarray(ends))
    for to, kernel in zip(ends, together, strict=True):
        np.testing.assert_allclose(kernel, last(to), atol=1e-5)


AROUND = {
    "scan": lambda tx: tx,
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "partition": lambda tx: optax.partition(
        {"in": tx, "out": optax.sgd(0.1)}, {"a": "in", "readout": "out"}
    ),
    "masked": lambda tx: optax.masked(tx, {"a": True, "readout": False}),
    "named_chain": lambda tx: optax.named_chain(("ball", tx)),
}


@pytest.mark.parametrize("name", AROUND)
def test_it_falls_inside_other_transformations(name):
    tx = AROUND[name](BOTH["constrain"]({"a": l1inf.shrink(zeros=0.8, over=30)}))
    params = {"a": layer(), "readout": layer(1)}

    def body(carry, key):
        return step(tx, *carry, key), None

    keys = jax.random.split(jax.random.key(0), 80)
    (params, state), _ = jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), keys))()
    assert 0.8 <= zeros(params["a"]) < 1
    assert zeros(params["readout"]) == 0
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state, transform_non_params=lambda x: x)
    before, after = (
        (
            jax.tree.leaves(l1inf_state.shrinking)
            for l1inf_state in (optax.tree.get(x, "ball") for x in (state, mapped))
        )
        if name == "scan"
        else ([], [])
    )
    assert all((x == y).all() for x, y in zip(before, after, strict=True))


def test_hyperparameters_are_injected_around_it():
    def make(rate, to):
        return l1inf.constrain(optax.adam(rate), l1inf.shrink(to, over=10))

    tx = optax.inject_hyperparams(make)(rate=0.01, to=0.5)
    trace = train(tx, {"a": layer()}, 15)
    assert norm(trace[-1][0]["a"]) == pytest.approx(0.5, rel=1e-4)
    tx = optax.inject_hyperparams(KEEP)(l1inf.shrink(0.5, over=10))
    assert norm(train(tx, {"a": layer()}, 15)[-1][0]["a"]) == pytest.approx(0.5, rel=1e-4)


def test_a_state_that_is_taken_apart_goes_on_where_it_was():
    tx = BOTH["constrain"](l1inf.shrink(zeros=0.8, over=60))
    whole = train(tx, two_layers(), 60)
    params, state = train(tx, two_layers(), 20)[-1]
    leaves, structure = jax.tree.flatten(jax.device_get(state))
    resumed = train(tx, params, 40, jax.tree.unflatten(structure, leaves), first=20)
    jax.tree.map(np.testing.assert_array_equal, whole[-1], resumed[-1])


def test_modules_of_nnx_and_equinox_take_it():
    model = l1inf.nnx.AugmentedMLP(20, (30, 3), rngs=nnx.Rngs(0))
    c = {"hidden_*": l1inf.shrink(zeros=0.7, over=20)}
    optimizer = nnx.Optimizer(model, BOTH["constrain"](c), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (50, 20))

    @nnx.jit
    def update(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 3) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(30):
        update(model, optimizer)
    assert l1inf.sparsity_report(model, c=c, state=optimizer).total.sparsity > 65
    net = eqx.nn.MLP(20, 3, 30, 1, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    tx = BOTH["keep"]({"layers/0": l1inf.shrink(zeros=0.7, over=20)})
    state = tx.init(params)
    for _ in range(30):
        grads = jax.grad(lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(x) - 3) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        params = eqx.apply_updates(params, updates)
    assert (np.asarray(params.layers[0].weight) == 0).mean() >= 0.7


def test_shapes_alone_have_no_norm_to_start_from():
    shapes = jax.eval_shape(lambda: {"a": layer()})
    with pytest.raises(ValueError, match=r"shape of 'a' alone.*say start="):
        KEEP(l1inf.shrink(0.5, over=10)).init(shapes)
    assert (
        KEEP(l1inf.shrink(0.5, over=10, start=2.0)).init(shapes).shrinking.start["a"]["kernel"] == 2
    )
    tx = KEEP(l1inf.shrink(0.5, over=10))
    inside = jax.eval_shape(tx.init, {"a": layer()})
    assert jax.tree.map(jnp.shape, inside) == jax.tree.map(jnp.shape, tx.init({"a": layer()}))


# --- what looks at it -----------------------------------------------------------------------------


def test_reports_read_the_radius_where_the_last_update_left_it():
    c = l1inf.shrink(0.5, over=20)
    tx = BOTH["keep"](c)
    trace = train(tx, {"a": layer()}, 30)
    for params, state in trace[1:]:
        report = l1inf.sparsity_report(params, c=c, state=state)
        assert report.layers[0].columns_on_boundary >= 1
        assert not l1inf.diagnose(tx, params, c, state=state).findings
    # Without a state it is the layer's own norm, which one column has.
    assert l1inf.sparsity_report(trace[0][0], c=c).layers[0].columns_on_boundary == 1


def test_nothing_is_wrong_with_the_update_at_which_the_ball_opens():
    c = {"a": l1inf.shrink(0.5, over=20, release=8.0)}
    tx = BOTH["constrain"](c)
    for params, state in train(tx, {"a": layer()}, 25)[15:]:
        grads = jax.tree.map(lambda x: -x, params)
        assert not l1inf.diagnose(tx, params, c, state=state, grads=grads).findings


def test_zeros_that_are_held_or_may_be_any_time_are_not_missed():
    c = {"hidden_0": l1inf.shrink(zeros=0.5, over=2000), "hidden_1": l1inf.shrink(1.0, over=5)}
    tx = BOTH["constrain"](c)
    params, state = train(tx, two_layers(), 10)[-1]
    assert not l1inf.diagnose(tx, params, c, state=state, steps=100).findings
    c["readout"] = l1inf.shrink(1.0, over=500)
    tx = BOTH["constrain"](c)
    params, state = train(tx, two_layers(), 10)[-1]
    (finding,) = l1inf.diagnose(tx, params, c, state=state, steps=100).findings
    assert (finding.name, finding.layers) == ("zeros never held", ("readout",))


def test_transformations_that_count_different_updates_are_read_where_each_is():
    fall = l1inf.shrink(0.5, over=30)
    c = {"hidden_0": fall, "hidden_1": fall}
    one = BOTH["constrain"]({"hidden_0": fall})
    other = optax.MultiSteps(BOTH["constrain"]({"hidden_1": fall}), 4).gradient_transformation()
    labels = {"hidden_0": "one", "hidden_1": "other", "readout": "free"}
    tx = optax.partition({"one": one, "other": other, "free": optax.sgd(0.1)}, labels)
    params, state = train(tx, two_layers(), 24)[-1]
    assert not l1inf.diagnose(tx, params, c, state=state).findings
    report = l1inf.sparsity_report(params, c=c, state=state)
    assert all(part.columns_on_boundary > 0 for part in report.layers)


def test_what_is_traced_is_taken_from_the_c_that_diagnose_is_given():
    def make(rate, to):
        return l1inf.constrain(optax.adam(rate), {"a": l1inf.shrink(to, over=20, start=300.0)})

    tx, c = (
        optax.inject_hyperparams(make)(rate=0.01, to=5.0),
        {"a": l1inf.shrink(5.0, 20, start=300.0)},
    )
    trace = train(tx, {"a": layer()}, 150)
    assert not l1inf.diagnose(tx, trace[0][0], c).findings
    params, state = trace[-1]
    assert not l1inf.diagnose(tx, params, c, state=state, steps=150).findings


def test_projecting_to_a_radius_that_falls_is_projecting_to_its_start():
    params = {"a": layer()}
    at_own_norm = l1inf.project_params(params, l1inf.shrink(0.5, over=20))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), at_own_norm, params)
    projected = l1inf.project_params(params, l1inf.shrink(0.5, over=20, start=2.0))
    jax.tree.map(np.testing.assert_array_equal, projected, l1inf.project_params(params, 2.0))


# --- wrong use ------------------------------------------------------------------------------------

WRONG = {
    "neither": (lambda: l1inf.shrink(over=10), "to=None and zeros=None: give one of them"),
    "both": (lambda: l1inf.shrink(1.0, 10, zeros=0.5), "to=1.0 and zeros=0.5: give one"),
    "no over": (lambda: l1inf.shrink(1.0), "over=None is no whole number"),
    "over 0": (lambda: l1inf.shrink(1.0, 0), "over=0 is less than 1"),
    "over a float": (lambda: l1inf.shrink(1.0, 0.7 * 100), "over=70.0 is no whole number"),
    "over True": (lambda: l1inf.shrink(1.0, True), "over=True is no whole number"),
    "to 0": (lambda: l1inf.shrink(0.0, 10), "to=0.0 is not positive"),
    "start inf": (lambda: l1inf.shrink(1.0, 10, start=math.inf), "start=inf is not finite"),
    "to nan": (lambda: l1inf.shrink(math.nan, 10), "to=nan is not positive"),
    "to text": (lambda: l1inf.shrink("1", 10), "to='1' is a str, not a number"),
    "start below": (lambda: l1inf.shrink(1.0, 10, start=0.5), "start=0.5 is less than to=1.0"),
    "start -1": (lambda: l1inf.shrink(1.0, 10, start=-1), "start=-1 is not positive"),
    "zeros 1": (lambda: l1inf.shrink(zeros=1.0, over=10), "zeros=1.0 is no number between"),
    "zeros 90": (lambda: l1inf.shrink(zeros=90, over=10), "zeros=90 is no number between"),
    "zeros text": (lambda: l1inf.shrink(zeros="0.9", over=10), "zeros='0.9' is no number between"),
    "release 0": (lambda: l1inf.shrink(1.0, 10, release=0), "release=0 is not positive"),
    "release, not hold": (
        lambda: l1inf.shrink(1.0, 10, release=2.0, hold=False),
        "release=2.0 with hold=False",
    ),
    "hold -1": (lambda: KEEP(1.0, hold_zeros_from=-1), "hold_zeros_from=-1 is less than 0"),
    "hold True": (lambda: KEEP(1.0, hold_zeros_from=True), "hold_zeros_from=True is no whole"),
    "hold text": (lambda: KEEP(1.0, hold_zeros_from="100"), "hold_zeros_from='100' is no whole"),
    "state without": (
        lambda: KEEP(l1inf.shrink(1.0, 10)).update(
            {"a": layer()}, KEEP(1.0).init({"a": layer()}), {"a": layer()}
        ),
        "state has no start of a radius that shrinks for 'a/kernel'",
    ),
    "state with": (
        lambda: KEEP(1.0).update(
            {"a": layer()}, KEEP(l1inf.shrink(1.0, 10)).init({"a": layer()}), {"a": layer()}
        ),
        "state has a start of a radius that shrinks for 'a/kernel'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_remedy(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# --- relative radii -------------------------------------------------------------------------------


def test_radii_are_shares_of_norms():
    params = {**two_layers(), "block": {"hidden_0": layer(5)}}
    c = l1inf.relative_radii(params, {"hidden_0": 0.5, "readout": None, "*": 0.1})
    assert set(c) == {"hidden_0", "hidden_1", "block/hidden_0"}
    assert c["hidden_0"] == pytest.approx(0.5 * norm(params["hidden_0"]), rel=1e-6)
    assert c["block/hidden_0"] == pytest.approx(0.5 * norm(params["block"]["hidden_0"]), rel=1e-6)
    assert c["hidden_1"] == pytest.approx(0.1 * norm(params["hidden_1"]), rel=1e-6)
    projected = l1inf.project_params(params, c)
    assert norm(projected["block"]["hidden_0"]) == pytest.approx(c["block/hidden_0"], rel=1e-5)
    np.testing.assert_array_equal(projected["readout"]["kernel"], params["readout"]["kernel"])


def test_members_of_a_stack_have_radii_of_their_own():
    members = [layer(i, 10.0**i) for i in range(3)]
    stacked = {"a": jax.tree.map(lambda *x: jnp.stack(x), *members)}
    layers = {"*": l1inf.LayerDimensionNumbers(stack_axis=0)}
    c = l1inf.relative_radii(stacked, 0.5, layers=layers)
    projected = l1inf.project_params(stacked, c, layers=layers)
    for i, member in enumerate(members):
        part = jax.tree.map(lambda x, i=i: x[i], projected["a"])
        assert norm(part) == pytest.approx(0.5 * norm(member), rel=1e-5)


@pytest.mark.parametrize("share", [-1, 0, "half", optax.constant_schedule(1.0), {"no_*": 0.5}])
def test_shares_are_positive_numbers_of_layers_there_are(share):
    with pytest.raises(ValueError, match=r"^share=|^c has the pattern"):
        l1inf.relative_radii(two_layers(), share)


def test_a_path_that_looks_like_a_glob_means_itself():
    params = {"a[0]": layer(0), "a0": layer(1, 2.0)}
    c = l1inf.relative_radii(params, 0.5)
    projected = l1inf.project_params(params, c)
    for path, part in params.items():
        assert norm(projected[path]) == pytest.approx(0.5 * norm(part), rel=1e-5)
