"""A million random and adversarial columns against a float64 oracle: ``python -m`` this file.

Every batch is drawn anew from the seed and its own number, so that one that fails is drawn again
by ``--first NUMBER --columns 1``. The projections go through every dtype, method, shape and kind
of metric, from thresholds of any quality; the transformations land through `optax.apply_updates`.

What must hold of each column: it ends; it is feasible, added up in float64; inside its ball, by
more than rounding, it is untouched bit for bit; what lies below the threshold is zero; a NaN stays
a NaN and at home; and the error, in units of eps times ``Case.unit``, stays below `MOST`.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

import l1inf_optax as l1inf
from l1inf_optax._projection.requests import project_columns
from tests.support import oracle

# (shape, the axis a column runs along)
SHAPES = [((24, 4096), 0), ((3, 4096), 0), ((8, 150, 256), 1)]
FORMATS = {
    "float32": (np.dtype(np.float32), (-38, 38)),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), (-38, 38)),
    "float16": (np.dtype(np.float16), (-7, 4.8)),
    "float64": (np.dtype(np.float64), (-300, 300)),
}
FORMATS_32 = ("float32", "bfloat16", "float16")
# The largest error there may be, in eps * unit: some units in the last place.
MOST = {"euclidean": 4, "metric": 8}
SECONDS = 120  # for a batch, its compilation included; one takes a tenth of a second


class Kind(NamedTuple):
    """What is tested: a row of the table."""

    x64: bool
    dtype: str
    method: str  # of a projection, or the name of a transformation
    metric: str


class Case(NamedTuple):
    """A batch of columns, along axis 0, and what became of them.

    Attributes:
        x: what is projected.
        c: the radius of each column.
        d: the metric or None.
        w: the projections.
        unit: what an error is measured by, times eps: c; with a metric c + max|x|; where a
            transformation lands, that and the parameter it leaves from.
        kept: of columns inside their ball, what must and what did come back, bit for bit.
        passes: how many passes it took, or None.
    """

    x: Any
    c: Any
    d: Any
    w: Any
    unit: Any
    kept: tuple[Any, Any]
    passes: int | None


KINDS = [
    *(
        Kind(x64, dtype, method, metric)
        for x64, dtypes in ((False, FORMATS_32), (True, ("float64", "float32")))
        for dtype in dtypes
        for method in ("newton", "sort")
        for metric in MOST
    ),
    *(
        Kind(False, dtype, method, metric)
        for dtype in FORMATS_32
        for method, metric in (("keep_params", "euclidean"), ("constrain", "metric"))
    ),
]  # fmt: skip


# --- columns --------------------------------------------------------------------------------------


def draw_columns(rng, n, m, dtype, ordinary):
    """``(n, m)`` columns of a dtype: every distribution, at every scale that the dtype has."""
    number, (low, high) = FORMATS[dtype]
    shape = n, m
    draws = np.stack(
        [
            rng.normal(size=shape),
            rng.standard_cauchy(size=shape),
            np.exp(8 * rng.normal(size=shape)),
            rng.integers(-3, 4, size=shape),  # ties and zeros
            rng.normal(size=shape) * (rng.random(shape) < 0.2),
            np.ones(shape),
            1 + float(ml_dtypes.finfo(number).eps) * rng.integers(-4, 5, size=shape),
            1 + 1e-6 * rng.normal(size=shape),
            2.0 ** -rng.integers(0, 30, size=shape),
            rng.uniform(0.1, 1, size=m) ** np.arange(n)[:, None],
            np.vstack([10 ** rng.uniform(0, 30, size=(1, m)), rng.normal(size=(n - 1, m))]),
            np.zeros(shape),
        ]
    )  # fmt: skip
    family = rng.choice(len(draws), size=m, p=[*[0.09] * 11, 0.01])
    x = draws[family, :, np.arange(m)].T
    scale = rng.uniform(-3, 3, size=m) if ordinary else rng.uniform(low - 3, high, size=m)
    most = float(ml_dtypes.finfo(number).max)
    x = np.clip(x * 10.0**scale * rng.choice([-1, 1], size=shape), -most, most).astype(number)
    return rng.permuted(x, axis=0)


def draw_radii(rng, x, ordinary):
    """A radius for each column: any share of its norm, its norm, or one that puts the threshold
    at an entry; in float64 or float32."""
    a = np.abs(np.asarray(x, np.float64))
    n, m = a.shape
    with np.errstate(over="ignore"):
        norm = np.minimum(a.sum(0), 1e300)
    entry = a[rng.integers(0, n, size=m), np.arange(m)]
    with np.errstate(over="ignore"):
        choices = [
            norm * 10 ** rng.uniform(-9, 0.2, size=m),
            norm * 10 ** rng.uniform(-2, 0.05, size=m),
            norm + rng.integers(-3, 4, size=m) * np.spacing(norm),
            norm * (1 + rng.integers(-3, 4, size=m) * 2.0**-24),
            np.maximum(a - entry, 0).sum(0) * (1 + rng.integers(-2, 3, size=m) * 2.0**-24),
            rng.choice([0.07, 1.0, 1e30], size=m),
        ]
    c = np.choose(rng.choice(len(choices), size=m, p=[0.3, 0.3, 0.1, 0.1, 0.18, 0.02]), choices)
    wide = x.dtype == np.float64
    c = np.clip(
        c, *((2.0**-29, 2.0**59) if ordinary else (1e-300, 1e300) if wide else (2.0**-126, 1e38))
    )
    c = np.maximum(c, a.max(0) * np.finfo(np.float64 if wide else np.float32).tiny ** 0.8)
    return c if wide or rng.random() < 0.5 else np.float32(c).astype(np.float64)


def draw_metric(rng, shape, number):
    """Weights of condition numbers up to 2^58."""
    spread = rng.choice([0.5, 3, 10, 20], size=shape[1])
    d = np.exp2(np.clip(spread * rng.normal(size=shape), -29, 29))
    return np.where(rng.random(shape[1]) < 0.1, np.round(d) + 1, d).astype(number)


def draw_starts(rng, theta):
    """Thresholds that a search may start from: near the true ones, old ones, none, nonsense."""
    m = len(theta)
    with np.errstate(over="ignore", invalid="ignore"):
        choices = [
            np.zeros(m),
            theta * (1 + 1e-6 * rng.normal(size=m)),
            theta * np.exp(rng.normal(size=m)),
            theta * 10 ** rng.uniform(-9, 9, size=m),
            rng.choice([np.inf, np.nan, -1.0, 1e38], size=m),
        ]
        return np.float32(np.choose(rng.choice(len(choices), size=m), choices))


def spoil(rng, x):
    """A NaN or infinities in one column of fifty."""
    for bad, share in ((np.nan, 0.01), (np.inf, 0.01)):
        here = (rng.random(x.shape[1]) < share) & (rng.random(x.shape) < 0.3)
        x = np.where(here, np.asarray(bad, x.dtype) * np.sign(x + (x == 0)), x)
    return x


# --- what is tested -------------------------------------------------------------------------------


def project(rng, kind, batch):
    """A batch through a projection, warm starts included."""
    shape, axis = SHAPES[batch % len(SHAPES)]
    n, m = shape[axis], int(np.prod(shape)) // shape[axis]
    ordinary = bool(rng.random() < 0.5)
    x = draw_columns(rng, n, m, kind.dtype, ordinary)
    c = draw_radii(rng, x, ordinary)
    d = draw_metric(rng, x.shape, x.dtype if x.dtype.itemsize > 2 else np.float32)
    d = d if kind.metric == "metric" else None
    _, taken = oracle.project_many(x, c, d)
    starts = draw_starts(rng, (taken if d is None else taken * d).max(0).astype(np.float64))
    x = spoil(rng, x)

    others = [size for i, size in enumerate(shape) if i != axis]

    def as_given(a):
        return np.moveaxis(a.reshape(n, *others), 0, axis)

    found = project_columns(
        (jnp.asarray(as_given(x)),),
        c.reshape(others),
        (axis,),
        metric=None if d is None else (jnp.asarray(as_given(d)),),
        method=kind.method,
        start=jnp.asarray(starts.reshape(others)),
    )
    w = np.moveaxis(np.asarray(found.parts[0]), axis, 0).reshape(x.shape)
    return Case(x, c, d, w, _unit(x, c, d), (x, w), int(found.passes))


@jax.jit
def _update(p, u, thresholds, c, d):
    def metric(state, params):
        return {"augmented_kernel": d}

    if d is None:
        tx = l1inf.keep_params_in_l1inf_ball(lambda step: c)
    else:
        tx = l1inf.constrain(optax.identity(), lambda step: c, metric=metric)
    params, updates = {"augmented_kernel": p}, {"augmented_kernel": u}
    state = tx.init(params)
    state = jax.tree.map(lambda x: thresholds if x.shape == thresholds.shape else x, state)
    landing, _ = tx.update(updates, state, params)
    return tuple(
        (y["augmented_kernel"], optax.apply_updates(params, y)["augmented_kernel"])
        for y in (updates, landing)
    )


def transform(rng, kind, batch):
    """A batch through a transformation: what `optax.apply_updates` makes of its updates."""
    (n, m), _ = SHAPES[0]
    c = np.float32(rng.choice([0.07, 1.0, 3.0, 1e3]))
    x = draw_columns(rng, n, m, kind.dtype, ordinary=True)
    p = draw_columns(rng, n, m, kind.dtype, ordinary=True)
    p = np.where(rng.random(m) < 0.5, p, x)  # small steps as well
    u = (x.astype(np.float32) - p.astype(np.float32)) * np.float32(1 + 1e-2 * rng.normal(size=m))
    u = np.where(np.isfinite(u.astype(x.dtype)), u, 0).astype(x.dtype)
    d = draw_metric(rng, x.shape, np.float32) if kind.metric == "metric" else None
    starts = draw_starts(rng, np.abs(x.astype(np.float64)).max(0))
    (_, v), (landing, w) = jax.device_get(
        _update(p, u, jnp.asarray(starts), c, None if d is None else jnp.asarray(d))
    )
    radii = np.full(m, c, np.float64)
    unit = _unit(v, radii, d) + np.abs(p.astype(np.float64))
    return Case(v, radii, d, w, unit, (u, landing), None)


def _unit(x, c, d):
    if d is None:
        return np.broadcast_to(c, x.shape)
    a = np.abs(x.astype(np.float64))
    return np.broadcast_to(c + np.where(np.isfinite(a), a, 0).max(0), x.shape)


# --- what must hold -------------------------------------------------------------------------------


def violations(case, most):
    """What does not hold, as (what, columns); the largest error; how many columns were outside."""
    x, w = (a.astype(np.float64) for a in (case.x, case.w))
    info = ml_dtypes.finfo(case.x.dtype)
    nan = np.isnan(x).any(0)
    infinite = np.isinf(x).any(0) & ~nan
    finite = ~nan & ~infinite
    safe = np.where(finite, x, 0)
    inside, outside = _sides(
        safe, case.c, wide=np.float64 if case.x.dtype == np.float64 else np.float32
    )
    inside, outside = inside & finite, outside & finite

    exact, taken = oracle.project_many(safe, case.c, case.d)
    # Processors take what is smaller for zero. In 16 bits a column may end short by as much an
    # entry; with a metric a small entry may be worth more than a large one.
    least = float(info.smallest_subnormal if info.dtype == np.float16 else info.tiny)
    least *= 2 if info.bits > 16 and case.d is None else len(x)
    error = np.abs(np.abs(w) - exact)
    error = np.where(finite & ~inside, np.maximum(error - least, 0), 0).astype(np.float64)
    units = error / (float(info.eps) * case.unit)
    below = outside & (np.abs(safe) < taken - most * float(info.eps) * case.unit - least)
    if case.d is not None:  # an entry above 2^60 c counts as that
        below &= (np.abs(safe) <= 2.0**59 * case.c).all(0)
    shared = np.isinf(x) * np.minimum(case.c / np.maximum(np.isinf(x).sum(0), 1), float(info.max))
    limit = np.abs(np.abs(w) - shared) <= most * float(info.eps) * case.unit + least

    must, did = (np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}") for a in case.kept)
    wrong = {
        "infeasible": ~nan & ~_feasible(w, case.c),
        "touched": inside & (must != did).any(0),
        "a wrong sign": finite & (w * x < 0).any(0),
        "not zero": (below & (np.abs(w) > (0 if case.d is None else least))).any(0),
        "too far off": (units > most).any(0),
        "a NaN lost or found": nan != np.isnan(w).any(0),
        "not the limit": infinite & (case.passes is not None or case.d is None) & ~limit.all(0),
    }
    worst = units.max(initial=0, where=finite)
    return {name: np.flatnonzero(bad) for name, bad in wrong.items() if bad.any()}, worst, outside


def _sides(x, c, *, wide):
    """Columns inside their ball by more than rounding, and those outside."""
    norm = np.abs(x.astype(np.longdouble)).sum(0)
    info = np.finfo(wide)
    least = np.where(c < 2.0**-30, 4 * len(x) * float(info.tiny), 0)
    return norm + least <= c * (1 - 8 * np.longdouble(info.eps)), norm > c


def _feasible(w, c):
    norm = np.abs(w.astype(np.longdouble)).sum(0)
    good = norm <= c * (1 - np.longdouble(len(w) * 2.0**-60))
    for j in np.flatnonzero(~good):
        good[j] = oracle.norm64(w[:, j]) <= c[j]
    return good


# --- the run --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What was found of one kind so far."""

    columns: int = 0
    outside: int = 0
    wrong: int = 0
    worst: float = 0.0
    passes: int = 0
    seconds: float = 0.0


def run(columns, seed, first, out):
    """Batches from number ``first`` on until all kinds together have had so many columns.

    Returns:
        A `Row` for each kind, and a list of what went wrong, in words.
    """
    rows, complaints = defaultdict(Row), []
    per_kind = -(-columns // len(KINDS))
    for kind in sorted(KINDS, key=lambda kind: kind.x64):
        batch = first
        while rows[kind].columns < per_kind:
            name = f"batch {batch} of {' '.join(map(str, kind))}, seed {seed}"
            rng = np.random.default_rng([seed, KINDS.index(kind), batch])
            start = time.process_time()
            case = _in_time(name, kind, rng, batch)
            seconds = time.process_time() - start
            found, worst, outside = violations(case, MOST[kind.metric])
            for what, bad in found.items():
                complaints.append(f"{what}: {len(bad)} columns of {name}, the first {bad[0]}")
                _save(out / f"{what} {name}.npz", case, bad[0])
            old = rows[kind]
            rows[kind] = Row(
                old.columns + case.x.shape[1],
                old.outside + int(outside.sum()),
                old.wrong + sum(map(len, found.values())),
                max(old.worst, float(worst)),
                max(old.passes, case.passes or 0),
                old.seconds + seconds,
            )
            batch += 1
    return rows, complaints


def _save(path, case, j):
    """A column that went wrong."""
    arrays = {"x": case.x, "c": case.c, "w": case.w}
    if case.d is not None:
        arrays["d"] = case.d
    np.savez(path, **{name: np.asarray(a[..., j], np.float64) for name, a in arrays.items()})


def _in_time(name, kind, rng, batch):
    def late():
        print(f"no end after {SECONDS} s: {name}", file=sys.stderr, flush=True)
        os._exit(2)

    before = jax.config.jax_enable_x64
    watchdog = threading.Timer(SECONDS, late)
    watchdog.start()
    jax.config.update("jax_enable_x64", kind.x64)
    try:
        through = project if kind.method in ("newton", "sort") else transform
        return through(rng, kind, batch)
    finally:
        jax.config.update("jax_enable_x64", before)
        watchdog.cancel()


def main():
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--columns", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    args = parser.parse_args()
    np.seterr(over="ignore", invalid="ignore")  # infinities and NaN are part of the game
    out = Path(tempfile.mkdtemp(prefix="fuzz_projection_"))
    rows, complaints = run(args.columns, args.seed, args.first, out=out)

    table = Table(title=f"seed {args.seed}: {sum(r.columns for r in rows.values()):,} columns")
    for heading in ("dtype", "x64", "method", "metric", "columns", "outside", "wrong",
                    "largest error / eps", "most passes", "CPU s"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("dtype", "method") else "right")
    for kind, row in rows.items():
        table.add_row(
            kind.dtype, "on" if kind.x64 else "off", kind.method, kind.metric, f"{row.columns:,}",
            f"{row.outside:,}", str(row.wrong), f"{row.worst:.2f}", str(row.passes or ""),
            f"{row.seconds:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if complaints:
        print("\n".join(complaints), f"the columns are in {out}", sep="\n")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
