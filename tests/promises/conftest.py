"""Tests that need more devices than there are run in processes that have them.

A test marked with ``devices(8)`` runs here where there are 8: with
``XLA_FLAGS=--xla_force_host_platform_device_count=8``, say, for a debugger. Otherwise a child runs
it, together with the next ones of its file, and what became of each is reported as its own.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import jax
import pytest

from tests.support import children, devices

AT_ONCE = 5  # tests of a child, so that it ends well within its minute
WELL = ""
reports = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Reports what became of the test in a child, if it is one for more devices."""
    marker = pyfuncitem.get_closest_marker("devices")
    if marker is None or jax.device_count() >= marker.args[0]:
        return None
    done = pyfuncitem.session.stash.setdefault(reports, {})
    if pyfuncitem.nodeid not in done:
        done |= in_a_child(together(pyfuncitem), *marker.args)
    if done[pyfuncitem.nodeid] != WELL:
        pytest.fail(done[pyfuncitem.nodeid], pytrace=False)
    return True


def together(item):
    """The chosen tests of the file that share a child with this one."""
    chosen = [other for other in item.session.items if other.path == item.path]
    first = chosen.index(item) // AT_ONCE * AT_ONCE
    return chosen[first : first + AT_ONCE]


def in_a_child(items, number):
    """What became of each test: nothing, or why it failed."""
    ids = [item.nodeid for item in items]
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-n0", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            child = children.run(
                [sys.executable, "-m", "pytest", *options, *ids], env=devices.environment(number)
            )
        except TimeoutError as error:
            return dict.fromkeys(ids, str(error))
        if not report.exists():
            return dict.fromkeys(ids, child.stdout + child.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    texts = {case.get("name"): "\n".join(part.text or "" for part in case) for case in cases}
    return {item.nodeid: texts.get(item.name, "it was not run") for item in items}
