"""The tests themselves: they are the same in every process, and wait for none for long."""

import ast
import os
import re
import sys
import time
from types import SimpleNamespace

import hypothesis
import pytest

import l1inf_optax as l1inf
from l1inf_optax import bounds, linen, nnx, plotting, selection
from tests.support import children, compiling

TESTS = children.ROOT / "tests"
QUICK = "pytestmark = pytest.mark.quick"


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


@pytest.mark.parametrize(
    ("arguments", "keyword", "processes"),
    [
        (["tests", "l1inf_optax"], "", "auto"),
        (["tests/unit"], "", "auto"),
        (["tests/promises/test_suite.py"], "", 0),
        (["tests/unit", "tests/promises/test_suite.py::test_x[a::b]"], "", 0),
        (["tests"], "suite", 0),
    ],
)
def test_what_is_named_runs_in_one_process(request, arguments, keyword, processes):
    option = SimpleNamespace(keyword=keyword, numprocesses=None)
    asked = SimpleNamespace(
        args=arguments, option=option, invocation_params=SimpleNamespace(dir=children.ROOT)
    )
    conftest = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    conftest.pytest_cmdline_main(asked)
    assert option.numprocesses == processes


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


def imports(path):
    """The names that a file imports; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def test_no_file_imports_a_test():
    for path in TESTS.rglob("*.py"):
        tests = [name for name in imports(path) if re.match(r"tests\..*\b(test_|conftest)", name)]
        assert tests == [], path
        assert not re.search(r"from tests\S*\btest_", path.read_text()), "nor a program, as text"


def test_neither_pages_nor_the_package_import_tests():
    paths = [p for room in ("docs", "l1inf_optax") for p in (children.ROOT / room).rglob("*.py")]
    assert len(paths) > 40
    for path in paths:
        assert not {name for name in imports(path) if re.match(r"tests(\.|$)", name)}, path


def test_what_is_quick_names_all_that_is_public():
    quick = [p.read_text() for p in TESTS.rglob("test_*.py") if QUICK in p.read_text()]
    modules = [l1inf, bounds, linen, nnx, plotting, selection]
    public = {
        name
        for module in modules
        for name in getattr(module, "__all__", None) or functions_and_classes(module)
    }
    assert len(public) > 40
    words = set(re.findall(r"\w+", "".join(quick)))
    assert public - words == set()


def functions_and_classes(module):
    """The public names of a module that has no list of them."""
    own = [v for v in vars(module).values() if getattr(v, "__module__", None) == module.__name__]
    return {v.__name__ for v in own if callable(v) and not v.__name__.startswith("_")}


def test_options_that_xla_does_not_have_are_told_from_those_it_has():
    assert compiling.is_known({"xla_backend_optimization_level": "0"})
    assert not compiling.is_known({"xla_cpu_make_coffee": "False"})


def test_no_test_starts_a_process_otherwise():
    rooms = ["experiments", "pages", "promises", "support", "unit"]
    paths = {p for room in rooms for p in (TESTS / room).rglob("*.py")}
    paths -= {TESTS / "support" / "children.py"}
    assert len(paths) > 40
    starts = re.compile(r"^ *(import|from) (subprocess|multiprocessing)\b", re.MULTILINE)
    assert [p.name for p in paths if starts.search(p.read_text())] == []
