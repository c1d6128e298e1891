"""The package's modules: each has a name of its own, and imports between rooms go one way."""

import ast
from collections import Counter

import pytest

from tests.support import children

PACKAGE = children.ROOT / "l1inf_optax"
EXPERIMENTS = "l1inf_optax.experiments"
MAY_IMPORT = {
    "paper": {"paper", "data", "networks", "command"},
    "supplement": {"supplement", "paper", "data", "networks", "command"},
    "beyond": {"beyond", "paper", "data", "networks", "command"},
    "networks": {"networks", "data"},
    "command": {"command"},
    "data": {"data"},
}


def test_no_two_modules_have_one_name():
    names = Counter(path.stem for path in PACKAGE.rglob("*.py"))
    del names["__init__"]
    assert len(names) > 40
    assert [name for name, count in names.items() if count > 1] == []


def test_every_room_is_known():
    rooms = {path.parent.name for path in (PACKAGE / "experiments").glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = list((PACKAGE / "experiments" / room).glob("*.py"))
    found = {
        node.module.removeprefix(f"{EXPERIMENTS}.").split(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{EXPERIMENTS}.")
    }
    assert len(files) > 2
    assert found <= MAY_IMPORT[room]
