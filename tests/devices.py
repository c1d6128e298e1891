"""Processes with as many virtual CPU devices as a test asks for."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    """Of a process that has so many devices, finds the tests and takes deprecations for errors."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::DeprecationWarning",
    }


def run(program: str, devices: int, *arguments: Any) -> None:
    """Run a program, as text, to its good end."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    subprocess.run(command, env=environment(devices), check=True)
