"""Processes of `jax.distributed` train what one process trains, started as Slurm starts them."""

import json
import shutil
import socket
import sys
from contextlib import ExitStack

import jax
import numpy as np
import pytest

from l1inf_optax.experiments.__main__ import main
from tests.support import children, devices, lanes, on_hosts
from tests.support.digits import COMMON, blobs


@pytest.fixture(scope="module")
def one_process():
    return jax.tree.leaves(on_hosts.trained()), lanes.trained()


def start(processes, devices_each, *arguments):
    """Processes that find each other by Slurm's variables, to their good end."""
    command = [sys.executable, "-m", "tests.support.on_hosts", *arguments]
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
    of_network, of_lanes = one_process
    for name, leaf in zip(first.files, of_network + of_lanes, strict=True):
        np.testing.assert_allclose(first[name], leaf, rtol=1e-5, atol=1e-6)
    for name, leaf in zip(first.files[len(of_network) :], of_lanes, strict=True):
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
