"""What sharding must not change. `conftest.py` runs these tests in processes with 8 devices."""

from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import l1inf_optax as l1inf
from tests.support import oracle
from tests.support.collectives import collectives

pytestmark = pytest.mark.devices(8)

N, UNITS = 64, 32
MODES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
# How a kernel and its bias are sharded, on a mesh of 2 x 4 devices.
LAYOUTS = {
    "columns": (P(None, "model"), P("model")),
    "rows": (P("model", None), P()),
    "rows, all devices": (P(("data", "model"), None), P()),
    "both": (P("data", "model"), P("model")),
    "replicated": (P(), P()),
}
OPTIMIZERS = {
    "momentum": lambda: optax.chain(
        optax.sgd(0.1, momentum=0.9), l1inf.keep_params_in_l1inf_ball(1.0)
    ),
    "adam": lambda: l1inf.constrain(optax.adam(1e-2), 1.0),
    "shrink": lambda: l1inf.constrain(optax.adam(1e-2), l1inf.shrink(zeros=0.5, over=6)),
    "prune": lambda: l1inf.constrain(optax.adam(1e-2), l1inf.prune(0.5, over=6, c=3.0)),
}


def mesh(mode):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(MODES[mode],) * 2)


def tree(seed):
    """Two layers of one shape, which share a search."""
    rng = np.random.default_rng(seed)

    def layer():
        kernel, bias = rng.normal(size=(N, UNITS)), rng.normal(size=UNITS)
        return {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}

    return {"one": layer(), "two": layer()}


def placed(params, mesh, layout):
    kernel, bias = (NamedSharding(mesh, spec) for spec in LAYOUTS[layout])
    return jax.device_put(params, {name: {"kernel": kernel, "bias": bias} for name in params})


@cache
def on_one_device(optimizer):
    """An optimizer, parameters and two gradients, and the updates that it makes of them."""
    tx, (params, *grads) = OPTIMIZERS[optimizer](), map(tree, range(3))
    state, update = tx.init(params), jax.jit(tx.update)
    expected = []
    for g in grads:
        updates, state = update(g, state, params)
        expected.append(updates)
    return tx, (params, *grads), expected


@pytest.mark.parametrize(
    ("optimizer", "layout", "mode"),
    [
        pytest.param("momentum", "columns", "automatic", marks=pytest.mark.quick),
        ("momentum", "columns", "explicit"),
        ("momentum", "rows", "automatic"),
        ("momentum", "both", "explicit"),
        ("adam", "columns", "automatic"),
        ("adam", "rows", "explicit"),
        ("adam", "rows, all devices", "automatic"),
        ("adam", "both", "automatic"),
        ("adam", "replicated", "automatic"),
        ("adam", "replicated", "explicit"),
    ],
)
def test_an_update_is_that_of_one_device_and_stays_where_it_is(optimizer, layout, mode):
    tx, (params, *grads), expected = on_one_device(optimizer)
    where = mesh(mode)
    here = partial(placed, mesh=where, layout=layout)
    with jax.set_mesh(where):
        params = here(params)
        state = tx.init(params)
        thresholds = jax.tree.leaves(state)[-2:]
        columns = NamedSharding(where, P(LAYOUTS[layout][0][1] if layout != "replicated" else None))
        assert all(x.sharding.is_equivalent_to(columns, 1) for x in thresholds)
        update = jax.jit(tx.update).lower(here(grads[0]), state, params).compile()
        for g, of_one_device in zip(grads, expected, strict=True):
            updates, state = update(here(g), state, params)
            for x, y, p in zip(
                *map(jax.tree.leaves, (updates, of_one_device, params)), strict=True
            ):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * np.abs(y).max())
                assert x.sharding.is_equivalent_to(p.sharding, p.ndim)
            thresholds = jax.tree.leaves(state)[-2:]
            assert all(x.sharding.is_equivalent_to(columns, 1) for x in thresholds)

    sent = collectives(update)
    if not layout.startswith(("rows", "both")):
        assert sent == []
    own = UNITS // 4 if layout == "both" else UNITS
    for name, sizes in sent:
        assert name == "all-reduce"
        assert set(sizes) <= {own}  # a number a column
        assert len(sizes) <= 3


NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, 1 + 2**-23, 1e-38, 1e-45, 1e30, 3e38, np.inf, np.nan, 0.1]),
    st.floats(0, 2, width=32),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=60)
@given(
    values=st.lists(NUMBERS, min_size=1, max_size=64),
    seed=st.integers(0, 2**31),
    c=st.sampled_from([0.07, 1.0, 3.0, 1e-9, 1e30]),
)
def test_split_columns_are_projected_exactly(dtype, values, seed, c):
    rng = np.random.default_rng(seed)
    v = rng.choice(np.float32(values), (N, 8)) * rng.choice([-1, 1], (N, 8)).astype(np.float32)
    v[:, :4] = rng.normal(size=(N, 4))
    v = jnp.asarray(v, dtype)
    c = float(np.float32(c))
    got = np.asarray(projected()(v, jnp.float32(c)), np.float64)
    for column, w in zip(np.asarray(v, np.float64).T, got.T, strict=True):
        if np.isnan(column).any():
            assert np.isnan(w).all()
            continue
        assert oracle.norm64(w) <= c
        if np.isinf(column).any():
            assert (w[np.isfinite(column)] == 0).all()
            continue
        exact = np.array([float(x) for x in oracle.project(column, c)])
        short = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(w, exact, rtol=4 * short, atol=4 * short * c + 1e-37)


@cache
def projected():
    rows = NamedSharding(jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)), P("rows"))
    return jax.jit(l1inf.projection_l1inf_ball, in_shardings=(rows, None), out_shardings=rows)


@pytest.mark.parametrize("mode", MODES)
def test_norms_of_sharded_columns_are_those_of_one_device(mode):
    kernel = tree(0)["one"]["kernel"]
    expected = np.abs(np.asarray(kernel, np.float64)).sum(0).max()
    where = mesh(mode)
    with jax.set_mesh(where):
        for layout in ("columns", "rows", "both"):
            x = jax.device_put(kernel, NamedSharding(where, LAYOUTS[layout][0]))
            norm, slope = jax.value_and_grad(l1inf.l1inf_norm)(x)
            assert float(norm) == pytest.approx(expected, rel=1e-7)
            assert float(jnp.abs(slope).sum()) == N  # of one column


def test_derivatives_of_split_columns_are_those_of_one_device():
    v, dv = (jnp.asarray(np.random.default_rng(i).normal(size=(N, 4)), jnp.float32) for i in (0, 1))

    def slope(v):
        return jax.grad(lambda v: jnp.vdot(l1inf.projection_l1inf_ball(v, 2.0), dv))(v)

    rows = NamedSharding(jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)), P("rows"))
    slope = jax.jit(slope)
    np.testing.assert_allclose(slope(jax.device_put(v, rows)), slope(v), rtol=1e-5, atol=1e-6)


def test_a_batch_of_matrices_is_projected_like_each():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(8, N, 4)), jnp.float32)
    expected = jnp.stack([l1inf.projection_l1inf_ball(x, 2.0) for x in v])
    project = jax.jit(jax.vmap(lambda v: l1inf.projection_l1inf_ball(v, 2.0)))
    batch = NamedSharding(jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,)), P("batch"))
    np.testing.assert_allclose(project(jax.device_put(v, batch)), expected, rtol=1e-6, atol=1e-7)


def test_a_loop_of_updates_keeps_its_types_under_explicit_sharding():
    tx = OPTIMIZERS["adam"]()
    where = mesh("explicit")
    with jax.set_mesh(where):
        params, grads = (placed(tree(i), where, "both") for i in (0, 1))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=3))(
            (params, tx.init(params))
        )
    for layer in params.values():
        columns = np.vstack([layer["bias"], layer["kernel"]])
        assert all(oracle.norm64(column) <= 1 for column in columns.T)


def trained(optimizer, place):
    """Parameters after eight updates, and what the state then says of radii that fall."""
    tx, start = OPTIMIZERS[optimizer](), place(tree(0))
    params, state, update = start, tx.init(start), jax.jit(tx.update)
    for i in range(1, 9):
        updates, state = update(place(tree(i)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state.ball.shrinking


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["columns", "rows", "both"])
def test_zeros_are_counted_over_all_devices(layout, mode):
    where = mesh(mode)
    expected, _ = trained("prune", lambda x: x)
    zeros = sum(int((x["kernel"] == 0).sum()) for x in expected.values())
    assert zeros >= N * UNITS
    with jax.set_mesh(where):
        params, _ = trained("prune", partial(placed, mesh=where, layout=layout))
    chex.assert_trees_all_close(params, expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["columns", "rows", "both"])
def test_a_radius_that_falls_does_so_as_on_one_device(layout, mode):
    where = mesh(mode)
    params, expected = trained("shrink", lambda x: x)
    assert max(jax.tree.leaves(expected.held_from)) < 8
    with jax.set_mesh(where):
        placed_params, shrinking = trained("shrink", partial(placed, mesh=where, layout=layout))
    chex.assert_trees_all_close(placed_params, params, atol=1e-5)
    chex.assert_trees_all_close(shrinking, expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_types_of_state_and_updates_stay_on_an_explicit_mesh(optimizer):
    """As Optax asks of its own: two matrices in a stack, their rows, then their units sharded."""
    tx = OPTIMIZERS[optimizer]()
    where = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))

    def types(tree):
        return jax.tree.map(lambda x: str(jax.typeof(x)), tree)  # float16[2,8@x,16]

    def traced(function, *args):
        seen = []
        jax.eval_shape(lambda *args: seen.append(types(function(*args))), *args)
        return seen[0]

    for kernel, bias in ((P(None, "x", None), P()), (P(None, None, "x"), P(None, "x"))):
        with jax.set_mesh(where):
            params = {
                "kernel": jnp.ones(
                    (2, 8, 16), jnp.float16, out_sharding=NamedSharding(where, kernel)
                ),
                "bias": jnp.ones((2, 16), jnp.float16, out_sharding=NamedSharding(where, bias)),
            }
            state = tx.init(params)
            expected = types((params, state))
            assert traced(tx.init, params) == expected[1]
            assert traced(tx.update, params, state, params) == expected


class Block(nn.Module):
    """A transformer of one layer that tells the next token."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32)(tokens) + nn.Embed(12, 32)(jnp.arange(12))
        attended = nn.MultiHeadDotProductAttention(num_heads=8, name="attention")
        x = x + attended(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        hidden = nn.Dense(64, name="up")(nn.LayerNorm()(x))
        return nn.Dense(16, name="readout")(x + nn.Dense(32, name="down")(nn.relu(hidden)))


def test_adafactor_starts_on_an_explicit_mesh():
    where = mesh("explicit")
    with jax.set_mesh(where):
        params = placed(tree(0), where, "both")
        state = l1inf.constrain(optax.adafactor(1e-2), 1.0).init(params)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(
        optax.adafactor(1e-2).init(tree(0))
    )


def test_a_transformer_trains_under_fsdp():
    tokens = (np.arange(12) + np.arange(16)[:, None] * 5) % 16
    model, mesh = Block(), jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def shards(x):
        longest = int(np.argmax(x.shape)) if x.ndim else 0
        split = x.ndim and x.shape[longest] % 8 == 0
        return NamedSharding(mesh, P(*(None,) * longest, "fsdp") if split else P())

    ball = {"attention/*": 4.0, "up": 4.0, "down": 4.0, "readout": None}
    tx = l1inf.constrain(optax.adam(1e-2), ball)
    init = jax.jit(lambda key: l1inf.project_params(model.init(key, tokens), ball))
    params = init(jax.random.key(0))
    params = jax.device_put(params, jax.tree.map(shards, params))
    state, tokens = tx.init(params), jax.device_put(tokens, NamedSharding(mesh, P("fsdp")))
    params, state = jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, NamedSharding(mesh, P())), (params, state)
    )
    places = jax.tree.map(lambda x: x.sharding, (params, state))

    @partial(jax.jit, out_shardings=(*places, None), donate_argnums=(0, 1))
    def step(params, state, tokens):
        def loss(params):
            logits = model.apply(params, tokens)[:, :-1]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return each.mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(50):
        params, state, value = step(params, state, tokens)
        losses.append(float(value))
    assert losses[0] > 2
    assert losses[-1] < 0.3
    inner = params["params"]
    for layer in (inner["up"], inner["down"]):
        columns = np.vstack([layer["bias"], layer["kernel"]])
        assert all(oracle.norm64(column) <= 4 for column in columns.T)
    out = inner["attention"]["out"]
    columns = np.vstack([out["bias"], np.asarray(out["kernel"]).reshape(32, 32)])
    assert all(oracle.norm64(column) <= 4 for column in columns.T)
