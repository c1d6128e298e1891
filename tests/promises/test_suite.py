"""The tests themselves: they are the same in every process, and wait for none for long."""

import os
import re
import sys
import time

import hypothesis
import pytest

from tests.support import children

TESTS = children.ROOT / "tests"


@pytest.mark.parametrize("half", [0, 1])  # all files would take one process long
def test_another_process_collects_the_same_tests_in_the_same_order(request, tmp_path, half):
    items = request.session.items
    files = list(dict.fromkeys(item.path for item in items))[half::2]
    if not files:
        pytest.skip("no other file was chosen")
    ours = [item.nodeid for item in items if item.path in files]
    options = ["--collect-only", "-q", "-n0", "-p", "no:cacheprovider"]
    done = children.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    chosen = set(ours)  # of a run with -k, say
    assert [line for line in done.stdout.splitlines() if line in chosen] == ours


def test_bytes_are_not_taken_for_an_id(request):
    make_id = request.config.hook.pytest_make_parametrize_id
    with pytest.raises(ValueError, match=r"content is b'\\x1f\\x8b', .* name it by ids="):
        make_id(config=request.config, val=b"\x1f\x8b", argname="content")


def test_the_last_digits_of_a_float_are_no_part_of_an_id(request):
    make_id = request.config.hook.pytest_make_parametrize_id
    one, other = (
        make_id(config=request.config, val=x, argname="x") for x in (0.9, 0.8999999999999999)
    )
    assert one == other == "0.9"


def test_examples_are_the_same_every_time_and_may_take_their_time():
    settings = hypothesis.settings()
    assert settings.derandomize
    assert settings.deadline is None
    assert hypothesis.HealthCheck.too_slow in settings.suppress_health_check


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
