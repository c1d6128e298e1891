"""Processes with as many virtual CPU devices as a test asks for."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    """Of a process that is to have so many devices and to find the tests."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(program: str, devices: int, *arguments: Any) -> None:
    """Run a program, as text, to its good end."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    subprocess.run(command, env=environment(devices), check=True)
