"""The simulated data have the moments that the paper's Sections 5.1 and 5.2 state."""

import jax
import numpy as np
import pytest

from l1inf_optax.experiments.data import synthetic

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def beta():
    return np.asarray(synthetic.coefficients(KEY), np.float64)


@pytest.fixture(scope="module")
def regression(beta):
    x, y = synthetic.regression(jax.random.key(1), beta.astype(np.float32), 4000)
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


@pytest.fixture(scope="module")
def classification():
    x, y = synthetic.classification(KEY, 4000)
    return np.asarray(x, np.float64), np.asarray(y)


def test_a_hundred_coefficients_are_uniform_and_the_others_zero(beta):
    assert beta.shape == (1000,)
    relevant, others = beta[:100], beta[100:]
    assert (others == 0).all()
    assert 0.15 <= relevant.min() < 0.25
    assert 1.4 < relevant.max() <= 1.5
    assert relevant.mean() == pytest.approx(0.825, abs=0.12)


def test_neighbouring_inputs_of_the_regression_correlate(regression):
    x, _ = regression
    assert x.shape == (4000, 1000)
    covariance = np.cov(x, rowvar=False)
    variances = np.diagonal(covariance)
    assert variances[0] == pytest.approx(1.0, abs=0.1)
    assert variances[1:].mean() == pytest.approx(1 + 2 * 0.2**2, abs=0.01)
    assert variances[-1] == pytest.approx(1.08, abs=0.1)
    assert covariance[0, 1] == pytest.approx(0.2, abs=0.07)
    means = [np.diagonal(covariance, lag)[2:].mean() for lag in (1, 2, 3)]
    np.testing.assert_allclose(means, [0.4, 0.04, 0.0], atol=0.01)


def test_the_target_is_linear_with_noise_of_variance_one(regression, beta):
    x, y = regression
    noise = y - x @ beta
    assert noise.mean() == pytest.approx(0.0, abs=0.06)
    assert noise.var() == pytest.approx(1.0, abs=0.1)
    assert 110 < y.var() < 190


def test_any_two_inputs_of_the_classification_correlate_by_a_half(classification):
    # Of the irrelevant ones: choosing as many of each class leaves alpha with about its variance.
    x, _ = classification
    assert x.shape == (4000, 500)
    covariance = np.cov(x[:, 4:], rowvar=False)
    alpha = 4 * (covariance.sum() - np.trace(covariance)) / (496 * 495)
    assert alpha == pytest.approx(1.0, abs=0.35)
    own = np.diagonal(covariance) - alpha / 4
    assert own.mean() == pytest.approx(0.25, abs=0.01)


def test_the_papers_rule_decides_the_class(classification):
    x, y = classification
    score = np.exp(x[:, 0]) + x[:, 1] ** 2 + 5 * np.sin(x[:, 2] * x[:, 3]) - 3
    clear = np.abs(score) > 1e-4
    np.testing.assert_array_equal(y[clear], score[clear] > 0)


def test_irrelevant_inputs_belong_to_their_own_sample(classification):
    x, _ = classification
    alpha = 2 * x[:, 4:].mean(axis=1)
    for j in range(4):
        rest = x[:, j] - alpha / 2
        assert rest.var() == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("n", [1, 2, 7, 500])
def test_classes_are_balanced_for_any_number_of_samples(n):
    _, y = synthetic.classification(KEY, n)
    assert y.shape == (n,)
    assert int(y.sum()) == n // 2


def test_classes_come_in_random_order():
    _, y = synthetic.classification(KEY, 1000)
    assert 300 < int((y[1:] != y[:-1]).sum()) < 700


def test_the_key_decides_everything():
    for sample in (
        lambda key: synthetic.classification(key, 20)[0],
        lambda key: synthetic.regression(key, synthetic.coefficients(KEY), 20)[0],
        synthetic.coefficients,
    ):
        np.testing.assert_array_equal(sample(KEY), sample(KEY))
        assert (np.asarray(sample(KEY)) != np.asarray(sample(jax.random.key(5)))).any()


def test_a_trial_trains_and_tests_on_different_samples_of_one_problem():
    train, test = synthetic.regression_trial(KEY)
    x, y, x_test, y_test = (np.asarray(a, np.float64) for a in (*train, *test))
    assert (x.shape, x_test.shape) == ((500, 1000), (1500, 1000))
    beta, *_ = np.linalg.lstsq(x_test[:, :100], y_test, rcond=None)
    assert 0.8 < np.mean((x[:, :100] @ beta - y) ** 2) < 1.4
    assert not np.isin(x[:, 0], x_test[:, 0]).any()
    (x, y), (x_test, y_test) = synthetic.classification_trial(KEY)
    assert (x.shape, x_test.shape) == ((500, 500), (1000, 500))
    assert (y.shape, y_test.shape) == ((500,), (1000,))
    assert not np.isin(x[:, 0], x_test[:, 0]).any()
