"""The bounds against the paper's formulas, against true complexities, and lemma by lemma."""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l1inf_optax as l1inf
from l1inf_optax import bounds
from tests.support import complexity
from tests.support.modules import CONVOLUTIONS

ARGUMENTS = {"n": 500, "m1": 1000, "k": 3, "c": 1.5, "rho": 1.0}
REGRESSION = {**ARGUMENTS, "norm": 2.0, "delta": 0.05}
CLASSIFICATION = {**ARGUMENTS, "m2": 4, "norm_1_1": 6.0, "norm_1_inf": 2.0, "delta": 0.05}


def display(number, n, m1, k, c, o, rho):
    r = c * rho
    if number == 1:
        bias = math.sqrt((k + 1) * math.log(16) / n) * (sum(r**i for i in range(k + 1)) + r**k)
        return o * bias + o * r**k * math.sqrt(2 * math.log(2 * m1) / n)
    return o * r**k * (math.sqrt((k + 3) * math.log(4)) + math.sqrt(2 * math.log(2 * m1))) / n**0.5


def moments(n, m1, k, c, o, rho, m2=1):
    """The bound by exponential moments."""
    signals = m2 * (2 ** (k + 1) * (m1 + 2) - 2)
    return o * max(1, (c * rho) ** k) * math.sqrt(2 * math.log(signals) / n)


NETWORKS = st.fixed_dictionaries(
    {
        "n": st.integers(1, 10**6),
        "m1": st.integers(1, 10**5),
        "k": st.integers(0, 6),
        "c": st.floats(0.01, 20),
        "o": st.floats(0.01, 100),
        "rho": st.floats(0.1, 3),
    }
)


@settings(max_examples=30)
@given(NETWORKS)
def test_both_displays_are_those_of_theorem_1(network):
    first = bounds.rademacher_bound(**network, display=1)
    np.testing.assert_allclose(first, display(1, **network), rtol=2e-4)
    at_least_1 = {**network, "c": max(network["c"], 1 / network["rho"])}
    second = bounds.rademacher_bound(**network, display=2)
    np.testing.assert_allclose(second, display(2, **at_least_1), rtol=2e-4)


@settings(max_examples=30)
@given(NETWORKS)
def test_the_default_is_the_smallest_bound_and_above_neither_display(network):
    best = bounds.rademacher_bound(**network)
    expected = min(display(1, **network), moments(**network))
    np.testing.assert_allclose(best, expected, rtol=2e-4)
    for number in (1, 2):
        assert best <= bounds.rademacher_bound(**network, display=number) * (1 + 1e-5)


def test_it_is_as_exact_in_float64_as_float64_is(x64):
    for number in (1, 2):
        found = bounds.rademacher_bound(**ARGUMENTS, o=0.3, display=number)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, display(number, **ARGUMENTS, o=0.3), rtol=1e-13)


def test_layers_may_have_their_own_constants():
    network = {"n": 100, "m1": 10, "k": 3, "o": 1.0}
    same = [bounds.rademacher_bound(**network, c=c) for c in (1.2, [1.2, 1.2, 1.2])]
    assert same[0] == same[1]
    levels = [1, 0.5, 0.5 * 4, 0.5 * 4 * 3]  # from the output layer down
    first = math.sqrt(4 * math.log(16) / 100) * (sum(levels) + levels[-1])
    first += levels[-1] * math.sqrt(2 * math.log(20) / 100)
    found = bounds.rademacher_bound(**network, c=[3.0, 4.0, 0.5], display=1)
    np.testing.assert_allclose(found, first, rtol=1e-5)


# --- against the truth ----------------------------------------------------------------------------


def random_settings(count, n, m1, seed):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (count, n, m1))
    x[::2] = np.sign(x[::2])  # corners of the cube have the largest complexity
    c, o = np.exp(rng.uniform(np.log(0.2), np.log(3), count)), rng.uniform(0.1, 5, count)
    kinds = np.array(list(complexity.ACTIVATIONS.values()))
    return x, c, o, kinds[np.arange(count) % len(kinds)]


def all_bounds(x, k, c, o, rho):
    n, m1 = x.shape
    arguments = {"n": n, "m1": m1, "k": k, "c": c, "o": o, "rho": rho}
    return [float(bounds.rademacher_bound(**arguments, display=which)) for which in (1, 2, None)]


@pytest.mark.parametrize(("n", "m1"), [(1, 1), (2, 5), (5, 1), (8, 3), (11, 40)])
def test_without_hidden_layers_no_bound_is_below_the_exact_complexity(n, m1):
    for x, c, o, _ in zip(*random_settings(20, n, m1, seed=n), strict=True):
        exact = complexity.linear(x, o)
        assert all(bound >= exact for bound in all_bounds(x, 0, c, o, 1.0))


@pytest.mark.parametrize("k", [1, 2])
def test_with_hidden_layers_no_bound_is_below_what_ascent_finds(k):
    drawn = random_settings(100, 5, 4, seed=k)
    arrays = map(jnp.asarray, drawn)
    found = complexity.ascended(jax.random.key(0), *arrays, k=k, restarts=4, steps=25, width=4)
    ratios = []
    for lower, x, c, o, weights in zip(np.asarray(found), *drawn, strict=True):
        every = all_bounds(x, k, c, o, weights.sum())
        assert all(bound >= lower for bound in every)
        ratios.append(every[-1] / lower)
    assert np.median(ratios) < 4  # and not far above: the check has teeth


@pytest.mark.parametrize("m2", [2, 3])
def test_outputs_that_share_a_norm_have_the_complexity_theorem_3_counts_with(m2):
    n, m1 = 12 // m2, 3
    for x, _, _, _ in zip(*random_settings(20, n, m1, seed=m2), strict=True):
        epsilon = np.array(list(itertools.product((-1.0, 1.0), repeat=n * m2)))
        with_bias = np.concatenate([np.ones((n, 1)), x], axis=1)
        sums = np.abs(epsilon.reshape(-1, n) @ with_bias).max(axis=1)
        exact = sums.reshape(-1, m2).max(axis=1).mean() / n
        assert moments(n, m1, 0, 1.0, 1.0, 1.0, m2) >= exact


# --- how it grows: Remarks 1, 2 and 5 -------------------------------------------------------------


def slope(x, y):
    return np.polyfit(np.log(x), np.log(np.asarray(y, np.float64)), 1)[0]


@pytest.mark.parametrize("which", [1, 2, None])
def test_it_falls_with_the_root_of_the_sample_size(which):
    n = np.array([10.0, 100, 1000, 10_000])
    bound = partial(bounds.rademacher_bound, m1=20, k=2, c=1.0, o=1.0, display=which)
    assert slope(n, [bound(n=size) for size in n]) == pytest.approx(-0.5, abs=1e-4)


@pytest.mark.parametrize("which", [2, None])
def test_it_grows_with_the_root_of_the_depth_at_c_1_and_with_its_power_above(which):
    depths = np.array([100, 800])
    bound = partial(bounds.rademacher_bound, n=100, m1=1, o=1.0, display=which)
    assert slope(depths, [bound(k=int(k), c=1.0) for k in depths]) == pytest.approx(0.5, abs=0.04)
    above = [bound(k=int(k), c=1.05) / 1.05 ** float(k) for k in depths]
    assert slope(depths, above) == pytest.approx(0.5, abs=0.04)


def test_below_c_1_the_first_display_grows_with_the_root_of_the_depth_alone():
    depths = np.array([100, 800])
    bound = partial(bounds.rademacher_bound, n=100, m1=1000, c=0.9, o=1.0, display=1)
    # (1 - r^(k + 1)) / (1 - r) is 10 for every one of them
    assert slope(depths, [bound(k=int(k)) for k in depths]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_it_grows_with_the_k_th_power_of_c(k):
    c = np.array([1.0, 2, 4, 8])
    values = [bounds.rademacher_bound(n=10, m1=10, k=k, c=r, o=1.0) for r in c]
    assert slope(c, values) == pytest.approx(k, abs=1e-4)


def test_it_grows_with_the_root_of_the_logarithm_of_the_inputs():
    m1 = 10.0 ** np.arange(2, 30, 3)
    bound = partial(bounds.rademacher_bound, n=10, k=2, c=1.0, o=1.0)
    squares = [float(bound(m1=size)) ** 2 for size in m1]
    assert np.polyfit(np.log(m1), squares, 1)[0] == pytest.approx(2 / 10, rel=0.01)


def test_the_layer_by_layer_bounds_are_2_to_the_k_larger():
    def peeled(k, n=100, m1=100):  # contraction with its factor of 2 at each of k layers
        return (2**k * (1 + math.sqrt(2 * math.log(2 * m1))) + 2**k - 1) / math.sqrt(n)

    depths = np.arange(8, 15)
    ours = [float(bounds.rademacher_bound(n=100, m1=100, k=int(k), c=1, o=1)) for k in depths]
    doublings = np.diff(np.log2([peeled(int(k)) / b for k, b in zip(depths, ours, strict=True)]))
    assert (abs(doublings - 1) < 0.06).all()


# --- in JAX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 2.0}, "c"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 2.0, "display": 1}, "rho"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 2.0, "display": 2}, "o"),
        (bounds.regression_bound, REGRESSION, "delta"),
        (bounds.regression_bound, REGRESSION, "norm"),
        (bounds.classification_bound, CLASSIFICATION, "c"),
        (bounds.classification_bound, CLASSIFICATION, "norm_1_inf"),
        (bounds.classification_bound, CLASSIFICATION, "n"),
    ],
)
def test_it_is_differentiated_mapped_and_compiled(x64, function, arguments, name):
    others = {key: value for key, value in arguments.items() if key != name}

    def bound(value):
        return function(**others, **{name: value})

    value = float(arguments[name])
    step = 1e-6 * value
    numeric = (bound(value + step) - bound(value - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(bound)(value), numeric, rtol=1e-6)
    values = jnp.array([0.9, 1.0, 1.1]) * value
    one_by_one = [bound(float(v)) for v in values]
    np.testing.assert_allclose(jax.jit(jax.vmap(bound))(values), one_by_one, rtol=1e-12)


def test_powers_that_overflow_do_no_harm():
    deep = partial(bounds.rademacher_bound, n=100, m1=10, k=60)  # c^k = 1e60
    expected = 1e-30 * moments(100, 10, 60, 10.0, 1.0, 1.0)
    value, derivative = jax.value_and_grad(lambda c: deep(o=1e-30, c=c))(10.0)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(derivative, 6 * expected, rtol=1e-4)
    assert deep(o=1.0, c=10.0) == np.inf
    assert bounds.rademacher_bound(n=100, m1=10, k=5000, c=1.0, o=1.0) < 10


@pytest.mark.parametrize(
    ("function", "arguments", "wrong", "message"),
    [
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"c": 0.0}, "c=0.0 is not positive"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"c": [1.0, 2.0]}, r"shape \(2,\)"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"k": -1}, "k=-1"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"k": 1.5}, "k=1.5"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"n": 0}, "n=0"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"m1": 0}, "m1=0"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"rho": -1.0}, "rho=-1.0"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"o": math.nan}, "o=nan"),
        (bounds.rademacher_bound, {**ARGUMENTS, "o": 1}, {"display": 3}, "display=3"),
        (bounds.regression_bound, REGRESSION, {"delta": 0.0}, "delta=0.0"),
        (bounds.regression_bound, REGRESSION, {"delta": 1.0}, "delta=1.0"),
        (bounds.regression_bound, REGRESSION, {"norm": -1.0}, "norm=-1.0"),
        (bounds.regression_bound, REGRESSION, {"B0": 0.0}, "B0=0.0"),
        (bounds.classification_bound, CLASSIFICATION, {"m2": 1}, "m2=1"),
        (bounds.classification_bound, CLASSIFICATION, {"norm_1_1": "one"}, "norm_1_1='one'"),
    ],
)
def test_a_condition_that_fails_is_named(function, arguments, wrong, message):
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **wrong})


# --- Theorems 2 and 3 -----------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 2.5])
def test_regression_is_equation_3_1_as_printed(c):
    n, m1, k, norm, delta = 500, 1000, 2, 3.5, 0.05
    draw = math.sqrt((math.log(2 / delta) + 2 * math.log(norm + 2)) / (2 * n))
    richness = 2 * display(2, n, m1, k, c, norm + 1, 1.0)
    arguments = {"n": n, "m1": m1, "k": k, "c": c, "norm": norm, "delta": delta}
    found = bounds.regression_bound(**arguments, display=2)
    np.testing.assert_allclose(found, draw + richness, rtol=1e-5)
    # Remark 4: the loss divided by B0 meets A3
    np.testing.assert_allclose(
        bounds.regression_bound(**arguments, display=2, B0=9.0), 9 * found, rtol=1e-5
    )
    np.testing.assert_allclose(
        bounds.regression_bound(**arguments, display=2, B0=9.0, lipschitz=6.0),
        9 * draw + 6 * richness,
        rtol=1e-5,
    )


def test_regression_below_c_1_is_by_the_first_display():
    arguments = {"n": 500, "m1": 10**6, "k": 1, "c": 0.01, "delta": 0.05, "norm": 1.0}
    draw = math.sqrt((math.log(40) + 2 * math.log(3)) / 1000)
    expected = draw + 2 * display(1, 500, 10**6, 1, 0.01, 2.0, 1.0)
    assert display(1, 500, 10**6, 1, 0.01, 2.0, 1.0) < moments(500, 10**6, 1, 0.01, 2.0, 1.0)
    np.testing.assert_allclose(bounds.regression_bound(**arguments), expected, rtol=1e-5)


@pytest.mark.parametrize("c", [0.5, 1.5])
def test_classification_is_the_formula_of_the_docs(c):
    n, m1, m2, k, total, largest, delta = 500, 1000, 4, 2, 6.0, 2.0, 0.05
    size = (largest + 1) * max(1, c**k)
    range_ = math.log1p((m2 - 1) * math.exp(2 * size)) - math.log1p((m2 - 1) * math.exp(-2 * size))
    union = 2 * math.log(total + 2) + 2 * math.log(largest + 2)
    draw = range_ * math.sqrt((math.log(2 / delta) + union) / (2 * n))
    expected = draw + 4 * moments(n, m1, k, c, total + 1, 1.0, m2)
    arguments = {"n": n, "m1": m1, "m2": m2, "k": k, "c": c, "delta": delta}
    found = bounds.classification_bound(**arguments, norm_1_1=total, norm_1_inf=largest)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_losses_of_both_signs_break_theorem_2_as_printed():
    # y = 1 or -1 with equal odds and L(f, y) = y, which is Lipschitz and at most 1 in magnitude.
    # All n signs agree with probability 2^(1 - n), and then the gap is 1.
    n = 400
    delta = 1.9 * 2.0**-n
    printed = math.sqrt((math.log(2 / delta) + 2 * math.log(2)) / (2 * n))
    printed += 2 * display(2, n, 1, 0, 1.0, 1.0, 1.0)
    assert delta < 2.0 ** (1 - n)
    assert printed < 1


# --- the lemmas of the proof, one by one ----------------------------------------------------------


def test_the_cross_entropys_gradient_is_at_most_root_2():
    rng = np.random.default_rng(0)
    logits, y = jnp.array(rng.normal(size=(2000, 5)) * 10), jnp.array(rng.integers(0, 5, 2000))
    loss = optax.softmax_cross_entropy_with_integer_labels
    norms = jnp.linalg.norm(jax.vmap(jax.grad(loss))(logits, y), axis=1)
    assert 1.41 < norms.max() <= math.sqrt(2) * (1 + 1e-6)


@settings(max_examples=50)
@given(st.integers(2, 6), st.floats(0, 5), st.integers(0, 2**32 - 1))
def test_the_cross_entropys_range_is_reached_and_never_left(m2, size, seed):
    loss = partial(optax.softmax_cross_entropy_with_integer_labels, labels=jnp.array(0))
    corner = jnp.full(m2, size).at[0].set(-size)
    width = loss(corner) - loss(-corner)
    expected = math.log1p((m2 - 1) * math.exp(2 * size)) - math.log1p(
        (m2 - 1) * math.exp(-2 * size)
    )
    np.testing.assert_allclose(width, expected, rtol=1e-4, atol=1e-5)
    inside = np.random.default_rng(seed).uniform(-size, size, m2)
    assert loss(-corner) - 1e-5 <= loss(jnp.array(inside)) <= loss(corner) + 1e-5


def test_nearly_no_output_has_nearly_no_range():
    task = network((5, 8, 3), c=1e-3)
    readout = task["params"]["params"]["readout"]
    task["params"]["params"]["readout"] = jax.tree.map(lambda v: 1e-7 * v, readout)
    assert 0 < bounds.certificate(**task).reached.draw < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_vector_contraction_holds_for_the_cross_entropy(seed):
    n, m2, functions = 4, 3, 30
    rng = np.random.default_rng(seed)
    outputs = 3 * rng.normal(size=(functions, n, m2))
    y = rng.integers(0, m2, n)
    losses = np.log(np.exp(outputs).sum(axis=2)) - outputs[:, np.arange(n), y]
    one, many = (np.array(list(itertools.product((-1, 1), repeat=size))) for size in (n, n * m2))
    left = (one @ losses.T).max(axis=1).mean()
    right = (many @ outputs.reshape(functions, -1).T).max(axis=1).mean()
    assert left <= 2 * right


@pytest.mark.parametrize("name", complexity.ACTIVATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_contraction_holds_under_an_exponential(name, seed):
    relu, tanh, identity = weights = complexity.ACTIVATIONS[name]
    u = 2 * np.random.default_rng(seed).normal(size=(40, 8))  # 40 functions on 8 samples
    activated = relu * np.maximum(u, 0) + tanh * np.tanh(u) + identity * u
    epsilon = np.array(list(itertools.product((-1, 1), repeat=8)))
    for scale in (0.1, 0.5, 1.0):
        left = np.exp(scale * np.abs(epsilon @ activated.T).max(axis=1)).mean()
        right = np.exp(scale * sum(weights) * (epsilon @ u.T).max(axis=1)).mean()
        assert left <= 2 * right


# --- convolutions ---------------------------------------------------------------------------------


def unrolled(layer, params, shape):
    """The convolution's matrix with the bias in row 0, float64: a column for every output."""
    size = math.prod(shape)
    one_pixel_each = np.eye(1 + size, size, -1).reshape(-1, *shape)  # after an empty image
    outputs = np.asarray(layer.apply(params, one_pixel_each), np.float64).reshape(1 + size, -1)
    outputs[1:] -= outputs[0]
    return outputs


# Where no output sees all of the kernel, or the kernel meets an input twice: below, not equal.
BELOW = ("input dilation, padding pairs", "mask")


@pytest.mark.parametrize("name", [n for n in CONVOLUTIONS if "bfloat16" not in n])
def test_an_unrolled_convolution_has_the_norm_of_its_kernel(name):
    shape, options = CONVOLUTIONS[name]
    options = {"features": 8, **options}
    options["kernel_size"] = np.atleast_1d(options["kernel_size"]).tolist()
    spatial = len(options["kernel_size"])
    shape = shape[len(shape) - spatial - 1 :]
    layer = l1inf.linen.AugmentedConv(**options, bias_init=jax.nn.initializers.normal(1.0))
    params = layer.init(jax.random.key(0), jnp.zeros(shape))
    kernel = np.abs(np.asarray(params["params"]["augmented_kernel"], np.float64)).sum(axis=0)
    norm = np.abs(unrolled(layer, params, shape)).sum(axis=0).max()
    if name in BELOW:
        assert norm < kernel.max()
    else:
        np.testing.assert_allclose(norm, kernel.max(), rtol=1e-5)


def test_padding_can_only_lower_the_norm():
    layer = l1inf.linen.AugmentedConv(features=4, kernel_size=(5, 5))
    params = layer.init(jax.random.key(0), jnp.zeros((3, 3, 2)))  # no output sees all 25 pixels
    kernel = np.abs(np.asarray(params["params"]["augmented_kernel"], np.float64)).sum(axis=0)
    assert np.abs(unrolled(layer, params, (3, 3, 2))).sum(axis=0).max() < kernel.max()


# --- certificates ---------------------------------------------------------------------------------

N = 2000


def network(widths=(5, 8, 7, 1), c=0.9, seed=0):
    """A trained network, as good as: Linen's own tree, its layers inside their balls."""
    *_, m2 = widths
    model = l1inf.linen.AugmentedMLP(widths[1:], bias_init=jax.nn.initializers.normal(0.3))
    x = jax.random.uniform(jax.random.key(seed), (N, widths[0]), minval=-1)
    c = {"hidden_*": c}
    init = jax.jit(lambda key: l1inf.project_params(model.init(key, x), c))  # one compilation
    y = jnp.sin(3 * x[:, 0]) if m2 == 1 else (x[:, 0] > 0).astype(int)
    return {"params": init(jax.random.key(1)), "x": x, "y": y, "apply": model.apply, "c": c}


def columns(layer):
    """The L1 norms of the columns, in float64."""
    if "augmented_kernel" in layer:
        return np.abs(np.asarray(layer["augmented_kernel"], np.float64)).sum(axis=0)
    kernel, bias = (np.abs(np.asarray(layer[name], np.float64)) for name in ("kernel", "bias"))
    return kernel.sum(axis=0) + bias


def rounded(norm, k):
    """The next power of exp(1 / (20 (k + 1))), and minus the logarithm of its share of delta."""
    steps = 20 * (k + 1)
    z = math.ceil(steps * math.log(norm))
    return math.exp(z / steps), math.log(1.5 * (abs(z) + 1) * (abs(z) + 2))


def test_the_shares_of_all_powers_add_up_to_1():
    z = np.arange(10**6)
    shares = 1 / (1.5 * (z + 1) * (z + 2))
    assert shares.sum() + shares[1:].sum() == pytest.approx(1, abs=1e-5)


def test_the_certificate_of_a_regression_is_the_formula_of_the_docs():
    task = network()
    found = bounds.certificate(**task, delta=0.1, truncation=0.8)
    layers, k = task["params"]["params"], 2
    norms = [columns(layers[name]).max() for name in ("hidden_0", "hidden_1")]
    norm = columns(layers["readout"]).sum()
    residuals = np.asarray(task["apply"](task["params"], task["x"]))[:, 0] - np.asarray(task["y"])
    np.testing.assert_allclose(
        found.empirical_risk, np.minimum(residuals**2, 0.64).mean(), rtol=1e-5
    )
    assert (found.n, found.m1, found.m2, found.k) == (N, 5, 1, k)
    np.testing.assert_allclose(list(found.norms.values()), norms, rtol=1e-6)
    np.testing.assert_allclose([found.norm_1_1, found.norm_1_inf], norm, rtol=1e-6)

    by_c = {"n": N, "m1": 5, "k": k, "c": 0.9, "delta": 0.05, "norm": norm}
    np.testing.assert_allclose(
        found.for_c.total, bounds.regression_bound(**by_c, B0=0.64, lipschitz=1.6), rtol=1e-5
    )
    (first, u1), (second, u2), (size, u3) = (rounded(v, k) for v in (*norms, norm))
    draw = 0.64 * math.sqrt((math.log(2 / 0.05) + u1 + u2 + u3) / (2 * N))
    low, high = sorted((first, second))
    complexity = bounds.rademacher_bound(n=N, m1=5, k=k, c=[low, high], o=size)
    np.testing.assert_allclose(found.reached.draw, draw, rtol=1e-4)
    np.testing.assert_allclose(found.reached.richness, 2 * 1.6 * complexity, rtol=1e-4)
    rounding = first * second * size / (math.prod(norms) * norm)
    assert 1 <= rounding <= math.exp(0.05)

    assert found.gap_bound == min(found.for_c.total, found.reached.total)
    assert found.risk_bound == found.empirical_risk + found.gap_bound
    y = np.asarray(task["y"], np.float64)
    assert found.trivial == pytest.approx(np.minimum((y - y.mean()) ** 2, 0.64).mean(), rel=1e-4)
    assert found.vacuous == (found.risk_bound >= found.trivial)


def test_the_certificate_of_a_classification_is_the_formula_of_the_docs():
    task = network((5, 8, 3), c=1.5)
    found = bounds.certificate(**task, delta=0.1)
    layers, k = task["params"]["params"], 1
    norm, output = columns(layers["hidden_0"]).max(), columns(layers["readout"])
    logits = np.asarray(task["apply"](task["params"], task["x"]), np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(N), np.asarray(task["y"])]
    np.testing.assert_allclose(found.empirical_risk, losses.mean(), rtol=1e-5)
    assert found.trivial == pytest.approx(math.log(3))

    by_c = {"n": N, "m1": 5, "m2": 3, "k": k, "c": 1.5, "delta": 0.05}
    expected = bounds.classification_bound(**by_c, norm_1_1=output.sum(), norm_1_inf=output.max())
    np.testing.assert_allclose(found.for_c.total, expected, rtol=1e-5)
    (c, u1), (total, u2), (largest, u3) = (
        rounded(v, k) for v in (norm, output.sum(), output.max())
    )
    size = 2 * largest * max(1, c)
    range_ = math.log1p(2 * math.exp(size)) - math.log1p(2 * math.exp(-size))
    draw = range_ * math.sqrt((math.log(2 / 0.05) + u1 + u2 + u3) / (2 * N))
    np.testing.assert_allclose(found.reached.draw, draw, rtol=1e-4)
    richness = 4 * moments(N, 5, k, c, total, 1.0, 3)
    np.testing.assert_allclose(found.reached.richness, richness, rtol=1e-4)


def test_the_norms_reached_give_the_smaller_bound_where_the_ball_is_wide():
    task = network(c=0.9)
    wide = bounds.certificate(**{**task, "c": {"hidden_*": 50.0}})
    assert wide.gap_bound == wide.reached.total < wide.for_c.total / 100
    free = bounds.certificate(**{**task, "c": {"hidden_*": np.inf}})
    assert free.for_c.total == np.inf
    assert free.gap_bound == wide.gap_bound


def test_the_sample_size_is_the_one_at_which_the_bound_has_fallen():
    task = network()
    found = bounds.certificate(**task)
    for gap in (0.5, 0.01):
        n = found.sample_size(gap)
        scaled = found.gap_bound * math.sqrt(N)
        assert scaled / math.sqrt(n) <= gap < scaled / math.sqrt(n - 1)
    twice = {**task, "x": jnp.tile(task["x"], (2, 1)), "y": jnp.tile(task["y"], 2)}
    assert bounds.certificate(**twice).gap_bound == pytest.approx(found.gap_bound / math.sqrt(2))
    with pytest.raises(ValueError, match="gap=0"):
        found.sample_size(0)


def test_wide_inputs_are_those_of_a_network_with_larger_weights():
    model = l1inf.linen.AugmentedMLP((8, 1), use_bias=False)
    x = 4 * network()["x"]
    params = model.init(jax.random.key(0), x)
    hidden = params["params"]["hidden_0"]["augmented_kernel"]
    scaled = {"params": {**params["params"], "hidden_0": {"augmented_kernel": 4 * hidden}}}
    common = {"y": jnp.zeros(N), "apply": model.apply}
    wide = bounds.certificate(params, x, c={"hidden_0": 5.0}, input_bound=4.0, **common)
    narrow = bounds.certificate(scaled, x / 4, c={"hidden_0": 20.0}, **common)
    assert wide.for_c.total == pytest.approx(narrow.for_c.total, rel=1e-5)
    assert wide.reached.richness == pytest.approx(narrow.reached.richness, rel=0.03)  # rounding


def test_width_does_not_matter_but_through_the_norms():
    task = network((5, 8, 1))
    twice = jax.tree.map(lambda v: v, task["params"])
    hidden, readout = twice["params"]["hidden_0"], twice["params"]["readout"]
    hidden["augmented_kernel"] = jnp.tile(hidden["augmented_kernel"], (1, 2))
    readout["kernel"] = jnp.tile(readout["kernel"] / 2, (2, 1))
    wide = {**task, "params": twice, "apply": l1inf.linen.AugmentedMLP((16, 1)).apply}
    narrow = bounds.certificate(**task).gap_bound
    assert bounds.certificate(**wide).gap_bound == pytest.approx(narrow, rel=1e-5)


def test_other_libraries_trees_and_networks_without_hidden_layers_are_understood():
    x = network()["x"]
    rng = np.random.default_rng(0)
    haiku = {"mlp/~/linear_0": {"w": rng.normal(size=(5, 4)), "b": np.ones(4)}}
    haiku["mlp/~/linear_1"] = {"w": rng.normal(size=(4, 1)), "b": np.ones(1)}

    def apply(params, x):
        first, last = params.values()
        return jax.nn.relu(x @ first["w"] + first["b"]) @ last["w"] + last["b"]

    y = jnp.zeros(N)
    found = bounds.certificate(haiku, x, y, apply=apply, c={"*linear_0": 100.0})
    expected = (np.abs(haiku["mlp/~/linear_0"]["w"]).sum(axis=0) + 1).max()
    assert list(found.norms.values()) == pytest.approx([expected])

    equinox = {"weight": np.array([[0.5, -0.25, 0.0, 0.0, 0.0]]), "bias": np.array([0.25])}
    found = bounds.certificate(
        equinox, x, y, apply=lambda p, x: x @ p["weight"].T + p["bias"], c={}
    )
    assert (found.k, found.norm_1_1) == (0, 1.0)
    expected = bounds.regression_bound(
        n=N, m1=5, k=0, c=1, norm=1.0, delta=0.025, B0=4.0, lipschitz=4.0
    )
    assert found.for_c.total == pytest.approx(float(expected))


def test_a_convolutions_inputs_are_all_pixels_and_its_norm_the_kernels():
    conv = l1inf.linen.AugmentedConv(3, (3, 3), strides=2)
    readout = l1inf.linen.AugmentedDense(2)
    x = jax.random.uniform(jax.random.key(0), (50, 6, 6, 2), minval=-1)
    hidden = conv.init(jax.random.key(1), x)["params"]
    params = {"conv": hidden, "readout": readout.init(jax.random.key(2), jnp.ones((1, 27)))}

    def apply(params, x):
        u = jax.nn.relu(conv.apply({"params": params["conv"]}, x))
        return readout.apply(params["readout"], u.reshape(len(x), -1))

    found = bounds.certificate(
        params, x, jnp.zeros(50, int), apply=apply, c={"conv": 10.0}, delta=0.05
    )
    assert (found.m1, found.m2, found.k) == (72, 2, 1)
    assert list(found.norms.values()) == pytest.approx([columns(hidden).max()])


TASK = network()
STACKED = {"hidden": {"kernel": jnp.ones((2, 5, 5)), "bias": jnp.ones((2, 5))}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 2 * TASK["x"]}, r"beyond input_bound=1"),
        ({"x": TASK["x"].at[0].set(jnp.nan)}, "magnitudes of up to nan"),
        ({"x": TASK["x"][:, 0]}, r"x has shape \(2000,\)"),
        ({"y": TASK["y"][1:]}, r"y has shape \(1999,\)"),
        ({"y": TASK["y"].astype(int)}, "a float for one output"),
        ({"c": 0.9}, "which layers are hidden"),
        ({"c": {"hidden_0": 0.9}}, "leaves 2 layers free"),
        ({"c": {"*": 9.0}}, "leaves 0 layers free"),
        ({"c": {"hidden_*": 0.1}}, "give the number it was trained with"),
        ({"c": {"hidden_*": optax.constant_schedule(0.9)}}, "give the number"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"truncation": 0.0}, "truncation=0.0"),
        ({"input_bound": 0.0}, "input_bound=0.0"),
        ({"apply": lambda params, x: jnp.full((N, 1), 1e6)}, "outputs of up to 1e"),
        ({"apply": lambda params, x: jnp.zeros((N, 2)), "y": jnp.zeros(N, int)}, "2 outputs"),
        ({"params": {**TASK["params"], "norm": {"scale": jnp.ones(3)}}}, "no other layers"),
        ({"params": {**TASK["params"], **STACKED}, "c": {"hidden*": 99.0}}, "stack of layers"),
    ],
)
def test_what_the_theorems_do_not_cover_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bounds.certificate(**{**TASK, **changes})


def test_classes_out_of_range_are_refused():
    task = network((5, 8, 3))
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        bounds.certificate(**{**task, "y": task["y"] + 2})


def test_it_says_in_plain_words_whether_it_says_anything():
    task = network((5, 8, 1))
    found = bounds.certificate(**task, delta=0.01)
    text = str(found)
    assert "2,000 samples of 5 inputs, 1 hidden layer, 1 output" in text
    assert "probability 0.99" in text
    assert f"{found.risk_bound:.4g}" in text
    vacuous = dataclasses.replace(found, trivial=found.risk_bound)
    assert vacuous.vacuous
    assert "This says nothing" in str(vacuous)
    useful = dataclasses.replace(found, trivial=1.01 * found.risk_bound)
    assert not useful.vacuous
    assert "This says something" in str(useful)
    constant = {**task, "y": jnp.ones(N)}  # the mean target has no risk at all
    assert "for inf samples" in str(bounds.certificate(**constant))
