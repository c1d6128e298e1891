r"""The paper's theory as functions, and a certificate for a trained network.

Theorem 1 bounds the Rademacher complexity of networks whose hidden layers lie in L1,inf balls,
Theorems 2 and 3 the distance between their risk on the sample and on new data. The proofs, the
constants the paper leaves open, and what it takes to apply them are in ``docs/theory.md``.

All bounds are built from the *levels*: ``s_j``, for j = 0 to k, is the product of ``rho c`` over
the last j hidden layers, ``(c rho)^j`` for a single c. It is by how much a signal that enters
there can have grown when it reaches the output layer. With ``P = max_j s_j``, ``(c rho)^k`` or 1,
whichever is larger, and o = 1, the complexity times ``sqrt(n)`` is at most

1. ``sqrt((k + 1) log 16) (sum_j s_j + s_k) + s_k sqrt(2 log(2 m1))``, Theorem 1's first display;
2. ``P (sqrt((k + 3) log 4) + sqrt(2 log(2 m1)))``, its second;
3. ``P sqrt(2 log(2^(k+1) (m1 + 2) - 2))``, which is never above 2.

Everything is summed up in logarithms, as powers of c overflow in deep networks.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from l1inf_optax import _layers
from l1inf_optax._layers import Layer, Layers
from l1inf_optax._projection.arguments import brief, check_radius

__all__ = [
    "Certificate",
    "GapBound",
    "certificate",
    "classification_bound",
    "rademacher_bound",
    "regression_bound",
]


def rademacher_bound(
    *,
    n: ArrayLike,
    m1: ArrayLike,
    k: int,
    c: ArrayLike,
    o: ArrayLike,
    rho: ArrayLike = 1.0,
    display: int | None = None,
) -> jax.Array:
    r"""Theorem 1: the empirical Rademacher complexity of networks in L1,inf balls.

    Holds for every sample in :math:`[-1, 1]^{m_1}`, every width, and every activation that is
    ``rho``-Lipschitz and 0 at 0. Differentiable in all arguments but ``k`` and ``display``.

    Args:
        n: Number of samples.
        m1: Number of inputs.
        k: Number of hidden layers, 0 or more.
        c: Normalization constant: the largest L1,inf norm of a hidden layer, bias included. Or
            ``(k,)``, one for each hidden layer, the one next to the inputs first.
        o: The largest L1 norm of the output layer, bias included; it has one output.
        rho: Lipschitz constant of the activation.
        display: 1 or 2 for the paper's first or second display, as printed. The second needs
            c rho >= 1; below, it is that of c rho = 1. By default the smallest bound proved in
            ``docs/theory.md``, never above either.

    Returns:
        A scalar; ``inf`` if it is too large for its dtype.

    Raises:
        ValueError: An argument that is known now (not traced) is out of its range.

    Example:
        >>> from l1inf_optax import bounds
        >>> for display in (1, 2, None):
        ...     print(bounds.rademacher_bound(n=500, m1=1000, k=1, c=1, o=1, display=display))
        0.490...
        0.279...
        0.182...
    """
    _check_sample(n, m1)
    _check("o", o, lambda o: o >= 0, "the largest L1 norm of the output layer, 0 or more")
    return jnp.exp(jnp.log(jnp.asarray(o, float)) + _log_complexity(n, m1, k, c, rho, display))


def regression_bound(
    *,
    n: ArrayLike,
    m1: ArrayLike,
    k: int,
    c: ArrayLike,
    norm: ArrayLike,
    delta: ArrayLike,
    rho: ArrayLike = 1.0,
    B0: ArrayLike = 1.0,
    lipschitz: ArrayLike | None = None,
    display: int | None = None,
) -> jax.Array:
    r"""Theorem 2: how far the risk of a regression can be from its mean over the sample.

    With probability at least ``1 - delta`` over an i.i.d. sample (A1) it holds for all networks
    whose hidden layers have L1,inf norms of at most ``c``, at once, each with its own ``norm``.
    The loss has to lie between 0 and ``B0``: the paper's :math:`|L| \le B_0` is not enough
    (``docs/theory.md`` has a counterexample).

    Args:
        n: Number of samples.
        m1: Number of inputs, all in [-1, 1].
        k: Number of hidden layers, 0 or more (A2).
        c: Normalization constant, chosen before the data are seen (A2); as in
            :func:`rademacher_bound`.
        norm: :math:`\|T_{k+1}\|_1`, the L1 norm of the output layer, bias included.
        delta: Probability that the bound fails.
        rho: Lipschitz constant of the activation.
        B0: The largest value of the loss, and its Lipschitz constant (A3 and Remark 4).
        lipschitz: The loss's Lipschitz constant in the network's output if it is not ``B0``.
        display: As in :func:`rademacher_bound`. With 2 this is equation (3.1) as printed.

    Returns:
        A scalar.

    Raises:
        ValueError: An argument that is known now (not traced) is out of its range.

    Example:
        >>> from l1inf_optax import bounds
        >>> print(bounds.regression_bound(n=100_000, m1=20, k=1, c=1, norm=1, delta=0.05))
        0.0431...
    """
    _check_sample(n, m1)
    _check_delta(delta)
    _check("norm", norm, lambda norm: norm >= 0, "the L1 norm of the output layer")
    lipschitz = B0 if lipschitz is None else lipschitz
    for name, value in {"B0": B0, "lipschitz": lipschitz}.items():
        _check(name, value, lambda value: value > 0, f"a positive constant: A3 holds of L / {name}")
    output = _regression_output(jnp.asarray(norm, float), B0, lipschitz)
    return jnp.exp(_log_terms(n, m1, k, c, rho, delta, output, display)).sum()


def classification_bound(
    *,
    n: ArrayLike,
    m1: ArrayLike,
    m2: ArrayLike,
    k: int,
    c: ArrayLike,
    norm_1_1: ArrayLike,
    norm_1_inf: ArrayLike,
    delta: ArrayLike,
    rho: ArrayLike = 1.0,
) -> jax.Array:
    r"""Theorem 3 with explicit constants: how far the cross entropy can be from its sample mean.

    With probability at least ``1 - delta`` over an i.i.d. sample (B1) it holds for all networks
    whose hidden layers have L1,inf norms of at most ``c``, at once, each with its own norms. With
    R the complexity that :func:`rademacher_bound` gives for o = 1, but with ``m2`` times as many
    signals in the logarithm, and w the range of the loss,

    .. math:: w \sqrt{\frac{\log(2 / \delta) + 2 \log(\|T_{k+1}\|_{1,1} + 2)
                            + 2 \log(\|T_{k+1}\|_{1,\infty} + 2)}{2 n}}
              + 4 (\|T_{k+1}\|_{1,1} + 1) R .

    The paper's factor :math:`\sqrt{m_2}` is gone. Proof: ``docs/theory.md``.

    Args:
        n: Number of samples.
        m1: Number of inputs, all in [-1, 1].
        m2: Number of classes, 2 or more.
        k: Number of hidden layers, 0 or more (B2).
        c: Normalization constant, chosen before the data are seen (B2); as in
            :func:`rademacher_bound`.
        norm_1_1: :math:`\|T_{k+1}\|_{1,1}`, the sum of all magnitudes in the output layer.
        norm_1_inf: :math:`\|T_{k+1}\|_{1,\infty}`, the largest L1 norm of one of its columns.
        delta: Probability that the bound fails.
        rho: Lipschitz constant of the activation.

    Returns:
        A scalar.

    Raises:
        ValueError: An argument that is known now (not traced) is out of its range.

    Example:
        >>> from l1inf_optax import bounds
        >>> print(bounds.classification_bound(n=100_000, m1=20, m2=2, k=1, c=1,
        ...                                   norm_1_1=2, norm_1_inf=1, delta=0.05))
        0.148...
    """
    _check_sample(n, m1)
    _check_delta(delta)
    _check("m2", m2, lambda m2: m2 >= 2, "the number of classes, at least 2")
    for name, norm in {"norm_1_1": norm_1_1, "norm_1_inf": norm_1_inf}.items():
        _check(name, norm, lambda norm: norm >= 0, "a norm of the output layer")
    norms = jnp.asarray(norm_1_1, float), jnp.asarray(norm_1_inf, float)
    growth = jnp.exp(_log_levels(k, c, rho).max())
    output = _classification_output(m2, *norms, growth)
    return jnp.exp(_log_terms(n, m1, k, c, rho, delta, output)).sum()


# --- the theorems, in logarithms ------------------------------------------------------------------


class _Output(NamedTuple):
    """What Theorems 2 and 3 need to know of the output layer and the loss.

    Attributes:
        size: the L1 norm of the output layer that the class allows.
        outputs: their number.
        range: largest less smallest loss in the class.
        lipschitz: what the loss multiplies the complexity by.
        union: minus the logarithm of the class's share of delta.
    """

    size: jax.Array
    outputs: ArrayLike
    range: ArrayLike
    lipschitz: ArrayLike
    union: ArrayLike


# Rounds a norm up to that of a class, and gives minus the logarithm of the class's share of delta.
_Rounding = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _next_integer(norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Theorem 2's classes: norms up to 1, 2, ..., the i-th with a share of 1 / (i (i + 1))."""
    return norm + 1, 2 * jnp.log(norm + 2)


def _regression_output(
    norm: jax.Array, B0: ArrayLike, lipschitz: ArrayLike, rounding: _Rounding = _next_integer
) -> _Output:
    """Theorem 2's class of a network: norms no larger than its own, rounded up."""
    size, union = rounding(norm)
    return _Output(size, 1, B0, lipschitz, union)


def _classification_output(
    m2: ArrayLike,
    total: jax.Array,
    largest: jax.Array,
    growth: jax.Array,
    rounding: _Rounding = _next_integer,
) -> _Output:
    """Theorem 3's class, by two norms; ``growth`` is what the hidden layers make of inputs of 1."""
    (size, union), (column, column_union) = rounding(total), rounding(largest)
    range_ = _cross_entropy_range(column * growth, m2)
    # 2: sqrt(2) for the cross entropy's gradient, sqrt(2) for the vector contraction
    return _Output(size, m2, range_, 2.0, union + column_union)


def _log_terms(
    n: ArrayLike,
    m1: ArrayLike,
    k: int,
    c: ArrayLike,
    rho: ArrayLike,
    delta: ArrayLike,
    output: _Output,
    display: int | None = None,
) -> jax.Array:
    """Logarithms of the bound's two terms: the luck of the draw, and the richness of the class."""
    odds = math.log(2) - jnp.log(jnp.asarray(delta, float)) + output.union
    draw = jnp.log(output.range) + jnp.log(odds / (2 * jnp.asarray(n, float))) / 2
    size = jnp.log(2 * jnp.asarray(output.lipschitz, float)) + jnp.log(output.size)
    return jnp.stack([draw, size + _log_complexity(n, m1, k, c, rho, display, output.outputs)])


def _log_levels(k: int, c: ArrayLike, rho: ArrayLike) -> jax.Array:
    """``log s_j``, for j = 0 to k."""
    try:
        depth = operator.index(k)
    except TypeError:
        depth = -1
    if depth < 0:
        raise ValueError(f"k={k!r} is not the number of hidden layers: give 0, 1, 2, ...")
    check_radius(c)
    _check("rho", rho, lambda rho: rho > 0, "the activation's Lipschitz constant: 1 for ReLU, tanh")
    constants = jnp.asarray(c, float)
    if constants.shape not in ((), (depth,)):
        raise ValueError(
            f"c has shape {constants.shape}: give one number, or one for each of the k={k} layers"
        )
    growth = jnp.log(jnp.broadcast_to(constants, (depth,))) + jnp.log(rho)
    return jnp.concatenate([jnp.zeros(1), jnp.cumsum(growth[::-1])])


def _log_complexity(
    n: ArrayLike,
    m1: ArrayLike,
    k: int,
    c: ArrayLike,
    rho: ArrayLike,
    display: int | None,
    m2: ArrayLike = 1,
) -> jax.Array:
    """Theorem 1 for o = 1, or for ``m2`` outputs that share a norm of 1."""
    levels = _log_levels(k, c, rho)
    top, last = levels.max(), levels[-1]
    inputs = jnp.sqrt(2 * jnp.log(2 * jnp.asarray(m1, float)))
    sums = jnp.logaddexp(jax.nn.logsumexp(levels), last) + math.log((k + 1) * math.log(16)) / 2
    first = jnp.logaddexp(sums, last + jnp.log(inputs))
    if display == 1:
        log_bound = first
    elif display == 2:
        log_bound = top + jnp.log(math.sqrt((k + 3) * math.log(4)) + inputs)
    elif display is None:
        outputs = jnp.log(jnp.asarray(m2, float))
        # log(2^(k+1) (m1 + 2) - 2): a power of two would overflow
        signals = (k + 1) * math.log(2) + jnp.log(jnp.asarray(m1, float) + 2 - 2.0**-k)
        log_bound = jnp.minimum(
            top + jnp.log(2 * (outputs + signals)) / 2,
            jnp.logaddexp(first, top + jnp.log(2 * outputs) / 2),
        )
    else:
        raise ValueError(f"display={display!r} is not one of Theorem 1's: give 1, 2 or None")
    return log_bound - jnp.log(jnp.asarray(n, float)) / 2


def _cross_entropy_range(size: ArrayLike, m2: ArrayLike) -> jax.Array:
    """Largest less smallest cross entropy of outputs between ``-size`` and ``size``."""
    # The logarithm of (1 + (m2 - 1) exp(2 size)) / (1 + (m2 - 1) exp(-2 size)), arranged so that no
    # power overflows and nothing cancels.
    double, others = 2 * jnp.asarray(size, float), jnp.asarray(m2, float) - 1
    ratio = (1 - others) * jnp.expm1(-double) / (1 + others * jnp.exp(-double))
    return double + jnp.log1p(ratio)


def _check(name: str, value: ArrayLike, holds: Callable[[Any], Any], remedy: str) -> None:
    """Raises a ValueError if a value that is known now (not traced) is out of its range."""
    try:
        fine = bool(np.all(holds(np.asarray(value, np.float64))))
    except jax.errors.TracerArrayConversionError:
        return
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{name}={value!r} is out of range: give {remedy}")


def _check_sample(n: ArrayLike, m1: ArrayLike) -> None:
    _check("n", n, lambda n: n >= 1, "the number of samples, at least 1")
    _check("m1", m1, lambda m1: m1 >= 1, "the number of inputs, at least 1")


def _check_delta(delta: ArrayLike) -> None:
    within = "the probability that the bound fails, between 0 and 1, both excluded"
    _check("delta", delta, lambda delta: (delta > 0) & (delta < 1), within)


# --- a certificate for a trained network ----------------------------------------------------------

# Norms are rounded up to powers of exp(1 / (20 (k + 1))): a network's all together, by 5% at most.
_STEPS_PER_NORM = 20
_SMALLEST_NORM = 1e-6  # what is below is rounded up to it


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@dataclasses.dataclass(frozen=True)
class GapBound:
    """One bound on the gap between the risks on the sample and on new data, term by term.

    Attributes:
        draw: What an unlucky draw of the sample can do, for a class fixed in advance, and what
            the union over classes adds to it.
        richness: What choosing the network from its class can do: the Rademacher complexity.
        constants: The L1,inf norms that the class allows its hidden layers.
        norm: The L1 norm that it allows its output layer.
    """

    draw: float
    richness: float
    constants: tuple[float, ...]
    norm: float

    @property
    def total(self) -> float:
        """The bound."""
        return self.draw + self.richness


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What the theory says of one trained network. Prints as a summary in plain words.

    Attributes:
        loss: Which loss the risks are means of, in words.
        n: Number of samples.
        m1: Number of inputs.
        m2: Number of outputs.
        k: Number of hidden layers.
        delta: Probability that the certificate is wrong.
        norms: L1,inf norm of each hidden layer, by its path.
        norm_1_1: Sum of the magnitudes in the output layer.
        norm_1_inf: Its largest L1 norm of a column; the same if there is one output.
        empirical_risk: Mean loss over the sample.
        for_c: The bound for the constants c that were chosen in advance.
        reached: The bound for the norms that training has reached.
        trivial: A risk that is had for nothing: on the sample that of the mean target, or the
            cross entropy of guessing all classes alike.
    """

    loss: str
    n: int
    m1: int
    m2: int
    k: int
    delta: float
    norms: Mapping[str, float]
    norm_1_1: float
    norm_1_inf: float
    empirical_risk: float
    for_c: GapBound
    reached: GapBound
    trivial: float

    @property
    def gap_bound(self) -> float:
        """The smaller of the two bounds. Both hold at once."""
        return min(self.for_c.total, self.reached.total)

    @property
    def risk_bound(self) -> float:
        """Bound on the risk on new data."""
        return self.empirical_risk + self.gap_bound

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing that is not had for nothing."""
        return self.risk_bound >= self.trivial

    def sample_size(self, gap: float) -> float:
        """The sample size from which on the bound on the gap is at most ``gap``.

        If the norms stay what they are: more data may well lead to others.
        """
        _check("gap", gap, lambda gap: gap > 0, "the gap to reach, more than 0")
        needed = self.n * (self.gap_bound / gap) ** 2  # both terms fall as 1 / sqrt(n)
        return math.ceil(needed) if math.isfinite(needed) else math.inf

    def __str__(self) -> str:
        best = min(self.for_c, self.reached, key=lambda bound: bound.total)
        goal = self.trivial / 10
        samples = self.sample_size(goal) if goal else math.inf
        return "\n".join(
            [
                f"{self.loss}: {_count(self.n, 'sample')} of {_count(self.m1, 'input')}, "
                f"{_count(self.k, 'hidden layer')}, {_count(self.m2, 'output')}",
                f"With probability {1 - self.delta:g} over the draw of the sample, the risk on new"
                " data is at most",
                f"  {self.empirical_risk:10.4g}  the risk on the sample",
                f"+ {best.draw:10.4g}  for an unlucky draw",
                f"+ {best.richness:10.4g}  for choosing among all networks with such norms",
                f"= {self.risk_bound:10.4g}",
                f"This says {'nothing' if self.vacuous else 'something'}: a risk of"
                f" {self.trivial:.3g} is had for nothing.",
                f"The bound on the gap is {self.reached.total:.4g} by the norms reached and"
                f" {self.for_c.total:.4g} by c. Both hold; the smaller counts.",
                f"With the same norms it is {goal:.2g} for {samples:,.0f} samples.",
            ]
        )


def certificate(
    params: Any,
    x: ArrayLike,
    y: ArrayLike,
    *,
    apply: Callable[[Any, jax.Array], jax.Array],
    c: Mapping[str, float],
    delta: float = 0.05,
    rho: float = 1.0,
    input_bound: float = 1.0,
    truncation: float = 2.0,
    layers: Layers = None,
) -> Certificate:
    r"""Bounds the risk on new data of a network that was trained on ``x`` and ``y``.

    The network has to be a chain of dense layers and convolutions with one activation, applied to
    every entry, between them; the output layer is the one that ``c`` leaves free. With
    probability at least ``1 - delta`` over the draw of the sample, both bounds of the certificate
    hold at once: each has half of ``delta``. What they promise and what they do not is in
    ``docs/theory.md``.

    Integer ``y`` is a class and makes a classification, with the cross entropy for its loss
    (Theorem 3); else it is a regression, with the truncated squared error
    :math:`\min((y - f(x))^2, t^2)` (Theorem 2; the paper's Remark 3 is a quarter of that at t = 2).

    Args:
        params: Trained parameters, any pytree that :func:`~l1inf_optax.keep_params_in_l1inf_ball`
            understands.
        x: ``(n, ...)`` inputs it was trained on.
        y: ``(n,)`` targets or classes.
        apply: ``(params, x) -> outputs``, of shape ``(n,)``, ``(n, 1)`` or ``(n, m2)``.
        c: The hidden layers, as globs over their paths, and the normalization constant of each:
            a mapping as in :func:`~l1inf_optax.keep_params_in_l1inf_ball`. ``inf`` for none, and
            ``{}`` for a network without hidden layers. Chosen before the data were seen; after a
            choice among several c, only ``reached`` counts.
        delta: Probability that the certificate is wrong.
        rho: Lipschitz constant of the activation, which must be 0 at 0.
        input_bound: The largest magnitude of an input, on new data too: known in advance, not
            measured. The bound is that of inputs divided by it, first-layer weights multiplied.
        truncation: t, the largest residual of a regression that counts, chosen in advance.
        layers: As in :func:`~l1inf_optax.keep_params_in_l1inf_ball`.

    Returns:
        The certificate.

    Raises:
        ValueError: A condition of the theorems fails where it can be checked: inputs beyond
            ``input_bound``, a layer outside its ball, parameters that belong to no layer, none or
            several layers left free, outputs larger than such a network can have.

    Example:
        >>> import jax.numpy as jnp
        >>> from l1inf_optax import bounds
        >>> params = {"hidden": {"kernel": jnp.array([[0.5]]), "bias": jnp.zeros(1)},
        ...           "readout": {"kernel": jnp.array([[1.0]]), "bias": jnp.zeros(1)}}
        >>> def apply(params, x):
        ...     hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        ...     return hidden @ params["readout"]["kernel"] + params["readout"]["bias"]
        >>> x = jnp.linspace(-1, 1, 50_000)[:, None]
        >>> found = bounds.certificate(
        ...     params, x, jnp.tanh(x / 2), apply=apply, c={"hidden": 0.5}, truncation=1.0
        ... )
        >>> print(found)
        squared error, 1 at most: 50,000 samples of 1 input, 1 hidden layer, 1 output
        With probability 0.95 over the draw of the sample, the risk on new data is at most
                   0  the risk on the sample
        +    0.01122  for an unlucky draw
        +    0.03839  for choosing among all networks with such norms
        =    0.04961
        This says something: a risk of 0.0758 is had for nothing.
        The bound on the gap is 0.04961 by the norms reached and 0.08489 by c. Both hold; ...
        With the same norms it is 0.0076 for 2,143,26... samples.
    """
    _check_delta(delta)
    inputs, targets = jnp.asarray(x), jnp.asarray(y)
    _check_inputs(inputs, input_bound)
    hidden, columns = _read_norms(params, c, layers)
    n, m1, k = len(inputs), inputs[0].size, len(hidden)
    scale = max(1.0, input_bound)
    first = 1.0 if k else scale  # of the output layer, if it is the first
    total, largest = (jnp.array(first * norm, float) for norm in (columns.sum(), columns.max()))
    outputs = jnp.asarray(apply(params, inputs)).reshape(n, -1)
    problem = _problem(outputs, targets, truncation)

    def in_order(norms: jax.Array) -> jax.Array:
        # Which layer comes first is not known. In no order are the levels larger than in this.
        return jnp.sort(norms).at[:1].multiply(scale)

    def growth(norms: jax.Array) -> jax.Array:
        return jnp.exp(_log_levels(k, in_order(norms), rho).max())

    def bound(norms: jax.Array, union: ArrayLike, rounding: _Rounding) -> GapBound:
        output = problem.output(total, largest, growth(norms), rounding)
        output = output._replace(union=output.union + union)
        logs = _log_terms(n, m1, k, in_order(norms), rho, delta / 2, output)
        draw, richness = (_exp(float(log)) for log in logs)
        return GapBound(draw, richness, tuple(norms.tolist()), float(output.size))

    next_power = partial(_next_power, steps=_STEPS_PER_NORM * (k + 1))
    norms, radii = jnp.array(list(hidden.values()), float).reshape(k, 2).T
    reached, unions = next_power(norms)
    _check_outputs(outputs, columns, float(largest * growth(reached)))
    return Certificate(
        loss=problem.loss,
        n=n,
        m1=m1,
        m2=len(columns),
        k=k,
        delta=delta,
        norms={path: norm for path, (norm, _) in hidden.items()},
        norm_1_1=float(columns.sum()),
        norm_1_inf=float(columns.max()),
        empirical_risk=float(problem.losses.mean()),
        for_c=bound(radii, 0.0, _next_integer),
        reached=bound(reached, unions.sum(), next_power),
        trivial=problem.trivial,
    )


class _Problem(NamedTuple):
    """What a regression and a classification differ in.

    Attributes:
        loss: its name.
        losses: ``(n,)``.
        trivial: a risk that is had for nothing.
        output: ``(total, largest, growth, rounding) -> _Output``, from the output layer's norms.
    """

    loss: str
    losses: jax.Array
    trivial: float
    output: Callable[..., _Output]


def _problem(outputs: jax.Array, targets: jax.Array, truncation: float) -> _Problem:
    n, m2 = outputs.shape
    is_regression = jnp.issubdtype(targets.dtype, jnp.floating)
    if targets.size != n or is_regression != (m2 == 1):
        raise ValueError(
            f"y has shape {targets.shape} and type {targets.dtype}, for {n} samples and {m2} "
            "outputs: give a float for one output, or an integer, the class, for two or more"
        )
    targets = targets.reshape(n)
    if is_regression:
        _check("truncation", truncation, lambda t: t > 0, "the largest residual that counts")
        most = truncation**2
        losses = jnp.minimum((outputs[:, 0] - targets) ** 2, most)
        trivial = float(jnp.minimum((targets.mean() - targets) ** 2, most).mean())

        def regression(
            total: jax.Array, largest: jax.Array, growth: jax.Array, rounding: _Rounding
        ) -> _Output:
            del largest, growth
            return _regression_output(total, most, 2 * truncation, rounding)

        return _Problem(f"squared error, {most:g} at most", losses, trivial, regression)
    _check("y", targets, lambda y: (y >= 0) & (y < m2), f"classes from 0 to {m2 - 1}")
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    classification = partial(_classification_output, m2)
    return _Problem("cross entropy", losses, math.log(m2), classification)


def _next_power(norm: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Classes of norms up to ``exp(z / steps)``, one for each integer z.

    The shares of delta, 1 / (1.5 (|z| + 1) (|z| + 2)), add up to 1.
    """
    z = jnp.ceil(steps * jnp.log(jnp.maximum(norm, _SMALLEST_NORM)))
    return jnp.exp(z / steps), jnp.log(1.5 * (jnp.abs(z) + 1) * (jnp.abs(z) + 2))


def _read_norms(
    params: Any, c: Mapping[str, float], layers: Layers
) -> tuple[dict[str, tuple[float, float]], np.ndarray]:
    """Norm and radius of the hidden layers, and the norms of the output layer's columns."""
    if not isinstance(c, Mapping):
        raise ValueError(
            f"c={brief(c)} does not say which layers are hidden: give c={{glob: number}}"
        )
    constrained = _layers.constrained_layers(params, c, layers) if c else []
    found = _layers.find_layers(params, layers)
    hidden = {layer.leaf_path for layer, _ in constrained}
    free = [layer for layer in found if layer.leaf_path not in hidden]
    if len(free) != 1:
        raise ValueError(
            f"c={c!r} leaves {len(free)} layers free, {[layer.path for layer in free]}: leave "
            "free the output layer and no other"
        )
    leaves, _ = _layers.flatten(_layers.trainable(params))  # keys and counters do not count
    known = {i for layer in found for i in layer.leaves}
    strangers = [i for i, leaf in enumerate(leaves) if i not in known and hasattr(leaf, "shape")]
    if strangers:
        raise ValueError(
            f"params has {len(strangers)} arrays of shapes "
            f"{[jnp.shape(leaves[i]) for i in strangers]} that belong to no dense layer or "
            "convolution: the theorems know no other layers"
        )
    norms = {}
    for layer, radius in constrained:
        norm = float(_column_norms(layer, leaves).max())
        if callable(radius) or np.ndim(radius) or not norm <= radius:
            raise ValueError(
                f"c gives {brief(radius)} for the layer {layer.path!r}, whose L1,inf norm is "
                f"{norm:g}: give the number it was trained with, in the end"
            )
        norms[layer.path] = norm, float(radius)
    return norms, _column_norms(free[0], leaves)


def _column_norms(layer: Layer, leaves: list[Any]) -> np.ndarray:
    """The L1 norm of every unit's weights and bias, in float64."""
    _layers.check_usable(layer, leaves)
    if len(layer.reduction_axes) + len(layer.output_axes) < len(layer.shape):
        raise ValueError(
            f"the layer {layer.path!r} of shape {layer.shape} is a stack of layers: give them "
            "one by one"
        )
    pieces = (np.abs(np.asarray(x, np.float64)) for x in layer.columns(leaves))
    return sum(x.sum(layer.reduction_axes) for x in pieces).ravel()


def _check_inputs(x: jax.Array, input_bound: float) -> None:
    _check("input_bound", input_bound, lambda b: b > 0, "the largest magnitude an input can have")
    if x.ndim < 2 or not x.size:
        raise ValueError(f"x has shape {x.shape}: give (n, ...) inputs")
    largest = float(np.abs(np.asarray(x)).max())  # NumPy's maximum never misses a NaN
    if not largest <= input_bound:
        raise ValueError(
            f"x has magnitudes of up to {largest:g}, beyond input_bound={input_bound:g}: clip or "
            "scale the inputs, on new data too, or give the bound they have as input_bound"
        )


def _check_outputs(outputs: jax.Array, columns: np.ndarray, largest: float) -> None:
    """Refuses what is no chain of dense layers: its outputs need not obey the norms."""
    if outputs.shape[1] != len(columns):
        raise ValueError(
            f"apply returns {outputs.shape[1]} outputs for each input, but the layer that c "
            f"leaves free has {len(columns)} units: leave the output layer free and no other"
        )
    size = float(np.abs(np.asarray(outputs)).max())
    if not size <= largest * (1 + 1e-3):
        raise ValueError(
            f"apply returns outputs of up to {size:g}, where layers of these norms give {largest:g}"
            " at most: the theorems know chains of dense layers and convolutions, rho-Lipschitz "
            "activations that are 0 at 0, and nothing else"
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < math.log(np.finfo(np.float64).max) else math.inf
