"""Two processes of `jax.distributed` train one sharded network: the same parameters on each.

Each runs ``python -m tests.test_hosts COORDINATOR PROCESSES PROCESS DIR``.
"""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import l1inf_optax as l1inf
from tests import devices

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


def test_two_processes_train_what_one_trains(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_hosts", coordinator, "2", str(i), str(tmp_path)],
            env=devices.environment(2),
            cwd=devices.ROOT,
        )
        for i in range(2)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected = jax.tree.leaves(trained())
    of_one, of_other = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    for name, leaf in zip(of_one.files, expected, strict=True):
        np.testing.assert_array_equal(of_one[name], of_other[name])
        np.testing.assert_allclose(of_one[name], leaf, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    coordinator, processes, process, folder = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(processes), int(process))
    assert jax.process_count() == int(processes)
    leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(trained())]
    np.savez(Path(folder) / f"{process}.npz", *leaves)
    multihost_utils.sync_global_devices("done")
