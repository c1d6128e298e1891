"""The simulated data of the paper's Sections 5.1 and 5.2, as pure functions of a random key.

Both sections have misprints. They are read so that the paper's own tables come out:

- Section 5.1 prints beta ~ Unif(0.15, 150). Targets would then have a variance of about a million,
  and no test error in Table 1 would make sense; with Unif(0.15, 1.50) they have one of about 150,
  and an unconstrained network the test error of Table 1. It is 1.50 here.
- x_1000 needs z_1001, so there are 1001 auxiliary variables.
- Section 5.2 draws alpha once: here once for each sample, which correlates any two inputs by 1/2.
  Drawn once for all samples it would only shift the data.
- The rule of Section 5.2 labels about 35% of the samples 1. Table 3 shows an accuracy of 50.0% for
  models that have collapsed to a constant, which takes balanced classes: half of the samples each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

REGRESSION_INPUTS = 1000
RELEVANT = 100  # inputs that the target of the regression depends on
CLASSIFICATION_INPUTS = 500
SAMPLES = 500  # to train on, in both

Sample = tuple[jax.Array, jax.Array]  # inputs and targets
Trial = tuple[Sample, Sample]  # to train on, to test on


def regression_trial(key: jax.Array) -> Trial:
    """Section 5.1's data for one trial: new coefficients, 500 samples to train, 1,500 to test."""
    key_beta, key_train, key_test = jax.random.split(key, 3)
    beta = coefficients(key_beta)
    return regression(key_train, beta, SAMPLES), regression(key_test, beta, 1500)


def classification_trial(key: jax.Array) -> Trial:
    """Section 5.2's data for one trial: 500 samples to train, 1,000 to test."""
    key_train, key_test = jax.random.split(key)
    return classification(key_train, SAMPLES), classification(key_test, 1000)


def trials(sample: Callable[[jax.Array], Trial], seed: int, number: int) -> Trial:
    """Training and test data of many trials.

    Args:
        sample: `regression_trial` or `classification_trial`.
        seed: fixes all of them.
        number: of trials, which every array has as a leading axis.
    """
    return jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(seed), number))


def coefficients(key: jax.Array) -> jax.Array:
    """The regression's coefficients: Unif(0.15, 1.50) for the first 100 inputs, 0 for the others.

    Args:
        key: fixes them.

    Returns:
        ``(1000,)`` float32.
    """
    relevant = jax.random.uniform(key, (RELEVANT,), minval=0.15, maxval=1.50)
    return jnp.pad(relevant, (0, REGRESSION_INPUTS - RELEVANT))


def regression(key: jax.Array, beta: jax.Array, n: int) -> Sample:
    """Samples of Section 5.1: neighbouring inputs correlate, the target is linear plus noise.

    With z from N(0, I), ``x_1 = z_1`` and ``x_j = z_j + 0.2 (z_{j-1} + z_{j+1})`` for j from 2 on;
    y is from ``N(x^T beta, 1)``.

    Args:
        key: fixes the samples.
        beta: the coefficients, as `coefficients` draws them.
        n: how many samples.

    Returns:
        ``(n, 1000)`` inputs and ``(n,)`` targets, float32.
    """
    key_z, key_noise = jax.random.split(key)
    z = jax.random.normal(key_z, (n, REGRESSION_INPUTS + 1))
    inner = z[:, 1:-1] + 0.2 * (z[:, :-2] + z[:, 2:])
    x = jnp.concatenate([z[:, :1], inner], axis=1)
    return x, x @ beta + jax.random.normal(key_noise, (n,))


def classification(key: jax.Array, n: int) -> Sample:
    """Samples of Section 5.2: four of 500 correlated inputs decide between two classes.

    For each sample alpha is from N(0, 1) and every input from N(alpha / 2, 1 / 4). Its class is 1
    where ``exp(x_1) + x_2^2 + 5 sin(x_3 x_4) > 3``. Half of the samples, rounded down, have it.

    Candidates are drawn with no more than alpha and those four inputs; the first of either class
    are taken, in random order, and get the other inputs. So few are needed of so many that they
    run out with a probability below 1e-9.

    Args:
        key: fixes the samples.
        n: how many samples.

    Returns:
        ``(n, 500)`` inputs, float32, and ``(n,)`` classes, int32.
    """
    key_alpha, key_four, key_order, key_rest = jax.random.split(key, 4)
    candidates = 6 * n + 200
    alpha = jax.random.normal(key_alpha, (candidates, 1))
    four = alpha / 2 + jax.random.normal(key_four, (candidates, 4)) / 2
    y = _label(four)
    ones_last = jnp.argsort(y, stable=True)
    chosen = jnp.concatenate([ones_last[: n - n // 2], ones_last[candidates - n // 2 :]])
    chosen = jax.random.permutation(key_order, chosen)
    rest = jax.random.normal(key_rest, (n, CLASSIFICATION_INPUTS - 4)) / 2
    return jnp.concatenate([four[chosen], alpha[chosen] / 2 + rest], axis=1), y[chosen]


def _label(x: jax.Array) -> jax.Array:
    score = jnp.exp(x[:, 0]) + x[:, 1] ** 2 + 5 * jnp.sin(x[:, 2] * x[:, 3])
    return (score > 3).astype(jnp.int32)
