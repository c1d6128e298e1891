"""How the default of ``stickiness`` was chosen, and what makes zeros.

`python -m tests.benchmarks.bench_stickiness` prints Markdown tables: for every covered optimizer
how many entries of a convex problem's solution are not zero, and how far its loss is above the
constrained optimum; programs for the README's example; and for some values of stickiness zeros and
errors of that example, of a small network on real digits, of the paper's classification and of its
regression. Names of tables, such as ``convex``, print these alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import l1inf_optax as l1inf
from l1inf_optax.experiments.data import synthetic
from l1inf_optax.linen import AugmentedMLP
from tests.benchmarks import bench_zeros

SHARES = (0.0, 0.01, 0.03, 0.1)
Rate = Callable[[Any], Any]

# --- least squares in a ball ----------------------------------------------------------------------

SAMPLES, ENTRIES, TRUE = 120, 300, 36
CONVEX_STEPS = 12_000
CONVEX: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": lambda rate: optax.sgd(rate(0.1)),
    "momentum": lambda rate: optax.sgd(rate(0.02), momentum=0.9),
    "adam": lambda rate: optax.adam(rate(0.01)),
    "adamw": lambda rate: optax.adamw(rate(0.01), weight_decay=0.0),
    "nadam": lambda rate: optax.nadam(rate(0.01)),
    "amsgrad": lambda rate: optax.amsgrad(rate(0.03)),
    "adabelief": lambda rate: optax.adabelief(rate(0.01)),
    "radam": lambda rate: optax.radam(rate(0.01)),
    "yogi": lambda rate: optax.yogi(rate(0.01)),
    "lamb": lambda rate: optax.lamb(rate(0.03)),
    "lars": lambda rate: optax.lars(rate(3.0)),
    "novograd": lambda rate: optax.novograd(rate(0.01)),
    "adamax": lambda rate: optax.adamax(rate(0.03)),
    "adan": lambda rate: optax.adan(rate(0.01)),
    "ademamix": lambda rate: optax.contrib.ademamix(rate(0.003)),
    "rmsprop": lambda rate: optax.rmsprop(rate(0.01)),
    "centred rmsprop": lambda rate: optax.rmsprop(rate(0.01), centered=True),
    "adagrad": lambda rate: optax.adagrad(rate(0.2)),
    "adadelta": lambda rate: optax.adadelta(rate(3.0)),
    "adafactor": lambda rate: optax.adafactor(rate(0.03), multiply_by_parameter_scale=False),
    "sm3": lambda rate: optax.chain(optax.scale_by_sm3(), optax.scale_by_learning_rate(rate(0.3))),
}
DECAYS: dict[str, Rate] = {
    "to 1%": lambda top: optax.cosine_decay_schedule(top, CONVEX_STEPS, alpha=0.01),
    "cosine to 0": lambda top: optax.cosine_decay_schedule(top, CONVEX_STEPS),
    "linear to 0": lambda top: optax.linear_schedule(top, 0.0, CONVEX_STEPS),
}


@functools.cache
def least_squares() -> tuple[np.ndarray, np.ndarray, float]:
    """Data, targets and a radius of seven tenths of what made them."""
    rng = np.random.default_rng(0)
    scales = 10 ** rng.uniform(-0.3, 0.3, ENTRIES)
    x = rng.normal(size=(SAMPLES, ENTRIES)) * scales
    truth = np.zeros(ENTRIES)
    truth[rng.permutation(ENTRIES)[:TRUE]] = rng.normal(size=TRUE)
    y = x @ truth + rng.normal(size=SAMPLES)
    return x, y, 0.7 * np.abs(truth).sum()


def convex_loss(w: np.ndarray) -> float:
    x, y, _ = least_squares()
    return float(np.mean((x @ w - y) ** 2) / 2)


@functools.cache
def optimum() -> np.ndarray:
    """The constrained optimum by FISTA in float64."""
    x, y, c = least_squares()
    step = SAMPLES / np.linalg.norm(x, 2) ** 2
    w = before = np.zeros(ENTRIES)
    t = 1.0
    for _ in range(20_000):
        following = (1 + np.sqrt(1 + 4 * t * t)) / 2
        z = w + (t - 1) / following * (w - before)
        v = z - step * x.T @ (x @ z - y) / SAMPLES
        u = np.sort(np.abs(v))[::-1]
        excess = np.cumsum(u) - c
        last = np.nonzero(u * np.arange(1, ENTRIES + 1) > excess)[0][-1]
        theta = max(excess[last] / (last + 1), 0)
        before, w, t = w, np.sign(v) * np.maximum(np.abs(v) - theta, 0), following
    return w


def convex(shares: tuple[float, ...]) -> None:
    x, y, c = least_squares()
    best = convex_loss(optimum())
    survivors = int((np.abs(optimum()) > 1e-9).sum())
    print(f"Least squares, {SAMPLES} x {ENTRIES}, {survivors} survivors, {CONVEX_STEPS:,} steps.\n")
    for dtype in (jnp.float32, jnp.bfloat16):
        data, targets = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
        print(f"{dtype.__name__}: entries that are not zero; loss above the optimum, relatively\n")
        heads = " | ".join(f"{share:g}, {decay}" for share in shares for decay in DECAYS)
        print(f"| optimizer | {heads} |")
        print("| --- " * (1 + len(shares) * len(DECAYS)) + "|")
        for name, make in CONVEX.items():
            cells = []
            for decay in DECAYS.values():
                cells.append(_convex_cells(make, decay, data, targets, c, shares))
            print(f"| {name} |", end="")
            for of_share in zip(*cells, strict=True):
                for w in of_share:
                    excess = convex_loss(w.astype(np.float64)) / best - 1
                    print(f" {np.count_nonzero(w)}, {excess:.1e} |", end="")
            print(flush=True)
        print()


def _convex_cells(make: Any, decay: Rate, data: Any, targets: Any, c: float, shares: Any) -> Any:
    @jax.jit
    @jax.vmap
    def run(share: jax.Array) -> jax.Array:
        layers = {"w": l1inf.LayerDimensionNumbers(0, 1)}
        tx = l1inf.constrain(make(decay), c, layers=layers, stickiness=share)
        params = {"w": jnp.full((ENTRIES, 1), c / ENTRIES, data.dtype)}

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
            error = (dot(data, params["w"][:, 0]) - targets).astype(data.dtype)
            grads = {"w": (dot(data.T, error) / SAMPLES)[:, None].astype(data.dtype)}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        return jax.lax.scan(step, carry, None, CONVEX_STEPS)[0][0]["w"][:, 0]

    return np.asarray(run(jnp.asarray(shares, jnp.float32)))


# --- networks -------------------------------------------------------------------------------------

OPTIMIZERS = {
    "Adam": lambda rate: optax.adam(rate(3e-3)),
    "Adam, a third of the rate": lambda rate: optax.adam(rate(1e-3)),
    "momentum": lambda rate: optax.sgd(rate(0.05), momentum=0.9),
    "momentum, a fifth of the rate": lambda rate: optax.sgd(rate(0.01), momentum=0.9),
}


def train(model: Any, params: Any, tx: Any, loss: Any, data: Any, batch: int, steps: int) -> Any:
    """Parameters after minibatches drawn with the key 7, epoch by epoch."""
    samples = len(data[0])
    epoch = samples // batch

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        params, state = carry
        key = jax.random.fold_in(jax.random.key(7), i // epoch)
        rows = jax.lax.dynamic_slice_in_dim(
            jax.random.permutation(key, samples), i % epoch * batch, batch
        )
        x, y = (array[rows] for array in data)
        grads = jax.grad(lambda p: loss(model.apply(p, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]


def hidden(params: Any) -> list[jax.Array]:
    layers = params["params"].values()
    return [x["augmented_kernel"] for x in layers if "augmented_kernel" in x]


def zeros(params: Any) -> jax.Array:
    return jnp.concatenate([(v == 0).ravel() for v in hidden(params)]).mean()


def print_means(label: str, trial: Callable[[jax.Array], jax.Array]) -> None:
    """A row: means of three seeds."""
    results = jax.jit(jax.vmap(trial))(jax.random.split(jax.random.key(0), 3))
    cells = " | ".join(f"{x:.4g}" for x in np.asarray(results).mean(0))
    print(f"| {label} | {cells} |", flush=True)


def network_table(
    heads: str, radii: tuple[float, ...], steps: int, trial: Callable[..., Any], shares: Any
) -> None:
    """Means of three seeds."""
    print(f"| optimizer | c | stickiness | {heads} |")
    print("| --- " * (4 + heads.count("|")) + "|")
    for name, make in OPTIMIZERS.items():
        for c in radii:
            for share in shares:
                rate = functools.partial(optax.cosine_decay_schedule, decay_steps=steps)
                tx = l1inf.constrain(make(rate), {"hidden_*": c}, stickiness=share)
                print_means(f"{name} | {c} | {share:g}", functools.partial(trial, tx=tx, c=c))
    print()


def sine(x: jax.Array) -> jax.Array:
    """What the README's example learns: two of 500 inputs matter."""
    return jnp.sin(3 * x[:, :1]) + x[:, 1:2]


def squared(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2)


def on_sine(key: jax.Array, tx: Any, c: float | None, batch: int, steps: int) -> jax.Array:
    """Zeros in percent, unused inputs, error on fresh data; without c a start outside the ball."""
    model, keys = AugmentedMLP((64, 1)), jax.random.split(key, 3)
    x = jax.random.uniform(keys[0], (400, 500), minval=-1)
    fresh = jax.random.uniform(keys[1], (4000, 500), minval=-1)
    params = model.init(keys[2], x)
    if c is not None:
        params = l1inf.project_params(params, {"hidden_*": c})
    params = train(model, params, tx, squared, (x, sine(x)), batch, steps)
    unused = (hidden(params)[0][1:] == 0).all(1).sum()
    return jnp.stack(
        [100 * zeros(params), unused, squared(model.apply(params, fresh), sine(fresh))]
    )


def programs(shares: tuple[float, ...]) -> None:
    print("Programs for the README's example, means of three draws\n")
    print("| program | zeros, % | unused of 500 | error |\n| --- | --- | --- | --- |")

    def row(name: str, tx: Any, c: float | None, batch: int, steps: int) -> None:
        print_means(name, functools.partial(on_sine, tx=tx, c=c, batch=batch, steps=steps))

    def momentum(rate: Any) -> Any:
        return optax.sgd(rate, momentum=0.9)

    long = functools.partial(optax.cosine_decay_schedule, decay_steps=3000)
    rate = optax.cosine_decay_schedule(3e-3, 1500)
    for share in (0.0, 0.03):
        fixed = functools.partial(
            l1inf.constrain, c={"hidden_*": 0.1, "readout": None}, stickiness=share
        )
        label = f"c = 0.1, stickiness {share:g}"
        row(f"momentum, full batch, 300 steps, {label}", fixed(momentum(0.05)), 0.1, 400, 300)
        row(f"momentum, batches of 32, 3,000, {label}", fixed(momentum(long(0.05))), 0.1, 32, 3000)
        row(
            f"Adam, batches of 32, 3,000 steps, {label}",
            fixed(optax.adam(long(3e-3))),
            0.1,
            32,
            3000,
        )
    for name, c in {
        "shrink(0.1, over=750)": l1inf.shrink(0.1, over=750),
        "shrink(zeros=0.97, over=750)": l1inf.shrink(zeros=0.97, over=750),
        "shrink(0.1, over=750, release=1.0)": l1inf.shrink(0.1, over=750, release=1.0),
        "no constraint": jnp.inf,
    }.items():
        tx = l1inf.constrain(optax.adam(rate), {"hidden_*": c})
        row(f"Adam, batches of 32, 1,500 steps, {name}", tx, None, 32, 1500)
    print()


def readme(shares: tuple[float, ...]) -> None:
    print("README's example, 64 units, batches of 32, 3,000 steps, cosine to 0\n")

    def trial(key: jax.Array, tx: Any, c: float) -> jax.Array:
        return on_sine(key, tx, c, 32, 3000)

    network_table("zeros, % | unused of 500 | error", (0.1,), 3000, trial, shares)


def digits(shares: tuple[float, ...]) -> None:
    print("Digits of scikit-learn, 64-256-128-10, batches of 64, 2,400 steps, cosine to 0\n")
    bunch = load_digits()
    model = AugmentedMLP((256, 128, 10))
    pixels, labels = jnp.asarray(bunch.data / 16, jnp.float32), jnp.asarray(bunch.target)

    def trial(key: jax.Array, tx: Any, c: float) -> jax.Array:
        keys = jax.random.split(key)
        order = jax.random.permutation(keys[0], len(labels))
        train_rows, test_rows = order[:1300], order[1300:]
        params = l1inf.project_params(model.init(keys[1], pixels[:1]), {"hidden_*": c})

        def loss(logits: jax.Array, y: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        data = (pixels[train_rows], labels[train_rows])
        params = train(model, params, tx, loss, data, 64, 2400)
        right = model.apply(params, pixels[test_rows]).argmax(-1) == labels[test_rows]
        return 100 * jnp.stack([zeros(params), right.mean()])

    network_table("zeros, % | accuracy, %", (2.0, 0.7), 2400, trial, shares)


def classification(shares: tuple[float, ...]) -> None:
    print("The paper's classification, c = 0.6, batches of 50, as in bench_zeros\n")
    runs = {}
    for name, (make, readout) in bench_zeros.OPTIMIZERS.items():
        for share in shares:
            c = bench_zeros.layers(bench_zeros.NARROW)
            tx = l1inf.constrain(make(), c, stickiness=share)
            runs[f"{name} | {share:g}"] = bench_zeros.Run(tx, bench_zeros.NARROW, readout, 50, 50)
    bench_zeros.print_table("optimizer | stickiness", runs)
    print()


def regression(shares: tuple[float, ...]) -> None:
    print("The paper's regression, 1000-300-1, c = 1, full batches, 2,400 steps, cosine to 0\n")
    model = AugmentedMLP((300, 1))
    steps = 2400

    def trial(key: jax.Array, tx: Any) -> jax.Array:
        keys = jax.random.split(key, 3)
        x, y = synthetic.regression(keys[0], 500)
        fresh = synthetic.regression(keys[1], 1000)
        params = model.init(keys[2], x[:1])
        v = params["params"]["hidden_0"]["augmented_kernel"]
        v = jnp.concatenate([jnp.full_like(v[:1], 0.6), 0.3 * v[1:]])
        params["params"]["hidden_0"]["augmented_kernel"] = l1inf.projection_l1inf_ball(v, 1.0)

        def loss(out: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean((out.reshape(-1) - y.reshape(-1)) ** 2)

        params = train(model, params, tx, loss, (x, y), 500, steps)
        return jnp.stack([100 * zeros(params), loss(model.apply(params, fresh[0]), fresh[1])])

    print("| optimizer | stickiness | zeros, % | test error |\n| --- | --- | --- | --- |")
    rates = {"momentum": optax.sgd(optax.cosine_decay_schedule(1e-4, steps), momentum=0.9)}
    rates["Adam"] = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    for name, optimizer in rates.items():
        for share in shares:
            tx = l1inf.constrain(optimizer, {"hidden_*": 1.0}, stickiness=share)
            print_means(f"{name} | {share:g}", functools.partial(trial, tx=tx))
    print()


TABLES = {f.__name__: f for f in (convex, programs, readme, digits, classification, regression)}


def asked() -> Iterator[Callable[[tuple[float, ...]], None]]:
    for name in sys.argv[1:] or TABLES:
        yield TABLES[name]


def main() -> None:
    for table in asked():
        table(SHARES)


if __name__ == "__main__":
    main()
