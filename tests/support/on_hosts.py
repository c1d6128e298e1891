"""What each of several hosts runs: ``python -m tests.support.on_hosts ARGUMENTS...``.

A folder as the only argument is where it keeps what is trained here; others are an experiment's.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import l1inf_optax as l1inf
from l1inf_optax.experiments.__main__ import main
from tests.support import lanes

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


if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    if options:
        assert main(sys.argv[1:]) == 0
    else:
        jax.distributed.initialize()
        leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(trained())]
        np.savez(f"{folder}/{jax.process_index()}.npz", *leaves, *map(np.asarray, lanes.trained()))
    assert jax.process_count() == int(os.environ["SLURM_NTASKS"])
    multihost_utils.sync_global_devices("done")
