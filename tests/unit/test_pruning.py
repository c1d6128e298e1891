"""Zeros by a count: as many as asked, the nearest in the optimizer's metric, and they stay."""

import itertools
import math

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import l1inf_optax as l1inf

OVER = 20


def tree(seed=0, dtype=jnp.float32):
    """Two hidden layers with biases, and a readout."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    shapes = {"hidden_0": (30, 8), "hidden_1": (8, 6), "readout": (6, 2)}
    return {
        name: {
            "kernel": jax.random.normal(next(keys), shape, dtype),
            "bias": jax.random.normal(next(keys), shape[1:], dtype),
        }
        for name, shape in shapes.items()
    }


def gradients(params, key):
    """Of very different sizes in different entries."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    sizes = [
        jnp.exp(2 * jax.random.normal(jax.random.key(i), x.shape)) for i, x in enumerate(leaves)
    ]
    grads = [
        (s * jax.random.normal(k, x.shape)).astype(x.dtype)
        for k, s, x in zip(keys, sizes, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, grads)


def train(tx, params, steps, seed=1):
    """The parameters after each step."""
    state, seen = tx.init(params), []

    @jax.jit
    def step(params, state, key):
        updates, state = tx.update(gradients(params, key), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jax.random.fold_in(jax.random.key(seed), i))
        seen.append(params)
    return seen


def zeros(params, names=("hidden_0", "hidden_1")):
    return sum(int((params[name]["kernel"] == 0).sum()) for name in names)


def hidden(share, **options):
    return {"hidden_*": l1inf.prune(share, over=OVER, **options)}


SIZE = 30 * 8 + 8 * 6


@pytest.mark.parametrize("share", [0.1, 0.9, 0.99])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda c: l1inf.constrain(optax.adam(1e-2), c),
        lambda c: optax.chain(optax.sgd(1e-2), l1inf.keep_params_in_l1inf_ball(c)),
    ],
    ids=["constrain", "chained"],
)
def test_there_are_as_many_zeros_as_asked_and_they_stay(share, wrap):
    seen = train(wrap(hidden(share)), tree(), OVER + 10)
    counts = [zeros(params) for params in seen]
    assert counts[OVER - 1] == math.ceil(share * SIZE)
    assert counts == sorted(counts)
    assert counts[-1] == counts[OVER - 1]
    for before, after in itertools.pairwise(seen):
        for name in ("hidden_0", "hidden_1"):
            gone = before[name]["kernel"] == 0
            assert (after[name]["kernel"][gone] == 0).all()


def test_they_come_as_a_cubic():
    counts = np.array(
        [zeros(x) for x in train(l1inf.constrain(optax.adam(1e-2), hidden(0.9)), tree(), OVER)]
    )
    done = np.arange(1, OVER + 1) / OVER
    wanted = math.ceil(0.9 * SIZE) * (1 - (1 - done) ** 3)
    assert (np.abs(counts - wanted) <= 1 + 0.01 * 0.9 * SIZE).all()


def test_nothing_else_changes():
    """Before it starts, in biases, in the readout: the steps of the optimizer alone."""
    adam = optax.adam(1e-2)
    pruned = train(l1inf.constrain(adam, hidden(0.5, start=3)), tree(), 6)
    alone = train(adam, tree(), 6)
    chex.assert_trees_all_equal(pruned[2], alone[2])
    for name in ("hidden_0", "hidden_1"):
        chex.assert_trees_all_equal(pruned[5][name]["bias"], alone[5][name]["bias"])
        kept = pruned[5][name]["kernel"] != 0
        chex.assert_trees_all_equal(pruned[5][name]["kernel"][kept], alone[5][name]["kernel"][kept])
    chex.assert_trees_all_equal(pruned[5]["readout"], alone[5]["readout"])


def test_what_is_left_is_the_nearest_point_in_the_optimizers_metric():
    """Against Adam's own formula, in NumPy: of all with so many zeros it moves d w^2 the least."""
    c = {"hidden_*": l1inf.prune(0.7, over=1, start=4)}
    adam = optax.adam(1e-2, eps=1e-4)
    pruned = train(l1inf.constrain(adam, c), tree(), 5)[-1]
    params, state = tree(), adam.init(tree())
    for i in range(5):
        grads = gradients(params, jax.random.fold_in(jax.random.key(1), i))
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    names = ("hidden_0", "hidden_1")
    distance = np.concatenate(
        [
            (
                np.float64(params[name]["kernel"]) ** 2
                * (np.sqrt(np.float64(state[0].nu[name]["kernel"]) / (1 - 0.999**5)) + 1e-4)
            ).ravel()
            for name in names
        ]
    )
    left = np.concatenate([np.asarray(pruned[name]["kernel"] != 0).ravel() for name in names])
    assert left.sum() == SIZE - math.ceil(0.7 * SIZE)
    assert distance[left].min() > distance[~left].max()


def test_chained_after_sgd_it_prunes_by_magnitude():
    c = {"hidden_*": l1inf.prune(0.7, over=1)}
    tx = optax.chain(optax.sgd(0.0), l1inf.keep_params_in_l1inf_ball(c))
    pruned = train(tx, tree(), 1)[0]
    both = [
        np.concatenate([np.ravel(x[f"hidden_{i}"]["kernel"]) for i in (0, 1)])
        for x in (tree(), pruned)
    ]
    left = both[1] != 0
    assert np.abs(both[0][left]).min() > np.abs(both[0][~left]).max()


def test_layers_with_a_prune_of_their_own_are_ranked_by_themselves():
    c = {f"hidden_{i}": l1inf.prune(0.75, over=OVER) for i in (0, 1)}
    params = train(l1inf.constrain(optax.adam(1e-2), c), tree(), OVER)[-1]
    assert zeros(params, ["hidden_0"]) == 180
    assert zeros(params, ["hidden_1"]) == 36


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_in_a_ball_the_norms_keep_to_it(dtype):
    c = hidden(0.8, c=1.5, start=2)
    tx = l1inf.constrain(optax.adam(1e-2), c)
    params = train(tx, l1inf.project_params(tree(dtype=dtype), {"hidden_*": 1.5}), OVER + 4)[-1]
    assert zeros(params) >= math.ceil(0.8 * SIZE)
    for name in ("hidden_0", "hidden_1"):
        norms = sum(
            np.abs(np.float64(x)).reshape(-1, x.shape[-1]).sum(0) for x in params[name].values()
        )
        assert (norms <= 1.5).all()


def test_updates_less_precise_than_parameters_reach_zero():
    c = {"hidden_*": l1inf.prune(0.5, over=1)}
    tx = optax.chain(optax.sgd(1e-2), l1inf.keep_params_in_l1inf_ball(c))
    params = tree()
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(params, jax.random.key(3)))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert zeros(optax.apply_updates(params, updates)) == SIZE // 2


def test_a_mask_of_any_origin_is_kept():
    params = tree()
    params["hidden_0"]["kernel"] = params["hidden_0"]["kernel"].at[::2].set(0)
    after = train(l1inf.constrain(optax.adam(1e-2), hidden(0.6)), params, OVER + 5)[-1]
    assert (after["hidden_0"]["kernel"][::2] == 0).all()
    assert zeros(after) == math.ceil(0.6 * SIZE)


def test_a_layer_that_is_all_zero_can_start():
    params = tree()
    params["hidden_1"]["kernel"] = jnp.zeros_like(params["hidden_1"]["kernel"])
    after = train(l1inf.constrain(optax.adam(1e-2), hidden(0.3)), params, OVER)[-1]
    assert (after["hidden_1"]["kernel"] != 0).any()
    assert zeros(after) == math.ceil(0.3 * SIZE)


def test_zeros_wait_for_steps_that_are_taken():
    """Inside `MultiSteps` nothing moves most of the time, and there is no metric then."""
    tx = l1inf.constrain(optax.MultiSteps(optax.adam(1e-2), 3), hidden(0.8))
    seen = train(tx, tree(), OVER + 3)
    counts = [zeros(params) for params in seen]
    assert counts[0] == counts[1] == 0 < counts[2]
    assert counts[-1] == math.ceil(0.8 * SIZE)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_ties_are_broken_and_no_layer_is_emptied(share):
    params = {
        "one": {"kernel": jnp.ones((20, 9)).at[::2].set(-1)},
        "two": {"kernel": jnp.full((4, 5), 1e-3)},
    }
    tx = l1inf.constrain(optax.sgd(0.0), l1inf.prune(share, over=1))
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    left = {name: int((x["kernel"] != 0).sum()) for name, x in after.items()}
    assert left["two"] == 1
    assert left["one"] == 200 - math.ceil(share * 200) - 1


def test_a_layer_that_pruning_has_emptied_would_not_come_back():
    params = {
        "small": {"kernel": 1e-4 * jax.random.normal(jax.random.key(0), (2, 2))},
        "large": {"kernel": jax.random.normal(jax.random.key(1), (50, 40))},
    }
    tx = l1inf.constrain(optax.sgd(1.0), l1inf.prune(0.9, over=1000))
    state = tx.init(params)
    for i in range(8):
        grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 0.5 * (i > 5)), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert int((params["small"]["kernel"] == 0).sum()) == 3


def test_in_bfloat16_ties_do_not_keep_zeros_back():
    kernel = 0.1 * jax.random.normal(jax.random.key(0), (200, 500), jnp.bfloat16)
    tx = l1inf.constrain(optax.sgd(0.0), l1inf.prune(0.9, over=1))
    params = {"kernel": kernel}
    updates, _ = tx.update(params, tx.init(params), params)
    assert int((optax.apply_updates(params, updates)["kernel"] == 0).sum()) == 90_000


@pytest.mark.parametrize(("share", "zeros"), [(0.55, 55), (0.07, 7), (0.951, 96), (0.999, 99)])
def test_rounding_makes_no_zero_more(share, zeros):
    params = {"kernel": jax.random.normal(jax.random.key(0), (10, 10))}
    tx = l1inf.constrain(optax.sgd(0.0), l1inf.prune(share, over=1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert int((optax.apply_updates(params, updates)["kernel"] == 0).sum()) == zeros


def test_a_large_network_that_starts_late_has_its_rounds():
    wanted, is_due = l1inf.prune(0.95, over=10).due(jnp.int32(0), jnp.int32(0), 100_000_000)
    assert is_due
    np.testing.assert_allclose(wanted, 0.95e8 * (1 - 0.9**3), rtol=1e-6)


def test_a_nan_is_not_hidden():
    params = {"hidden": {"kernel": jnp.array([[1.0, 1.5], [2.0, jnp.nan], [0.5, 0.25]])}}
    tx = l1inf.constrain(optax.sgd(0.0), l1inf.prune(0.5, over=1))
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)["hidden"]["kernel"]
    assert np.isnan(after[1, 1])
    assert (np.asarray(after) == 0).tolist() == [[True, False], [False, False], [True, True]]


def test_augmented_and_stacked_layers():
    model = l1inf.nnx.AugmentedMLP(9, (8, 4, 2), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = l1inf.constrain(optax.adam(1e-2), {"hidden_*": l1inf.prune(0.5, over=3)})
    after = train(tx, params, 3)[-1]
    weights = [after[f"hidden_{i}"]["augmented_kernel"][...][1:] for i in (0, 1)]
    assert sum(int((w == 0).sum()) for w in weights) == (9 * 8 + 8 * 4) // 2

    @eqx.filter_vmap
    def stack(key):
        return eqx.nn.Linear(6, 5, key=key)

    params = eqx.filter(stack(jax.random.split(jax.random.key(0), 3)), eqx.is_array)
    layers = {"*": l1inf.LayerDimensionNumbers(stack_axis=0)}
    tx = l1inf.constrain(optax.adam(1e-2), l1inf.prune(0.5, over=3), layers=layers)
    assert int((train(tx, params, 3)[-1].weight == 0).sum()) == 45


def test_scan_vmap_and_inject_hyperparams():
    params = tree()
    tx = l1inf.constrain(optax.adam(1e-2), hidden(0.8))

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(gradients(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(OVER))
    (scanned, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys))(params)
    chex.assert_trees_all_close(scanned, train(tx, params, OVER)[-1], rtol=1e-5)

    def of_share(share):
        tx = l1inf.constrain(optax.adam(1e-2), {"hidden_*": l1inf.prune(share, over=2)})
        state, p = tx.init(params), params
        for _ in range(2):
            updates, state = tx.update(gradients(p, jax.random.key(0)), state, p)
            p = optax.apply_updates(p, updates)
        return jnp.sum(p["hidden_0"]["kernel"] == 0) + jnp.sum(p["hidden_1"]["kernel"] == 0)

    shares = jnp.array([0.25, 0.5, 0.75])
    chex.assert_trees_all_equal(jax.jit(jax.vmap(of_share))(shares), jnp.array([72, 144, 216]))

    @optax.inject_hyperparams
    def make(rate, share):
        return l1inf.constrain(optax.adam(rate), {"hidden_*": l1inf.prune(share, over=OVER)})

    assert zeros(train(make(1e-2, 0.5), params, OVER)[-1]) == SIZE // 2


@pytest.mark.usefixtures("x64")
def test_float64():
    params = tree(dtype=jnp.float64)
    after = train(l1inf.constrain(optax.adam(1e-2), hidden(0.8)), params, OVER)[-1]
    assert after["hidden_0"]["kernel"].dtype == jnp.float64
    assert zeros(after) == math.ceil(0.8 * SIZE)


def test_more_weights_than_can_be_counted_are_an_error():
    params = {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)}
    tx = l1inf.keep_params_in_l1inf_ball(l1inf.prune(0.5, over=3))
    with pytest.raises(ValueError, match="2,147,483,648 weights"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def test_partition_and_masked_count_their_own_layers():
    tx = optax.partition(
        {"own": l1inf.constrain(optax.adam(1e-2), hidden(0.5)), "other": optax.sgd(1e-2)},
        {"hidden_0": "own", "hidden_1": "own", "readout": "other"},
    )
    assert zeros(train(tx, tree(), OVER)[-1]) == SIZE // 2


def test_diagnose_knows_when_zeros_are_held():
    params, c = tree(), hidden(0.5)
    tx = l1inf.constrain(optax.adam(1e-2), c)
    early = l1inf.diagnose(tx, params, c, steps=OVER // 2)
    assert "zeros never held" in [finding.name for finding in early.findings]
    late = l1inf.diagnose(tx, params, c, steps=2 * OVER)
    assert "zeros never held" not in [finding.name for finding in late.findings]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"zeros": 0.0, "over": 10}, "zeros"),
        ({"zeros": 1.0, "over": 10}, "zeros"),
        ({"zeros": 0.5, "over": 0}, "over"),
        ({"zeros": 0.5, "over": 2.5}, "over"),
        ({"zeros": 0.5, "over": 10, "start": -1}, "start"),
        ({"zeros": 0.5, "over": 10, "c": 0.0}, "c"),
        ({"zeros": 0.5, "over": 10, "c": l1inf.shrink(1.0, over=3)}, "c"),
    ],
)
def test_wrong_use_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        l1inf.prune(**arguments)


def test_shares_of_norms_are_numbers():
    with pytest.raises(ValueError, match="share"):
        l1inf.relative_radii(tree(), l1inf.prune(0.5, over=3))
