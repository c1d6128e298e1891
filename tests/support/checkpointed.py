"""A small training that keeps checkpoints, also in processes that are killed while they write."""

import os
import random
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l1inf_optax as l1inf
from l1inf_optax._lanes import Lane, Task, train
from l1inf_optax.experiments.command.checkpoints import open_checkpoints
from tests.support import children, devices

RUN = {"name": "test", "c": [0.5, float("inf")]}
D = 6
X = np.random.default_rng(0).normal(size=(20, D)).astype(np.float32)
Y = (X @ np.arange(D)).astype(np.float32)
# A schedule of the step size, thresholds and a radius that shrinks: all of it has to come back.
TASK = Task(
    init=lambda key, c: {"hidden": {"kernel": jax.random.normal(key, (D, 4))}, "out": jnp.ones(4)},
    apply=lambda params, x: jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["out"],
    loss=lambda outputs, y: (outputs - y) ** 2,
    optimizer=lambda c: l1inf.constrain(
        optax.adam(optax.cosine_decay_schedule(0.05, 30)),
        lambda step: c * 4 ** (1 - jnp.minimum(step / 20, 1.0)),
    ),
)
LANES = [Lane(0, 0.5), Lane(0, np.inf), Lane(1, 0.5)]
OPTIONS = {"epochs": 6, "batch_size": 4, "seed": 3, "steps_per_call": 5}


def run(**more):
    return train(TASK, LANES, (X[None], Y[None]), **OPTIONS, **more)


def run_with(folder, watch=None, **more):
    """A run that keeps its state; what it ends with."""
    with open_checkpoints(folder, RUN, **more) as (resume, keep):
        return run(resume=resume, keep=keep, watch=watch)


def process(folder, out, n=1):
    """The run, in a process of its own, as a context."""
    program = (
        "import sys, pathlib, jax, numpy as np\n"
        "from tests.support.checkpointed import run_with\n"
        "got = run_with(pathlib.Path(sys.argv[1]))\n"
        "leaves = jax.tree.leaves((got.params, got.history))\n"
        "np.savez(sys.argv[2], *map(np.asarray, leaves))\n"
    )
    command = [sys.executable, "-c", program, folder, out]
    return children.started(command, env=devices.environment(n))


def assert_saved(out, expected, **tolerance):
    saved = np.load(out)
    leaves = jax.tree.leaves((expected.params, expected.history))
    assert len(saved.files) == len(leaves)
    for name, leaf in zip(saved.files, leaves, strict=True):
        np.testing.assert_allclose(saved[name], leaf, **{"rtol": 0, "atol": 0, **tolerance})


def listing(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def kill_and_compare(uninterrupted, folder, kills):
    """A run that is killed so many times, soon after it has begun to write; then it may end.

    If it ends before that, another one starts.
    """
    rng, out, checkpoints = random.Random(0), folder / "out.npz", folder / "checkpoints"
    killed = 0
    while True:
        before = listing(checkpoints)
        with process(checkpoints, out) as running:
            while killed < kills and running.poll() is None:
                time.sleep(0.01)
                if listing(checkpoints) != before:
                    time.sleep(rng.uniform(0, 0.3))
                    running.send_signal(signal.SIGKILL)
                    killed += running.wait() == -signal.SIGKILL
            running.wait()
        if running.returncode == -signal.SIGKILL:
            continue
        assert running.returncode == 0
        assert_saved(out, uninterrupted)
        if killed == kills:
            return
        shutil.rmtree(checkpoints)
