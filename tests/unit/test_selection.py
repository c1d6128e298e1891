"""Scores against networks trained one at a time by a plain loop; the rules against their words."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold, StratifiedKFold

import l1inf_optax as l1inf
from l1inf_optax.selection import CrossValidation, cross_validate, search_layer_c
from tests.support import devices
from tests.support.folds import (
    RADII,
    RATE,
    D,
    N,
    X,
    Y,
    apply,
    light,
    loss,
    random_init,
    validate_light,
    validated,
)

EPOCHS = 60


def init(key, c):
    return {"kernel": jnp.zeros((D, 1)), "bias": jnp.zeros(1)}


def masked_loss(outputs, y):
    return jnp.where(jnp.isnan(y), 0, loss(outputs, jnp.nan_to_num(y)))


def with_nan(values):
    values = values.copy()
    values[7] = np.nan
    return values


def optimizer(c):
    return optax.chain(optax.sgd(RATE), l1inf.keep_params_in_l1inf_ball(c))


OPTIONS = {"epochs": EPOCHS, "batch_size": N}
MODEL = (init, apply, loss, optimizer)
validate = partial(cross_validate, *MODEL, X, Y, **OPTIONS)


def into_l1_ball(v, c):
    """By bisection, in float64."""
    if np.abs(v).sum() <= c:
        return v
    low, high = 0.0, np.abs(v).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(v) - middle, 0).sum() > c else (low, middle)
    return np.sign(v) * np.maximum(np.abs(v) - high, 0)


def trained_alone(c, rows):
    x = np.column_stack([np.ones(len(rows)), X[rows].astype(np.float64)])
    v = np.zeros(1 + D)
    for _ in range(EPOCHS):
        v = into_l1_ball(v - RATE * 2 * x.T @ (x @ v - Y[rows]) / len(rows), c)
    return v


def plain_loop(radii, folds):
    return np.array(
        [
            [
                -np.mean((X[unseen] @ v[1:] + v[0] - Y[unseen]) ** 2)
                for rows, unseen in folds
                for v in [trained_alone(c, rows)]
            ]
            for c in radii
        ]
    )


def test_scores_are_those_of_a_plain_loop():
    splitter = KFold(4, shuffle=True, random_state=5)
    result = validate(RADII, cv=splitter)
    assert result.c == tuple(RADII)
    assert result.scores.dtype == np.float64
    expected = plain_loop(RADII, list(splitter.split(X)))
    np.testing.assert_allclose(result.scores, expected, rtol=2e-4)


def test_a_radius_that_falls_ends_at_each_candidate():
    init, apply, loss, _ = MODEL

    def optimizer(c):
        return l1inf.constrain(optax.sgd(RATE), l1inf.shrink(c, over=EPOCHS // 4, start=4 * c))

    result = cross_validate(init, apply, loss, optimizer, X, Y, RADII, **{**OPTIONS, "cv": 3})
    fixed = validate(RADII, cv=3)
    np.testing.assert_allclose(result.mean, fixed.mean, rtol=0.1)


def test_it_works_with_64_bits(x64):
    splitter = KFold(4, shuffle=True, random_state=5)
    result = cross_validate(*MODEL, X, Y, RADII, cv=splitter, **OPTIONS)
    expected = plain_loop(RADII, list(splitter.split(X)))
    np.testing.assert_allclose(result.scores, expected, rtol=2e-4)


def test_the_right_c_is_found():
    result = validate([0.1, 0.5, 2.0, 8.0, 50.0])
    assert result.scores.shape == (5, 5)
    assert result.best_c == result.one_standard_error_c == 2.0
    within = validate([0.1, 0.5, 2.0, 8.0, 50.0], score=lambda outputs, y: abs(outputs - y) < 1)
    assert ((within.scores >= 0) & (within.scores <= 1)).all()
    assert within.best_c == 2.0


def test_candidates_of_one_fold_share_start_and_minibatches():
    frozen = (random_init, apply, loss, lambda c: optax.sgd(0.0 * c))
    same = cross_validate(*frozen, X, Y, [1.0, 2.0], epochs=1, batch_size=7).scores
    np.testing.assert_array_equal(same[0], same[1])
    moving = (random_init, apply, loss, lambda c: optax.sgd(1e-3 + 0.0 * c))
    same = cross_validate(*moving, X, Y, [1.0, 2.0], epochs=3, batch_size=7).scores
    np.testing.assert_array_equal(same[0], same[1])
    assert len(np.unique(same[0])) == 5


@pytest.mark.parametrize("n", [11, 13])
def test_folds_of_different_sizes_are_scored_on_all_their_examples(n):
    frozen = (init, apply, loss, lambda c: optax.sgd(0.0))
    splitter = KFold(4, shuffle=True, random_state=0)
    got = cross_validate(*frozen, X[:n], Y[:n], [1.0], epochs=1, batch_size=3, cv=splitter).scores
    expected = [-np.mean(Y[unseen] ** 2) for _, unseen in splitter.split(X[:n])]
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)


def test_very_different_folds_train_on_their_own_rows_alone():
    y = np.repeat([1.0, 5.0], [6, 54]).astype(np.float32)
    pairs = [(np.arange(6), np.arange(6, 60)), (np.arange(6, 60), np.arange(6))]
    constant = (
        lambda key, c: jnp.zeros(()),
        lambda params, x: jnp.full(len(x), params),
        loss,
        lambda c: optax.sgd(0.1),
    )
    scores = cross_validate(*constant, X, y, [1.0], epochs=200, batch_size=4, cv=pairs).scores
    # Each learns its own constant exactly, which misses the other's by 4.
    np.testing.assert_allclose(scores, [[-16.0, -16.0]], rtol=1e-5)


def test_classes_are_stratified_and_numbers_are_not():
    classes = (np.arange(N) % 6 == 0).astype(int)
    frozen = (init, apply, loss, lambda c: optax.sgd(0.0))
    options = {"epochs": 1, "batch_size": 9, "seed": 7, "score": lambda outputs, y: 1.0 * y}
    got = cross_validate(*frozen, X, classes, [1.0], **options).scores
    np.testing.assert_allclose(got, np.full((1, 5), 1 / 6), rtol=1e-6)
    strata = StratifiedKFold(5, shuffle=True, random_state=7)
    again = cross_validate(*frozen, X, classes, [1.0], cv=strata, **options).scores
    np.testing.assert_array_equal(got, again)
    plain = KFold(5, shuffle=True, random_state=7)
    numbers = cross_validate(*frozen, X, Y, [1.0], **options).scores[0]
    expected = [Y[unseen].mean() for _, unseen in plain.split(X)]
    np.testing.assert_allclose(numbers, expected, rtol=1e-4, atol=1e-6)


def test_the_seed_decides_everything():
    first, again, other = (
        validate_light(epochs=2, batch_size=10, seed=seed).scores for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_many_devices_change_nothing(tmp_path):
    devices.run("tests.support.folds", 3, tmp_path / "scores.npy")
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), validated(), rtol=1e-6)


def test_lanes_computed_together_agree_to_rounding():
    alone, together = (
        validate_light(epochs=3, batch_size=10, lanes_at_once=n).scores for n in (1, 6)
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_whoever_watches_hears_of_every_lane():
    heard = []
    validate_light(epochs=3, batch_size=16, watch=heard.append)
    assert heard[-1].step == 3 * (48 // 16)
    assert heard[-1].loss.shape == (4 * 5,)


@pytest.mark.parametrize("library", ["linen", "equinox", "haiku"])
def test_networks_of_any_library(library):
    if library == "linen":
        model = l1inf.linen.AugmentedMLP((4, 1))
        init, apply = (lambda key, c: model.init(key, X)), model.apply
    elif library == "equinox":
        eqx = pytest.importorskip("equinox")
        static = eqx.partition(eqx.nn.MLP(D, 1, 4, 1, key=jax.random.key(0)), eqx.is_array)[1]

        def init(key, c):
            return eqx.filter(eqx.nn.MLP(D, 1, 4, 1, key=key), eqx.is_array)

        def apply(params, x):
            return jax.vmap(eqx.combine(params, static))(x)
    else:
        hk = pytest.importorskip("haiku")
        net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP((4, 1))(x)))
        init, apply = (lambda key, c: net.init(key, X)), net.apply
    result = cross_validate(
        init, lambda params, x: apply(params, x)[:, 0], loss, light, X, Y, [1.0],
        epochs=1, batch_size=20, cv=2,
    )  # fmt: skip
    assert np.isfinite(result.scores).all()


def test_what_diverges_is_never_chosen():
    def reckless(c):
        return optax.sgd(jnp.where(c > 1, 1e6, 1e-3))

    result = cross_validate(init, apply, loss, reckless, X, Y, RADII, epochs=9, batch_size=10)
    np.testing.assert_array_equal(
        np.isnan(result.scores), np.repeat([[c > 1] for c in RADII], 5, 1)
    )
    assert result.best_c == result.one_standard_error_c == 0.5


TABLE = CrossValidation(
    (1.0, 0.3, 0.1, 0.03),
    np.array([[80, 82, 84], [88, 92, 90], [88, 88, 90.6], [60, 99, 95]], float),
)


def test_the_rules_on_a_table_by_hand():
    np.testing.assert_allclose(TABLE.mean, [82, 90, 88.86667, 84.66667], rtol=1e-6)
    np.testing.assert_allclose(TABLE.standard_error[:2], [2 / 3**0.5, 2 / 3**0.5])
    assert TABLE.best_c == 0.3
    # 90 - 1.1547 = 88.8453: 0.1 is above it, 0.03 is not, although its own error is large.
    assert TABLE.one_standard_error_c == 0.1


@given(
    st.lists(
        st.tuples(
            st.floats(1e-3, 1e3), st.lists(st.integers(-9, 9) | st.just(math.nan), min_size=3,
                                           max_size=3)
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_the_one_standard_error_c_is_the_smallest_that_is_good_enough(rows):
    result = CrossValidation(tuple(c for c, _ in rows), np.array([s for _, s in rows], float))
    means = [sum(s) / 3 for _, s in rows]
    if all(map(math.isnan, means)):
        with pytest.raises(ValueError, match="not finite: training has diverged"):
            _ = result.best_c
        return
    top = max(m for m in means if not math.isnan(m))
    best = next(i for i, m in enumerate(means) if m >= top - 1e-9)
    assert result.best_c == rows[best][0]
    variance = sum((s - means[best]) ** 2 for s in rows[best][1]) / 2
    bar = means[best] - math.sqrt(variance / 3)
    good = [c for (c, _), m in zip(rows, means, strict=True) if m >= bar + 1e-9]
    enough = [c for (c, _), m in zip(rows, means, strict=True) if m >= bar - 1e-9]
    assert min(enough) <= result.one_standard_error_c <= min(good, default=rows[best][0])


def test_figure_5_shows_the_scores_and_both_choices():
    mpl.use("Agg")
    ax = TABLE.plot(label="accuracy (%)")
    curve, *_ = ax.containers[0]
    np.testing.assert_array_equal(curve.get_xdata(), [0.03, 0.1, 0.3, 1.0])
    np.testing.assert_allclose(curve.get_ydata(), TABLE.mean[::-1])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "best: c = 0.3" in labels
    assert "one standard error: c = 0.1" in labels
    assert ax.get_ylabel() == "accuracy (%)"


LAYERS = {"hidden_0": (0.1, 10.0), "hidden_1": (0.01, 1.0)}


def hill(candidates):
    """Highest at 3 and 0.03, the same from fold to fold but for a constant."""
    height = [
        -(math.log(c["hidden_0"] / 3) ** 2) - math.log(c["hidden_1"] / 0.03) ** 2
        for c in candidates
    ]
    return CrossValidation(tuple(candidates), np.array([[h - 1, h + 1] for h in height]))


def test_the_search_climbs():
    result = search_layer_c(hill, LAYERS, rounds=12, candidates_per_round=5)
    assert result.scores.shape == (60, 2)
    assert all(low <= c[layer] <= high for c in result.c for layer, (low, high) in LAYERS.items())
    assert result.mean[:10].mean() < result.mean[-10:].mean()
    assert result.mean.max() > -0.3
    assert result.best_c == result.c[int(result.mean.argmax())]


def test_every_round_is_validated_at_once_and_starts_come_first():
    asked = []

    def listen(candidates):
        asked.append(list(candidates))
        return hill(candidates)

    start = [{"hidden_1": 0.5, "hidden_0": 2.0}, {"hidden_0": 0.1, "hidden_1": 1.0}]
    result = search_layer_c(listen, LAYERS, rounds=3, candidates_per_round=4, start=start)
    assert [len(candidates) for candidates in asked] == [4, 4, 4]
    assert asked[0][:2] == start
    assert list(result.c) == [c for candidates in asked for c in candidates]
    assert all(list(c) == list(LAYERS) for c in result.c)


def test_the_search_is_the_same_for_the_same_seed():
    first, again, other = (search_layer_c(hill, LAYERS, seed=seed).c for seed in (0, 0, 1))
    assert first == again != other


def test_the_search_goes_on_where_training_diverges():
    def sometimes(candidates):
        found = hill(candidates)
        found.scores[[c["hidden_0"] > 1 for c in candidates]] = math.nan
        return found

    result = search_layer_c(sometimes, LAYERS)
    assert np.isnan(result.mean).any()
    assert result.best_c["hidden_0"] <= 1


def test_each_layer_gets_its_own_c_and_patterns_keep_their_order():
    model = l1inf.linen.AugmentedMLP((4, 4, 1))
    seen = []

    def optimizer(c):
        seen.append(list(c))
        return optax.chain(optax.sgd(1e-2), l1inf.keep_params_in_l1inf_ball(c))

    def norms(params, x):
        """100 times the first layer's, plus the second's."""
        first, second = (
            l1inf.l1inf_norm(params["params"][name]["augmented_kernel"])
            for name in ("hidden_0", "hidden_1")
        )
        return 100 * first + second + 0 * model.apply(params, x)[:, 0]

    # "hidden_*" sorts before "hidden_1", which must nevertheless win.
    candidates = [{"hidden_1": 0.25, "hidden_*": 0.5}, {"hidden_*": 2.0, "hidden_1": 1.0}]
    result = cross_validate(
        lambda key, c: model.init(key, X), norms, lambda outputs, y: 0 * outputs, optimizer,
        X, Y, candidates, epochs=1, batch_size=10, cv=2, score=lambda outputs, y: outputs,
    )  # fmt: skip
    np.testing.assert_allclose(result.scores, [[50.25] * 2, [201.0] * 2], rtol=1e-5)
    assert all(order == ["hidden_1", "hidden_*"] for order in seen)
    with pytest.raises(ValueError, match="none is the smallest: use best_c"):
        _ = result.one_standard_error_c
    with pytest.raises(ValueError, match="none is the smallest: use best_c"):
        result.plot()


FIRST, SECOND = np.arange(30), np.arange(30, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": []}, "c holds no candidate"),
        ({"c": [1.0, 0.0]}, r"c holds 0\.0: give positive numbers"),
        ({"c": [math.nan]}, "c holds nan"),
        ({"c": [{"a": -1.0}]}, r"c holds -1\.0"),
        ({"c": [{"a": 1.0}, {"b": 1.0}]}, r"c holds \{'b': 1\.0\}, .* layers \['a'\]"),
        ({"c": [1.0, {"b": 1.0}]}, "give numbers, or mappings with the same layers"),
        ({"c": [{}]}, r"c holds \{\}"),
        ({"c": ["1.0"]}, r"c holds '1\.0': give positive numbers"),
        ({"c": [None]}, "c holds None: give positive numbers"),
        ({"c": [np.ones(2)]}, r"c holds array\(.*\): give positive numbers"),
        ({"y": Y[1:]}, "x has 60 examples and y has 59"),
        ({"y": np.arange(60)}, r"none of them occurs 5 times.* give y\.astype\(float\)"),
        ({"y": with_nan(Y)}, "y has entries that are NaN .* 1 of 60 examples, .* row 7, and loss"),
        ({"x": with_nan(X)}, "x has entries that are NaN .* 1 of 60 examples, .* row 7, and loss"),
        (
            {"y": with_nan(Y), "loss": masked_loss, "score": lambda o, y: -loss(o, y)},
            "row 7, and score is not finite there: leave these rows out",
        ),
        ({"cv": 1}, "cv is 1: give from 2 to 60 folds"),
        ({"cv": 61}, "cv is 61: give from 2 to 60 folds"),
        ({"cv": [(FIRST, SECOND)]}, "cv makes 1 folds: give at least 2"),
        ({"cv": iter([])}, "cv makes 0 folds"),
        ({"cv": [(FIRST, SECOND), (SECOND, SECOND[:1])]}, "fold 1 of cv trains on row 30 and"),
        ({"cv": [(FIRST, SECOND), (SECOND, [])]}, r"fold 1 of cv has rows of .* \(0,\)"),
        ({"cv": [(FIRST, SECOND), (SECOND, [60])]}, "rows outside 0 to 59"),
        ({"cv": [(FIRST, SECOND), (SECOND, [-1])]}, "rows outside 0 to 59"),
        ({"cv": [(FIRST, SECOND), (np.ones(60, bool), FIRST)]}, "dtype bool .* integer arrays"),
        ({"loss": lambda o, y: jnp.mean((o - y) ** 2)}, r"loss returns shape \(\) for two"),
        ({"score": lambda o, y: o[:, None] - y}, r"score returns shape \(2, 2\) for two"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)  # fmt: skip
def test_wrong_use_of_cross_validation(change, message):
    arguments = {
        "init": init, "apply": apply, "loss": loss, "optimizer": optimizer, "x": X, "y": Y,
        "c": [1.0], "epochs": 1, "batch_size": 10, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cross_validate(**arguments)


def test_a_loss_that_knows_missing_targets_may_have_them():
    result = cross_validate(
        init, apply, masked_loss, light, X, with_nan(Y), [1.0], epochs=1, batch_size=N
    )
    assert np.isfinite(result.scores).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": {}}, "bounds is empty"),
        ({"bounds": {"a": (1.0, 0.5)}}, r"bounds of 'a' are 1\.0 and 0\.5"),
        ({"bounds": {"a": (0.0, 0.5)}}, "two positive, finite numbers"),
        ({"bounds": {"a": (1.0, math.inf)}}, "two positive, finite numbers"),
        ({"rounds": 0}, "rounds is 0"),
        ({"candidates_per_round": 0}, "candidates_per_round is 0"),
        ({"start": [{"a": 1.0}] * 9}, "start holds 9 candidates: give at most .* 8"),
        ({"start": [{"b": 1.0}]}, r"start holds \{'b': 1\.0\}"),
        ({"start": [{"a": 20.0}]}, "give every layer of bounds a c within them"),
    ],
)
def test_wrong_use_of_the_search(change, message):
    with pytest.raises(ValueError, match=message):
        search_layer_c(**{"validate": hill, "bounds": {"a": (0.1, 10.0)}, **change})
