"""Sharded parameters: the tests of `on_eight_devices`, in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path


def test_eight_devices_update_like_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    tests = Path(__file__).with_name("on_eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        command,
        cwd=tests.parents[1],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
