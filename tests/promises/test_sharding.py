"""Sharded parameters: the tests of `on_eight_devices`, in processes that have them."""

import sys

import pytest

from tests import children, devices

# Parts, so that none takes long where cores are few and busy; together they are all.
PARTS = {
    "momentum": "update_is and momentum",
    "adam": "update_is and adam",
    "a transformer": "transformer",
    "split columns": "split_columns",
}
PARTS["others"] = " and ".join(f"not ({part})" for part in PARTS.values())


@pytest.mark.parametrize("part", PARTS)
def test_eight_devices_compute_what_one_computes(part):
    tests = children.ROOT / "tests" / "on_eight_devices.py"
    options = ["-n0", "-q", "-p", "no:cacheprovider", "-k", PARTS[part]]
    command = [sys.executable, "-m", "pytest", *options, tests]
    done = children.run(command, env=devices.environment(8))
    assert done.returncode == 0, done.stdout + done.stderr
