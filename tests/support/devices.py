"""Processes with as many virtual CPU devices as a test asks for."""

import os
import sys
from typing import Any

from tests.support import children


def environment(devices: int) -> dict[str, str]:
    """Of a process that has so many devices, finds the tests and takes deprecations for errors."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(children.ROOT),
        "PYTHONWARNINGS": "error::DeprecationWarning",
    }


def run(module: str, devices: int, *arguments: Any) -> None:
    """Run a module to its good end; it starts by counting its devices."""
    program = (
        "import jax, runpy, sys\n"
        f"assert jax.device_count() == {devices}\n"
        f"sys.argv[0] = {module!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    done = children.run([sys.executable, "-c", program, *arguments], env=environment(devices))
    assert done.returncode == 0, done.stdout + done.stderr
