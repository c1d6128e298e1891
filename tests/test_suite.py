"""The tests themselves: they are the same in every process, and wait for none for long."""

import re
import sys
import time

import pytest

from tests import children

TESTS = children.ROOT / "tests"


def test_a_child_that_hangs_is_killed_with_all_that_it_has_started(monkeypatch):
    monkeypatch.setattr(children, "PATIENCE", 0.5)
    hang = "import time; time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hang!r}])"
    before = time.monotonic()
    with pytest.raises(TimeoutError, match=r"has taken longer than 0\.5 s"):
        children.run([sys.executable, "-c", program])  # its child holds its pipes
    assert time.monotonic() - before < 60


def test_a_child_does_not_outlive_its_test():
    with (
        pytest.raises(RuntimeError, match="of the test"),
        children.started([sys.executable, "-c", "import time; time.sleep(600)"]) as process,
    ):
        raise RuntimeError("of the test")
    assert process.returncode is not None


def test_no_test_starts_a_process_otherwise():
    paths = [p for p in TESTS.rglob("*.py") if re.match("test_|on_|devices|conftest", p.name)]
    assert len(paths) > 40
    starts = re.compile(r"^ *(import|from) (subprocess|multiprocessing)\b", re.MULTILINE)
    assert [p.name for p in paths if starts.search(p.read_text())] == []
