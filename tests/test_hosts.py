"""Processes of `jax.distributed` train what one process trains, started as Slurm starts them.

Each runs ``python -m tests.test_hosts ARGUMENTS...``: an experiment, or what is trained here into a
folder.
"""

import json
import os
import shutil
import socket
import sys
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import l1inf_optax as l1inf
from l1inf_optax._lanes import train
from l1inf_optax.experiments.__main__ import main
from tests import children, devices
from tests.experiments.paper.test_mnist import COMMON, blobs
from tests.test_training import LANES, OPTIONS, SHARED, TASK

# Columns of the first layer lie on all devices, so do rows of the second.
SPECS = {
    "first": {"kernel": PartitionSpec(None, "units"), "bias": PartitionSpec("units")},
    "second": {"kernel": PartitionSpec("units", None), "bias": PartitionSpec()},
}


def trained():
    """The parameters after ten steps, whole."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8)).astype(np.float32), rng.normal(size=(32, 4)).astype(np.float32)
    shapes = {"first": (8, 16), "second": (16, 4)}
    params = {
        name: {"kernel": np.float32(rng.normal(size=s)), "bias": np.zeros(s[1], np.float32)}
        for name, s in shapes.items()
    }
    mesh = jax.make_mesh((jax.device_count(),), ("units",), axis_types=(AxisType.Auto,))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(
        lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i: x[i]),
        params,
        places,
    )
    tx = l1inf.constrain(optax.adam(1e-2), 1.0)

    def loss(params):
        hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
        return jnp.mean((hidden @ params["second"]["kernel"] + params["second"]["bias"] - y) ** 2)

    def step(_, carry):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def train(params):
        return jax.lax.fori_loop(0, 10, step, (params, tx.init(params)))[0]

    return jax.jit(train, out_shardings=whole)(params)


def of_lanes():
    """What the loop trains: parameters and losses of all lanes."""
    params, history = train(TASK, LANES, SHARED, **OPTIONS)
    return [*jax.tree.leaves(params), np.array([progress.loss for progress in history])]


@pytest.fixture(scope="module")
def one_process():
    return jax.tree.leaves(trained()), of_lanes()


def start(processes, devices_each, *arguments):
    """Processes that find each other by Slurm's variables, to their good end."""
    command = [sys.executable, "-m", "tests.test_hosts", *arguments]
    with socket.socket() as reserved, ExitStack() as stack:
        # Nobody else gets the port before the first process, which shares it, listens there.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("localhost", 0))
        job = {
            **devices.environment(devices_each),
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(processes),
            "JAX_COORDINATOR_PORT": str(reserved.getsockname()[1]),
        }
        running = [
            stack.enter_context(
                children.started(
                    command, env={**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
                )
            )
            for i in range(processes)
        ]
        assert [process.wait() for process in running] == [0] * processes


@pytest.mark.parametrize(("processes", "devices_each"), [(4, 1), (2, 2)])
def test_processes_train_what_one_trains(one_process, processes, devices_each, tmp_path):
    start(processes, devices_each, tmp_path)
    first, *others = (np.load(tmp_path / f"{i}.npz") for i in range(processes))
    for other in others:
        for name in first.files:
            np.testing.assert_array_equal(other[name], first[name])
    of_network, lanes = one_process
    for name, leaf in zip(first.files, of_network + lanes, strict=True):
        np.testing.assert_allclose(first[name], leaf, rtol=1e-5, atol=1e-6)
    for name, leaf in zip(first.files[len(of_network) :], lanes, strict=True):
        np.testing.assert_array_equal(first[name], leaf)  # one device computes a lane


def test_an_experiment_runs_on_two_hosts_and_goes_on_there(tmp_path):
    rng, names = np.random.default_rng(0), ("x_train", "y_train", "x_test", "y_test")
    digits = dict(zip(names, blobs(60, rng) + blobs(20, rng), strict=True))
    np.savez(tmp_path / "blobs.npz", **digits)
    command = [*COMMON, "--data", str(tmp_path / "blobs.npz"), "--epochs", "17", "--trials", "1"]
    checkpoints = tmp_path / "checkpoints"
    on_hosts = ["--distributed", "auto", *command, "--checkpoint", checkpoints, "--out"]
    start(2, 2, *on_hosts, tmp_path / "first")
    shutil.rmtree(max(checkpoints.iterdir(), key=lambda path: int(path.name)))
    start(2, 2, *on_hosts, tmp_path / "second")
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    alone, *on_two = (
        json.loads((tmp_path / out / "results.json").read_text())["rows"]
        for out in ("alone", "first", "second")
    )
    for row in on_two:
        assert row == alone


if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    if options:
        assert main(sys.argv[1:]) == 0
    else:
        jax.distributed.initialize()
        leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(trained())]
        np.savez(f"{folder}/{jax.process_index()}.npz", *leaves, *map(np.asarray, of_lanes()))
    assert jax.process_count() == int(os.environ["SLURM_NTASKS"])
    multihost_utils.sync_global_devices("done")
