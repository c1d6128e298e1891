"""Sharded parameters: the tests of `on_eight_devices`, in a process that has them."""

import subprocess
import sys
from pathlib import Path

from tests import devices


def test_eight_devices_update_like_one():
    tests = Path(__file__).with_name("on_eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        command,
        cwd=devices.ROOT,
        env=devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
