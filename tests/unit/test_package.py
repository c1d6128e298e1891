import sys

import pytest

import l1inf_optax as l1inf
from tests.support import children


def python(code):
    done = children.run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "package",
    [
        "flax",
        "matplotlib",
        "mlxtend",
        "optuna",
        "orbax",
        "pandas",
        "rich",
        "scipy.stats",
        "sklearn",
    ],
)
def test_importing_the_package_does_not_import(package):
    assert python(f"import sys, l1inf_optax; print({package!r} in sys.modules)") == "False"


def test_every_public_name_is_there():
    for name in l1inf.__all__:
        assert getattr(l1inf, name) is not None
    assert set(dir(l1inf)) == set(l1inf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'projection'"):
        _ = l1inf.projection


def test_the_readme_has_the_two_commands():
    text = (children.ROOT / "README.md").read_text()
    for command in (
        'python -m pip install -e ".[experiments]" && python -m l1inf_optax.experiments mnist',
        'python -m pip install -e ".[test]" && python -m pytest',
    ):
        assert f"\n{command}\n" in text
