"""Processes with as many virtual CPU devices as a test asks for."""

import os
import sys
from typing import Any

from tests import children


def environment(devices: int) -> dict[str, str]:
    """Of a process that has so many devices, finds the tests and takes deprecations for errors."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(children.ROOT),
        "PYTHONWARNINGS": "error::DeprecationWarning",
    }


def run(program: str, devices: int, *arguments: Any) -> None:
    """Run a program, as text, to its good end."""
    done = children.run([sys.executable, "-c", program, *arguments], env=environment(devices))
    assert done.returncode == 0, done.stdout + done.stderr
