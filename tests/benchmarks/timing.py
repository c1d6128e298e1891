"""Times that can be compared: steps that take turns in one run."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Step = Callable[[], Any]


def seconds(step: Step) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start


def interleaved(steps: Sequence[Step], budget: float = 8.0, least: int = 20) -> np.ndarray:
    """Seconds of each step in each round: shape `(rounds, len(steps))`.

    The steps take turns, and every other round in reverse, so that the machine's other load and
    the state in which one step leaves its caches and allocator meet all of them alike. There are
    as many rounds as fit into ``budget`` seconds, and at least ``least``.
    """
    once = sum(min(seconds(step) for _ in range(3)) for step in steps)
    order = list(range(len(steps)))
    times = np.empty((max(least, int(budget / once)), len(steps)))
    for row in times:
        for index in order:
            row[index] = seconds(steps[index])
        order.reverse()
    return times
