"""Projections in exact rational arithmetic: slow, obvious, and sharing no code with the library."""

import math
from fractions import Fraction

import numpy as np


def project(column, c, metric=None):
    """The projection of one column, as Fractions: try every size of the support, largest first.

    On the p entries with the largest ``|v| d``, the threshold is the theta at which
    ``sum (|v| - theta / d) = c``; the right p is the largest whose p-th entry survives it.
    """
    v = [Fraction(float(x)) for x in column]
    d = [Fraction(1)] * len(v) if metric is None else [Fraction(float(x)) for x in metric]
    c = Fraction(c)
    if sum(map(abs, v)) <= c:
        return v
    order = sorted(range(len(v)), key=lambda i: abs(v[i]) * d[i], reverse=True)
    theta, norm, slope = Fraction(0), Fraction(0), Fraction(0)
    for i in order:
        norm += abs(v[i])
        slope += 1 / d[i]
        candidate = (norm - c) / slope
        if abs(v[i]) * d[i] <= candidate:
            break
        theta = candidate
    shrunk = [max(abs(x) - theta / y, Fraction(0)) for x, y in zip(v, d, strict=True)]
    return [x if y > 0 else -x for x, y in zip(shrunk, v, strict=True)]


def norm64(column):
    """The contract's norm: absolute values added up in float64."""
    return math.fsum(np.abs(np.asarray(column, np.float64)).ravel())


def project64(column, c):
    """The projection in float64 by sorting, for columns too long for rational arithmetic."""
    v = np.asarray(column, np.float64)
    if norm64(v) <= c:
        return v
    mu = np.sort(np.abs(v))[::-1]
    theta = (np.cumsum(mu) - c) / np.arange(1, len(mu) + 1)
    p = np.nonzero(mu > theta)[0][-1]
    theta = (math.fsum(mu[: p + 1]) - c) / (p + 1)
    return np.sign(v) * np.maximum(np.abs(v) - theta, 0)


def project_many(x, c, metric=None):
    """The projections of many columns, along axis 0, by sorting in extended precision.

    Without a metric what is added up are distances below a column's largest magnitude: exact, for
    whatever can survive, where c is small beside it. Finite columns only.

    Returns:
        The magnitudes of the projected entries, and what the threshold takes off every entry (zero
        in columns inside their ball), in extended precision.
    """
    v = np.abs(np.asarray(x, np.float64)).astype(np.longdouble)
    c = np.asarray(c, np.longdouble)
    if metric is None:
        top, g = v.max(0), np.ones_like(v)
        u = key = v - top
    else:
        top, g = 0, 1 / np.asarray(metric, np.float64).astype(np.longdouble)
        u, key = v, v / g
    order = np.argsort(-key, axis=0)
    sums, slopes = (np.cumsum(np.take_along_axis(a, order, 0), axis=0) for a in (u, g))
    theta = (sums - c) / slopes
    last = (np.take_along_axis(key, order, 0) > theta).sum(0) - 1
    theta = np.take_along_axis(theta, np.maximum(last, 0)[None], 0)
    inside = v.sum(0) <= c
    return (
        np.where(inside, v, np.maximum(u - theta * g, 0)),
        np.where(inside, 0, top + theta * g),
    )
