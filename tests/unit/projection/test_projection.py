import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import l1inf_optax as l1inf
from l1inf_optax._projection.requests import project_columns
from tests.support import oracle

METHODS = ("newton", "sort")
U = 2.0**-24  # half a unit in the last place of a float32 in [1, 2)
TINY = 2.0**-126  # the smallest normal float32; CPUs flush what is below it to zero


def one_entry_a_pass(n):
    """A column on which Newton's method drops a single entry at every pass.

    Two entries at the maximum, the k-th at distance ``mean_k + gap_k`` below it, where mean_k is
    the threshold's distance when k - 1 entries are left. Only gaps that grow like k! keep the
    (k-1)-th entry until the pass after the k-th is dropped: a float32 has room for a dozen.
    """
    distance, gap = [0.0, 0.0], 2.0**-22
    for k in range(3, n + 1):
        gap *= 1.1 * k
        distance.append((1 + sum(distance)) / (k - 1) + gap)
    return 1.0 - np.array(distance)


# name: (column, c). Of few lengths, each of which is compiled.
CASES = {
    "hangs_textbook_newton_equal_entries": ([1e6] * 8, 0.07),
    "hangs_textbook_newton_one_huge_entry": ([1e7], 0.07),
    "hangs_textbook_newton_huge_above_small": ([3e6, 3e6, *[1.0, 0.5] * 3], 0.07),
    "hangs_textbook_newton_opposite_signs": ([-2.5e6, 2.5e6, 2.5e6], 0.07),
    "all_entries_equal": ([0.3] * 8, 1.0),
    "ties_at_the_threshold": ([3.0, 2.0, *[1.0] * 6], 3.0),
    "ties_above_the_threshold": ([2.0, 2.0, 2.0, -2.0, *[0.1] * 4], 1.0),
    "one_huge_entry": ([1e30, *[1.0, -1.0] * 3, 0.5], 1.0),
    "huge_beside_tiny": ([1e30, 1e-30], 1.0),
    "huge_beside_tiny_huge_ball": ([1e30, 1e-30, 3e29], 1.1e30),
    "near_overflow": ([3e38] * 8, 1.0),
    "near_overflow_small_ball": ([3e38, 2.9e38], 1e-3),
    "near_overflow_large_ball": ([3e38] * 8, 1e38),
    "subnormal": ([5e-39, -3e-39, 1e-40] * 11, 3.3e-38),
    "subnormal_ball": ([1e-40] * 8, 4e-40),
    "zeros": ([0.0] * 8, 1.0),
    "one_row_outside": ([-7.0], 0.1),
    "one_row_inside": ([0.05], 0.1),
    "ball_1e9_times_smaller": (np.linspace(-1, 1, 33), 16e-9),
    "ball_1e9_times_larger": (np.linspace(-1, 1, 33), 16e9),
    "already_inside": ([0.1, -0.2, 0.3], 1.0),
    "exactly_on_the_sphere": ([0.5, -0.25, 0.25], 1.0),
    "on_the_sphere_of_a_float64": (
        np.float32([0.1, 0.7, -0.3]),
        float(np.abs(np.float32([0.1, 0.7, -0.3]).astype(np.float64)).sum()),
    ),
    "a_hair_outside": ([0.5, -0.25, np.nextafter(np.float32(0.25), np.float32(1))], 1.0),
    "a_hair_inside": ([0.5, -0.25, np.nextafter(np.float32(0.25), np.float32(0))], 1.0),
    "outside_by_less_than_float64_sees": ([1.0, 1e-30], 1.0),
    "one_entry_a_pass": (np.pad(one_entry_a_pass(11), (0, 22)), 1.0),
    "negative_zero": ([-0.0, 2.0, -3.0], 1.0),
    "powers_of_two": (2.0 ** -np.arange(33), 1.25),
}


def check_projection(x, c, w):
    """Contracts 1, 2 and 3 for float32 columns, against rational arithmetic."""
    x, w = np.asarray(x), np.asarray(w)
    c = np.broadcast_to(np.asarray(c, np.float64), x.shape[1:])
    assert w.shape == x.shape
    assert w.dtype == x.dtype == np.float32
    for j in range(x.shape[1]):
        exact = oracle.project(x[:, j], float(c[j]))
        assert oracle.norm64(w[:, j]) <= c[j]
        if untouched(x[:, j], c[j]):
            np.testing.assert_array_equal(w[:, j].view(np.int32), x[:, j].view(np.int32))
            continue
        pairs = list(zip(exact, w[:, j].tolist(), strict=True))
        tolerance = 8 * U * c[j] + 2 * TINY
        assert max(abs(float(e - oracle.Fraction(y))) for e, y in pairs) <= tolerance
        # What lies at the threshold itself may be a rounding error; what lies below is zero.
        largest = np.abs(x[:, j]).argmax()
        theta = abs(float(x[largest, j])) - abs(float(exact[largest]))
        below = np.abs(x[:, j].astype(np.float64)) < theta - tolerance
        assert (w[below, j] == 0).all()


def untouched(column, c):
    """Whether a column must come back bit for bit: it is inside its ball by more than rounding."""
    norm = sum(abs(oracle.Fraction(float(y))) for y in column)
    unseen = len(column) * 4 * TINY if c < 2.0**-30 else 0  # subnormal numbers are read as zero
    return norm + oracle.Fraction(unseen) <= oracle.Fraction(float(c)) * (
        1 - 16 * oracle.Fraction(U)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_adversarial_columns_are_projected_exactly(name, method):
    column, c = CASES[name]
    x = np.asarray(column, np.float32)[:, None]
    check_projection(x, c, l1inf.projection_l1inf_ball(x, c, method=method))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("hangs_textbook")])
def test_named_cases_do_hang_the_textbook_loop(name):
    column, c = CASES[name]
    a, c = np.abs(np.float32(column)), np.float32(c)
    theta, seen = np.float32(0), []
    while theta not in seen:  # stops at a fixed point or in a cycle
        seen.append(theta)
        active = a > theta
        theta = (a[active].sum() - c) / np.float32(active.sum()) if active.any() else np.float32(0)
    assert seen[-1] != theta, "a fixed point: this case would not hang"


def random_columns(rng, n=24):
    """64 columns, eight from each of eight distributions, at scales from 1e-30 to 1e30."""
    draws = [
        rng.normal(size=(n, 8)),
        rng.standard_cauchy(size=(n, 8)),
        np.exp(8 * rng.normal(size=(n, 8))),
        rng.integers(-3, 4, size=(n, 8)),
        rng.normal(size=(n, 8)) * (rng.random((n, 8)) < 0.2),
        1 + 1e-6 * rng.normal(size=(n, 8)),
        2.0 ** -rng.integers(0, 30, size=(n, 8)),
        np.vstack([np.full((1, 8), 1e6), rng.normal(size=(n - 1, 8))]),
    ]
    x = np.hstack(draws) * 10.0 ** rng.uniform(-30, 25, size=64)
    x *= rng.choice([-1, 1], size=x.shape)
    x = np.clip(x, -3e38, 3e38).astype(np.float32)
    norm = np.abs(x.astype(np.float64)).sum(0)
    c = np.clip(norm * 10 ** rng.uniform(-9, 0.2, size=64), 1e-36, 1e38).astype(np.float32)
    return x, c


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_random_columns_are_projected_exactly(seed, method):
    x, c = random_columns(np.random.default_rng(seed))
    check_projection(x, c, l1inf.projection_l1inf_ball(x, c, method=method))


floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300)
@given(
    column=st.lists(floats32, min_size=6, max_size=6),
    c=st.floats(min_value=2.0**-116, max_value=2.0**126, width=32),
    share=st.one_of(st.none(), st.floats(min_value=1e-9, max_value=2)),
)
def test_every_finite_column_is_projected_exactly(column, c, share):
    x = np.asarray(column, np.float32)[:, None]
    if share is not None:
        c = min(max(share * oracle.norm64(x), 2.0**-116), 2.0**126)
    if c < 2.0**-30:  # an entry that overflows where c is 2^-30 counts as infinite
        x = np.clip(x, -c * 2.0**150, c * 2.0**150)
    for method in METHODS:
        check_projection(x, c, l1inf.projection_l1inf_ball(x, c, method=method))


@settings(max_examples=150)
@given(
    column=st.lists(
        st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=6, max_size=6
    ),
    c=st.floats(min_value=2.0**-14, max_value=6e4),
    dtype=st.sampled_from([jnp.float16, jnp.bfloat16]),
)
def test_16_bit_columns_are_projected_to_their_own_rounding(column, c, dtype):
    x = jnp.asarray(column, dtype)[:, None]
    x = jnp.where(jnp.isfinite(x), x, 1)
    w = l1inf.projection_l1inf_ball(x, c)
    assert w.dtype == dtype
    x, w = np.asarray(x, np.float64)[:, 0], np.asarray(w, np.float64)[:, 0]
    assert oracle.norm64(w) <= c
    if untouched(x, c):
        np.testing.assert_array_equal(w, x)
    exact = np.array([float(e) for e in oracle.project(x, c)])
    tolerance = 2 * float(jnp.finfo(dtype).eps) * c + 6 * float(jnp.finfo(dtype).smallest_subnormal)
    assert np.abs(w - exact).max() <= tolerance
    assert (w[exact == 0] == 0).all()


@pytest.mark.parametrize("c", [1.0, 1e3, 5e5])
def test_columns_of_a_million_entries_keep_their_last_bits(c):
    x = np.random.default_rng(0).normal(size=(2**20, 2)).astype(np.float32)
    w = np.asarray(l1inf.projection_l1inf_ball(x, c))
    for j in range(2):
        assert oracle.norm64(w[:, j]) <= c
        assert oracle.norm64(w[:, j]) >= c * (1 - 2e-6)
        assert np.abs(w[:, j] - oracle.project64(x[:, j], c)).max() <= 2 * U * min(c, 20)


@pytest.mark.parametrize("seed", range(3))
def test_a_projected_column_is_inside_for_good(seed):
    x, c = random_columns(np.random.default_rng(100 + seed))
    once = l1inf.projection_l1inf_ball(x, c)
    np.testing.assert_array_equal(l1inf.projection_l1inf_ball(once, c), once)


@pytest.mark.parametrize("start", [0, 1e-3, 1, "metric"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_columns_within_rounding_of_the_sphere_may_move_by_as_much(dtype, start):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(24, 2048)), dtype)
    norms = np.abs(np.asarray(x, np.float64)).sum(0)
    c = (norms * (1 + rng.integers(-3, 20, 2048) * U)).astype(np.float32)
    if start == "metric":
        metric = jnp.asarray(np.exp(rng.normal(size=x.shape)), jnp.float32)
        w = l1inf.projection_l1inf_ball(x, c, metric=metric)
    else:
        guess = jnp.asarray(start * norms / 24, jnp.float32)
        w = project_columns((x,), jnp.asarray(c), (0,), start=guess).parts[0]
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    inside = norms <= c * (1 - 16 * U)
    assert 0.05 < inside.mean() < 0.5
    np.testing.assert_array_equal(w[:, inside], x[:, inside])
    assert (np.abs(w).sum(0) <= c).all()
    # Of its own format, or of the threshold: with a metric that of an entry of the least weight.
    unit = float(jnp.finfo(dtype).eps) * np.abs(x) + 32 * U * c * (50 if start == "metric" else 1)
    assert (np.abs(w - x) <= unit).all()
    assert (w[x == 0] == 0).all()


def test_a_column_does_not_depend_on_its_neighbours():
    x, c = random_columns(np.random.default_rng(12))
    together = np.asarray(l1inf.projection_l1inf_ball(x, c))
    kept = np.arange(64) % 2 == 0
    alone = np.asarray(l1inf.projection_l1inf_ball(np.where(kept, x, 0), c))
    np.testing.assert_array_equal(alone[:, kept], together[:, kept])


def radii_of_every_dtype(shape):
    """The number 2 as Python, NumPy and JAX hold it, of every dtype there is."""
    names = [
        *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"),
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    ]
    arrays = [np.full(shape, 2, jnp.dtype(name)) for name in names]
    return [
        *arrays,
        *(map(jnp.asarray, arrays)),
        *([] if shape else [2, 2.0, *(a[()] for a in arrays)]),
    ]


def check_radii_of_every_dtype(dtypes):
    expected = [[2.0, 0.5], [0.0, 0.25]]
    for dtype in dtypes:
        x = jnp.array([[3.0, 0.5], [1.0, 0.25]], dtype)
        for c in [*radii_of_every_dtype(()), *radii_of_every_dtype((2,))]:
            w = l1inf.projection_l1inf_ball(x, c)
            assert w.dtype == dtype
            np.testing.assert_array_equal(np.asarray(w, np.float64), expected, f"{c!r}")
    for c in map(jnp.asarray, radii_of_every_dtype(())):  # traced; the values are tested below
        w = jax.eval_shape(l1inf.projection_l1inf_ball, x, c)
        assert (w.shape, w.dtype) == (x.shape, x.dtype)


def test_a_radius_of_any_dtype_is_its_value():
    check_radii_of_every_dtype([jnp.float32, jnp.bfloat16])


@pytest.mark.usefixtures("x64")
def test_a_radius_of_any_dtype_is_its_value_in_64_bits_too():
    check_radii_of_every_dtype([jnp.float32, jnp.float64])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_traced_16_bit_radius_is_its_value(dtype, method):
    x = jnp.array([[3.0, 0.5], [1.0, 0.25]])
    project = jax.jit(functools.partial(l1inf.projection_l1inf_ball, method=method))
    np.testing.assert_array_equal(project(x, dtype(2)), [[2.0, 0.5], [0.0, 0.25]])


@pytest.mark.parametrize("c", [259, np.int64(259), jnp.int32(259), jnp.uint8(200)])
def test_an_integer_radius_is_a_radius(c):
    w = l1inf.projection_l1inf_ball(jnp.full((1, 1), 300.0), c)
    assert oracle.norm64(w) == c


def test_16_bit_columns_end_where_their_format_underflows():
    x = jnp.full((97, 1), 3.0694e-33, jnp.bfloat16)
    passes = project_columns((x,), 7.523e-37, (0,)).passes
    assert passes < 16


def test_newton_and_sort_agree():
    x, c = random_columns(np.random.default_rng(7))
    newton, sort = (np.asarray(l1inf.projection_l1inf_ball(x, c, method=m)) for m in METHODS)
    assert (np.abs(newton - sort) <= 4 * U * c).all()


def weights(rng, shape):
    return np.exp(3 * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", [1, 3, 8])
def test_metric_projection_matches_rational_arithmetic(spread, method):
    rng = np.random.default_rng(spread)
    x, c = random_columns(rng)
    c = np.maximum(c, np.abs(x.astype(np.float64)).sum(0) * 1e-6).astype(np.float32)
    d = np.exp(spread * rng.normal(size=x.shape)).astype(np.float32)
    w = np.asarray(l1inf.projection_l1inf_ball(x, c, metric=d, method=method))
    for j in range(x.shape[1]):
        assert oracle.norm64(w[:, j]) <= c[j]
        exact = np.array([float(e) for e in oracle.project(x[:, j], float(c[j]), d[:, j])])
        # As for a metric with other last bits: an error of the size of |v|, and of c.
        error = np.abs(w[:, j] - exact)
        assert (error <= 16 * U * (c[j] + np.abs(x[:, j].astype(np.float64)))).all()


METRIC_CASES = {
    "ratios_of_1e8": ([0.08, 0.005, 0.01], [1e-4, 1e4, 1e-3], 0.0285),
    "near_underflow": ([4e-37, 3e-37, 1e-37], [1, 0.01, 0.1], 4e-37),
    "near_overflow": ([3e38, 2e38, 1e38], [1, 0.01, 0.1], 1e38),
    "adam_without_gradients": ([1.0, -2.0, 0.5, 0.1], [0.1, 1e-8, 1e-8, 0.2], 0.7),
    "tiny_weights_beside_huge_ones": ([3, 1e-3, -5], [1e-7, 1e7, 1.0], 1.0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", METRIC_CASES)
def test_adversarial_metrics(name, method):
    x, d, c = METRIC_CASES[name]
    x, d = np.float32(x)[:, None], np.float32(d)[:, None]
    w = np.asarray(l1inf.projection_l1inf_ball(x, c, metric=d, method=method))[:, 0]
    assert oracle.norm64(w) <= c
    exact = np.array([float(e) for e in oracle.project(x[:, 0], c, d[:, 0])])
    assert np.abs(w - exact).max() <= 16 * U * np.abs(x).max() + 2 * TINY


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_only_ratios_of_the_metric_matter(scale):
    rng = np.random.default_rng(3)
    x, d = rng.normal(size=(50, 20)).astype(np.float32), weights(rng, (50, 20))
    plain = l1inf.projection_l1inf_ball(x, 1.0, metric=d)
    scaled = l1inf.projection_l1inf_ball(x, 1.0, metric=(d * scale).astype(np.float32))
    np.testing.assert_allclose(scaled, plain, atol=8 * U)


def test_metric_of_extreme_ratios_still_gives_a_feasible_column():
    d = np.float32([1e-38, 1e38, 1.0, 1e-20, 1e20])[:, None]
    x = np.float32([3.0, 1e-3, -5.0, 1e20, 1.0])[:, None]
    w = np.asarray(l1inf.projection_l1inf_ball(x, 1.0, metric=d))
    assert np.isfinite(w).all()
    assert oracle.norm64(w) <= 1  # beside 1e20 rounding hides the ball: zero is as right


def test_infinite_entries_share_the_ball():
    x = np.float32([[np.inf, 1, np.inf], [-np.inf, 2, 5], [3, -3, 7]])
    w = np.asarray(l1inf.projection_l1inf_ball(x, 1.0))
    np.testing.assert_array_equal(w, np.float32([[0.5, 0, 1], [-0.5, 0, 0], [0, -1, 0]]))


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_stays_in_its_column(method):
    x = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    clean = np.asarray(l1inf.projection_l1inf_ball(x, 1.0, method=method))
    x[4, 2] = np.nan
    w = np.asarray(l1inf.projection_l1inf_ball(x, 1.0, method=method))
    assert np.isnan(w[:, 2]).all()
    np.testing.assert_array_equal(np.delete(w, 2, 1), np.delete(clean, 2, 1))


def test_an_infinite_radius_leaves_everything_as_it_is():
    x = np.float32([[1e38, -0.0], [np.inf, 3.0]])
    np.testing.assert_array_equal(l1inf.projection_l1inf_ball(x, np.inf), x)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_empty_axes_are_fine(shape, method):
    x = jnp.zeros(shape)
    assert l1inf.projection_l1inf_ball(x, 1.0, method=method).shape == shape
    assert l1inf.l1inf_norm(x) == 0


@pytest.mark.parametrize("n", [11, 1000, 2**16])
def test_newton_ends_within_its_theoretical_number_of_passes(n):
    rng = np.random.default_rng(n)
    slow = np.pad(one_entry_a_pass(11), (0, n - 11))
    columns = [slow, rng.normal(size=n), rng.standard_cauchy(size=n), 1.1 ** -np.arange(n)]
    columns += [rng.random(n) ** -power for power in (0.25, 0.5, 1.0, 2.0)]
    x = jnp.asarray(np.stack(columns, 1), jnp.float32)
    for share in (1e-6, 1e-3, 0.1, 0.9):
        c = share * jnp.abs(x).sum(0)
        passes = project_columns((x,), c, (0,)).passes
        assert passes <= np.log2(n) + 5 + 4, "and four to certify the result"


@pytest.mark.parametrize(
    ("method", "axis"),
    [("newton", axis) for axis in ((), 0, 1, 2, -1, (0, 2), (1, 2), (0, 1, 2), (-1, 0))]
    + [("sort", axis) for axis in (1, (-1, 0), (0, 1, 2))],
)
def test_a_column_runs_along_any_axes(axis, method):
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype(np.float32)
    axes = sorted(a % 3 for a in ((axis,) if isinstance(axis, int) else axis))
    others = [a for a in range(3) if a not in axes]
    columns = x.transpose(*axes, *others).reshape(int(np.prod([x.shape[a] for a in axes])), -1)
    c = np.linspace(0.5, 3, columns.shape[1]).reshape([x.shape[a] for a in others])
    w = np.asarray(l1inf.projection_l1inf_ball(x, c, axis=axis, method=method))
    check_projection(columns, c.ravel(), w.transpose(*axes, *others).reshape(columns.shape))
    norms = np.abs(x.astype(np.float64)).sum(tuple(axes))
    assert float(l1inf.l1inf_norm(x, axis=axis)) == pytest.approx(norms.max(), rel=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_norm_is_correctly_rounded(dtype):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5000, 7)), dtype)
    exact = max(oracle.norm64(np.asarray(x, np.float64)[:, j]) for j in range(7))
    norm = jax.jit(l1inf.l1inf_norm)(x)
    assert norm.dtype == jnp.float32
    assert abs(float(norm) - exact) <= 2 * U * exact


def test_norm_of_a_projection_never_reads_more_than_the_radius():
    x, c = random_columns(np.random.default_rng(11))
    w = np.asarray(l1inf.projection_l1inf_ball(x, c))
    for j in range(x.shape[1]):
        assert l1inf.l1inf_norm(w[:, j]) <= c[j]


def test_norm_has_the_subgradient_of_the_largest_column():
    x = jnp.array([[1.0, -3.0], [-2.0, 4.0]])
    np.testing.assert_array_equal(jax.grad(l1inf.l1inf_norm)(x), [[0, -1], [0, 1]])


# --- found by tests/programs/fuzz_projection.py ---------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_infinite_entries_share_the_ball_in_any_format_and_metric(dtype, weighted, method):
    counts = np.arange(1, 25)
    x = np.where(np.arange(24)[:, None] < counts, np.inf, 3.0)
    d = np.exp(3 * np.random.default_rng(0).normal(size=x.shape)) if weighted else None
    for c in (1e-38, 0.07, 3.3, 7e4, 1e30):
        w = l1inf.projection_l1inf_ball(
            jnp.asarray(x, dtype), c, method=method, metric=None if d is None else jnp.asarray(d)
        )
        w = np.asarray(w, np.float64)
        assert (w.sum(0) <= c).all()
        share = np.minimum(c / counts, float(jnp.finfo(dtype).max)) * (x == np.inf)
        least = 24 * float(jnp.finfo(dtype).smallest_subnormal) + TINY
        some = (8 if weighted else 4) * float(jnp.finfo(dtype).eps)
        assert (np.abs(w - share) <= some * c + least).all()


@pytest.mark.parametrize("c", [0.07, 1e-20])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_nan_beside_an_infinity_stays_a_nan(weighted, c):
    x = jnp.asarray([[np.inf, 1.0], [np.nan, 2.0], [1.0, 3.0]] * 8)
    w = l1inf.projection_l1inf_ball(x, c, metric=jnp.ones_like(x) if weighted else None)
    np.testing.assert_array_equal(np.isnan(w), [[True, False]] * 24)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", [np.inf, np.nan, 1e38, -1.0])
def test_a_search_may_start_from_anything(start, weighted):
    x, c = random_columns(np.random.default_rng(13))
    metric = (jnp.asarray(weights(np.random.default_rng(1), x.shape)),) if weighted else None
    plain, started = (
        project_columns((jnp.asarray(x),), c, (0,), metric=metric, start=start)
        for start in (None, jnp.full(64, start, jnp.float32))
    )
    size = c + np.abs(x).max(0) if weighted else c
    assert (np.abs(plain.parts[0] - started.parts[0]) <= 16 * U * size).all()


def test_a_subnormal_bfloat16_column_outside_its_ball_does_not_stay_there():
    x = jnp.full((24, 1), 2.0**-130, jnp.bfloat16)
    w = np.asarray(l1inf.projection_l1inf_ball(x, 2.0**-126), np.float64)
    assert oracle.norm64(w) <= 2.0**-126


def test_subnormal_entries_alone_can_be_outside_their_ball():
    x = np.full((24, 1), 2.0**-128, np.float32)
    np.testing.assert_array_equal(l1inf.projection_l1inf_ball(x, 2.0**-126), 0 * x)


@pytest.mark.parametrize("method", METHODS)
def test_a_weighted_column_beyond_any_precision_is_feasible(method):
    rng = np.random.default_rng(0)
    x = np.float32(1e30 * (1 + 1e-6 * rng.normal(size=(24, 64))))
    w = l1inf.projection_l1inf_ball(x, 2.0**-126, metric=weights(rng, x.shape), method=method)
    assert (np.asarray(w, np.float64).sum(0) <= 2.0**-126).all()


# --- float64, derivatives, transformations --------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_float64_columns_are_projected_to_float64_rounding(method):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 16)) * 10.0 ** rng.uniform(-200, 200, size=16)
    c = np.abs(x).sum(0) * 10.0 ** rng.uniform(-9, 0.1, size=16)
    w = np.asarray(l1inf.projection_l1inf_ball(x, c, method=method))
    assert w.dtype == np.float64
    for j in range(16):
        exact = oracle.project(x[:, j], c[j])
        error = max(abs(e - oracle.Fraction(y)) for e, y in zip(exact, w[:, j], strict=True))
        assert sum(oracle.Fraction(abs(y)) for y in w[:, j]) <= oracle.Fraction(c[j])
        assert float(error / oracle.Fraction(c[j])) <= 4 * 2.0**-53


@pytest.mark.usefixtures("x64")
def test_a_traced_float64_radius_is_respected_by_float32_columns():
    x = np.random.default_rng(0).uniform(size=(3, 4096)).astype(np.float32)
    norm = x.astype(np.float64).sum(0)
    project = jax.jit(l1inf.projection_l1inf_ball)
    for ulps in (-8, -1, 0, 1):
        c = norm + ulps * np.spacing(norm)
        w = np.asarray(project(x, jnp.asarray(c)))
        assert (w.astype(np.float64).sum(0) <= c).all()
    w = project(x, jnp.asarray(norm * (1 + 16 * U)))
    np.testing.assert_array_equal(w, x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("weighted", "method"), [(False, "newton"), (True, "newton"), (True, "sort")]
)
def test_derivatives_match_finite_differences(method, weighted):
    rng = np.random.default_rng(9)
    x = rng.normal(size=(12, 4))
    c = jnp.array([0.5, 1.0, 3.0, 100.0])  # the last column stays inside
    metric = jnp.exp(rng.normal(size=x.shape)) if weighted else None

    def project(x, c, metric):
        return l1inf.projection_l1inf_ball(x, c, metric=metric, method=method)

    check_grads(project, (x, c, metric), order=1, modes=["fwd", "rev"], eps=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(project, x, c, tangent):
    _, forward = jax.jvp(lambda x: project(x, c), (x,), (tangent,))
    return forward, jax.grad(lambda x: project(x, c) @ tangent)(x)


@pytest.mark.parametrize("c", [0.7, 5.0, 1e3])
def test_derivative_of_one_column_is_that_of_the_optax_projection(c):
    x = jnp.asarray(np.random.default_rng(4).normal(size=30).astype(np.float32))
    tangent = jnp.asarray(np.random.default_rng(5).normal(size=30).astype(np.float32))

    ours = derivatives(l1inf.projection_l1inf_ball, x, c, tangent)
    theirs = derivatives(optax.projections.projection_l1_ball, x, c, tangent)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_derivative_in_the_radius_is_the_signs_over_the_supports_size():
    x = jnp.array([3.0, -2.0, 0.1, 0.0])
    derivative = jax.jit(jax.jacobian(lambda c: l1inf.projection_l1inf_ball(x, c)))(1.5)
    np.testing.assert_allclose(derivative, [0.5, -0.5, 0, 0])


def test_second_derivatives_vanish_away_from_kinks():
    x = jnp.asarray(np.random.default_rng(4).normal(size=6).astype(np.float32))
    hessian = jax.jit(jax.hessian(lambda x: l1inf.projection_l1inf_ball(x, 1.0).sum()))(x)
    np.testing.assert_array_equal(hessian, np.zeros((6, 6)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_derivatives_keep_16_bit_dtypes(dtype):
    x = jnp.array([3.0, -2.0, 0.1], dtype)
    gradient = jax.jit(jax.grad(lambda x: l1inf.projection_l1inf_ball(x, 1.0)[0]))(x)
    assert gradient.dtype == dtype


@jax.jit
def jacobian(x, c, metric):
    return jax.jacobian(lambda x: l1inf.projection_l1inf_ball(x, c, metric=metric))(x)


@pytest.mark.parametrize(
    ("x", "d", "c"),
    [
        ([3.0, 2.0, 1.0], [0.01, 1e3, 6e4], 2.5),
        ([3.0, 2.0, 1.0], [1e-3, 3e3, 6e4], 2.5),
        ([0.1, 2.0, 1.9], [1e-6, 3e4, 3e4], 1.0),
    ],
)
def test_derivatives_with_a_16_bit_metric_are_those_with_its_values_in_32_bits(x, d, c):
    x, d = jnp.array(x), jnp.array(d, jnp.float16)

    got, expected = (jacobian(x, c, d) for d in (d, d.astype(jnp.float32)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # On the sphere: what one entry of the support gains the others lose.
    np.testing.assert_allclose(got.sum(0), 0, atol=1e-6)


def test_vmap_over_matrices_and_radii_is_the_loop():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 20, 5)).astype(np.float32))
    c = jnp.array([0.5, 2.0, 100.0])
    batched = jax.vmap(l1inf.projection_l1inf_ball)(x, c)
    for xi, ci, wi in zip(x, c, batched, strict=True):
        np.testing.assert_array_equal(wi, l1inf.projection_l1inf_ball(xi, ci))
    over_c = jax.vmap(l1inf.projection_l1inf_ball, in_axes=(None, 0))(x[0], c)
    for ci, wi in zip(c, over_c, strict=True):
        np.testing.assert_array_equal(wi, l1inf.projection_l1inf_ball(x[0], ci))


def test_scan_and_ahead_of_time_compilation_give_the_same_bits():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 20, 5)).astype(np.float32))
    project = lambda x: l1inf.projection_l1inf_ball(x, 1.0)  # noqa: E731
    expected = jnp.stack([project(xi) for xi in x])
    _, scanned = jax.lax.scan(lambda carry, xi: (carry, project(xi)), None, x)
    np.testing.assert_array_equal(scanned, expected)
    compiled = jax.jit(project).lower(x[0]).compile()
    np.testing.assert_array_equal(compiled(x[0]), expected[0])


def test_columns_split_over_arrays_of_two_dtypes_are_one_column():
    rng = np.random.default_rng(8)
    kernel = jnp.asarray(rng.normal(size=(30, 4)), jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)
    w_bias, w_kernel = project_columns((bias, kernel), 1.0, (0,)).parts
    assert (w_bias.dtype, w_kernel.dtype) == (jnp.float32, jnp.bfloat16)
    whole = np.vstack([np.asarray(w_bias, np.float64), np.asarray(w_kernel, np.float64)])
    assert (np.abs(whole).sum(0) <= 1).all()
    joined = jnp.vstack([bias, kernel.astype(jnp.float32)])
    np.testing.assert_allclose(whole, l1inf.projection_l1inf_ball(joined, 1.0), atol=2.0**-8)


# --- wrong use ------------------------------------------------------------------------------------

X = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("arguments", "keywords", "names"),
    [
        ((X, 0.0), {}, ("c=0.0", "not positive")),
        ((X, -1), {}, ("c=-1", "not positive")),
        ((X, np.nan), {}, ("c=nan", "not positive")),
        ((X, None), {}, ("c=None", "a NoneType, not a number")),
        ((X, "1.0"), {}, ("c='1.0'", "a str, not a number")),
        ((X, 1j), {}, ("c=1j", "a complex, not a number")),
        ((X, {"w": X}), {}, ("a dict, not a number",)),
        (({"w": X}, 1.0), {}, ("x is a dict", "project_params(params, c)")),
        ((object(), 1.0), {}, ("x is a object", "project_params(params, c)")),
        ((X, -np.ones((200, 2))), {}, ("c=float64[200,2] is not positive",)),
        ((X, np.array([1.0, -1.0])), {}, ("c=", "not positive")),
        ((X, jnp.array(-2.0)), {}, ("c=", "-2", "not positive")),
        ((X, np.ones(3)), {}, ("c has shape (3,)", "(2,)")),
        ((X, 1.0), {"method": "bisect"}, ("method='bisect'", "newton", "sort")),
        ((X, 1.0), {"axis": 2}, ("axis=2", "out of range")),
        ((X, 1.0), {"axis": (0, -2)}, ("axis=(0, -2)", "twice")),
        ((X, 1.0), {"axis": None}, ("axis=None", "not an int")),
        ((X, 1.0), {"axis": 0.5}, ("axis=0.5", "not an int")),
        ((np.ones((3, 2), np.int32), 1.0), {}, ("int32", "convert")),
        ((np.ones((3, 2), bool), 1.0), {}, ("bool", "convert")),
        ((X, 1.0), {"metric": np.ones((2, 2), np.float32)}, ("metric", "(2, 2)", "(3, 2)")),
        ((X, 1.0), {"metric": np.ones((3, 2), int)}, ("metric", "int")),
    ],
)
def test_wrong_use_is_an_error_that_names_it(arguments, keywords, names):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, names))):
        l1inf.projection_l1inf_ball(*arguments, **keywords)


def test_norm_refuses_integers_and_wrong_axes():
    with pytest.raises(ValueError, match="int32"):
        l1inf.l1inf_norm(jnp.ones((2, 2), jnp.int32))
    for axis in (2, -3, (0, 5)):
        with pytest.raises(ValueError, match="out of range"):
            l1inf.l1inf_norm(jnp.ones((2, 2)), axis=axis)
