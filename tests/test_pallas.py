import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from l1inf_optax import _pallas, _projection
from tests import oracle
from tests.test_projection import CASES, check_projection, random_columns, untouched

BLOCK = {"block_rows": 16, "block_columns": 8, "interpret": True}
NONSENSE = [np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-30, 1e30, 3e38]

attempt = jax.jit(lambda x, c, start=None: _pallas.attempt(x, c, start, **BLOCK))
project = jax.jit(lambda x, c, start=None: _pallas.project(x, c, start, interpret=True))
exact = jax.jit(lambda x, c: _projection.project_columns((x,), c, (0,)))


def ordinary_columns(seed, n=45, m=19):
    """Columns whose norms and radii are of ordinary size, a quarter of them inside their balls."""
    rng = np.random.default_rng(seed)
    x = rng.standard_cauchy(size=(n, m)) * (rng.random((n, m)) < 0.7)
    x[:, ::3] = rng.normal(size=x[:, ::3].shape)
    x = (x * 10.0 ** rng.uniform(-3, 3, size=m)).astype(np.float32)
    share = np.where(np.arange(m) % 4 == 0, 1.5, 10 ** rng.uniform(-4, -0.01, size=m))
    return x, (np.abs(x).sum(0) * share + 1e-6).astype(np.float32)


def adversarial_columns():
    """All named cases in one matrix, in which zeros follow shorter columns."""
    x = np.zeros((max(len(column) for column, _ in CASES.values()), len(CASES)), np.float32)
    for j, (column, _) in enumerate(CASES.values()):
        x[: len(column), j] = column
    return x, np.array([c for _, c in CASES.values()])


def decided_columns(x, c, a):
    """The columns the kernel has decided, which is to be most of them."""
    decided = ~np.asarray(a.undecided)
    assert decided.mean() > 0.5
    return np.asarray(x)[:, decided], np.asarray(c)[decided], np.asarray(a.projected)[:, decided]


def test_adversarial_columns_are_projected_exactly():
    x, c = adversarial_columns()
    check_projection(*decided_columns(x, c, _pallas.attempt(jnp.asarray(x), c, **BLOCK)))
    check_projection(x, c, _pallas.project(jnp.asarray(x), c, interpret=True)[0])


@pytest.mark.parametrize("seed", range(3))
def test_random_columns_are_projected_exactly(seed):
    x, c = random_columns(np.random.default_rng(seed))
    check_projection(x, c, project(x, c)[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_decides_ordinary_columns_alone(seed):
    x, c = ordinary_columns(seed)
    cold = attempt(x, c)
    assert not cold.undecided.any()
    check_projection(x, c, cold.projected)
    for start in (cold.threshold, 0.9 * cold.threshold, 1.1 * cold.threshold):
        warm = attempt(x, c, start)
        assert not warm.undecided.any()
        check_projection(x, c, warm.projected)


@pytest.mark.parametrize("start", NONSENSE)
def test_nonsense_starts_change_nothing_but_last_bits(start):
    x, c = ordinary_columns(5)
    a = attempt(x, c, jnp.full(c.shape, start, jnp.float32))
    assert not a.undecided.any()
    check_projection(x, c, a.projected)


def test_thresholds_are_those_of_the_xla_path():
    x, c = ordinary_columns(6)
    theta, reference = attempt(x, c).threshold, exact(x, c).threshold
    np.testing.assert_array_equal(theta == 0, reference == 0)
    np.testing.assert_allclose(theta, reference, atol=4e-7 * np.abs(x).max())


@pytest.mark.parametrize("start", [None, 0.5])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bit_columns_are_projected_to_their_own_rounding(dtype, start):
    rng = np.random.default_rng(8)
    # Ties as well: as many survivors round alike, and all at once.
    x = np.concatenate([rng.normal(size=(45, 16)), rng.integers(-2, 3, size=(45, 8))], 1)
    x, c = jnp.asarray(x, dtype), jnp.asarray(10 ** rng.uniform(-3, 2, size=24), jnp.float32)
    a = attempt(x, c, None if start is None else jnp.full(24, start))
    assert not a.undecided.any()
    assert a.projected.dtype == dtype
    x, w = np.asarray(x, np.float64), np.asarray(a.projected, np.float64)
    info = jnp.finfo(dtype)
    for j, radius in enumerate(np.asarray(c, np.float64)):
        assert oracle.norm64(w[:, j]) <= radius
        if untouched(x[:, j], radius):
            np.testing.assert_array_equal(w[:, j], x[:, j])
            continue
        want = np.array([float(e) for e in oracle.project(x[:, j], radius)])
        tolerance = 2 * float(info.eps) * radius + 6 * float(info.smallest_subnormal)
        assert np.abs(w[:, j] - want).max() <= tolerance
        assert (w[want == 0, j] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_projected_column_is_inside_for_good(dtype):
    x, _ = ordinary_columns(9)
    once = attempt(jnp.asarray(np.clip(x, -1e4, 1e4), dtype), 3.0)
    twice = attempt(once.projected, 3.0)
    assert not (once.undecided | twice.undecided).any(), "the slow path is not for every step"
    assert not twice.threshold.any()
    np.testing.assert_array_equal(twice.projected, once.projected)


def test_the_sign_of_a_zero_inside_the_ball_is_kept():
    x = jnp.asarray([[-0.0, 2.0], [0.25, -0.0]])
    w = np.asarray(attempt(x, 1.0).projected)
    np.testing.assert_array_equal(np.signbit(w), [[True, False], [False, False]])


def test_nans_and_infinities_are_left_to_the_xla_path():
    x, _ = ordinary_columns(10)
    x[3, 2], x[5, 4], x[6, 4], x[7, 11] = np.nan, np.inf, -np.inf, -np.inf
    odd = ~np.isfinite(x).all(0)
    np.testing.assert_array_equal(attempt(x, 1.0).undecided, odd)
    w, theta = project(x, 1.0)
    reference = exact(x, 1.0)
    np.testing.assert_array_equal(w[:, odd], reference.parts[0][:, odd])
    np.testing.assert_array_equal(theta[odd], reference.threshold[odd])
    clean = project(np.where(odd, 0, x), 1.0)[0]
    np.testing.assert_array_equal(w[:, ~odd], clean[:, ~odd])


def test_long_columns_keep_their_last_bits():
    x = np.random.default_rng(0).normal(size=(2**14 + 1, 2)).astype(np.float32)
    for c in (1.0, 3e3):
        a = _pallas.attempt(jnp.asarray(x), c, block_columns=2, interpret=True)
        assert not a.undecided.any()
        for j in range(2):
            w = np.asarray(a.projected[:, j], np.float64)
            assert c * (1 - 1e-6) <= oracle.norm64(w) <= c
            assert np.abs(w - oracle.project64(x[:, j], c)).max() <= 2.0**-23 * min(c, 20)


def test_radii_of_any_size_and_of_float64_are_kept():
    x = np.float32([0.1, 0.7, -0.3])[:, None] * np.ones((1, 5), np.float32)
    norm = float(np.abs(x[:, 0].astype(np.float64)).sum())
    c = np.array([norm, norm * (1 - 2.0**-50), 1e-12, 1e25, np.inf])
    w = np.asarray(_pallas.project(jnp.asarray(x), c, interpret=True)[0])
    check_projection(x[:, :4], c[:4], w[:, :4])
    np.testing.assert_array_equal(w[:, 4], x[:, 4])


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_triton_knows_all_the_kernel_says(dtype):
    x, start = jax.ShapeDtypeStruct((4097, 100), dtype), jax.ShapeDtypeStruct((100,), jnp.float32)
    # A GPU that need not be there; the platform's field is newer than JAX 0.8.
    described = ("NVIDIA A100", None, "gpu")[: len(dataclasses.fields(AbstractDevice))]
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(*described))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda x, start: _pallas.project(x, 1.0, start)).trace(x, start)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "x", [jnp.ones(3), jnp.ones((0, 3)), jnp.ones((2, 2), int)], ids=["vector", "empty", "integer"]
)
def test_what_is_no_matrix_of_floats_is_an_error(x):
    with pytest.raises(ValueError, match=r"x has shape .* give a matrix"):
        _pallas.project(x, 1.0, interpret=True)


@pytest.mark.parametrize("c", [0, -1.0, np.ones(2)])
def test_a_radius_that_is_none_is_an_error(c):
    with pytest.raises(ValueError, match=r"^c"):
        _pallas.project(jnp.ones((2, 3)), c, interpret=True)
