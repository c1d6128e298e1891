"""Environments of their own for what a change must pass: ``nox --list`` says which.

``nox -s oldest newest`` runs the tests on the lower bounds of pyproject.toml and on the newest
releases of what the package needs. What follows ``--`` is for pytest.
"""

import nox

PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "docs"]


def tests(session: nox.Session, resolution: str) -> None:
    """The tests on the releases that uv chooses."""
    session.install("--resolution", resolution, "--editable", ".[test]")
    session.run("uv", "pip", "list", external=True)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """Every lower bound of pyproject.toml, on the oldest Python."""
    tests(session, "lowest-direct")


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest releases, on every Python."""
    tests(session, "highest")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("--editable", ".[experiments,lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, without its notebooks, which the tests run."""
    session.install("--editable", ".[docs]")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-D", "nb_execution_mode=off"]
    session.run("python", "-m", "sphinx", *options, "docs", "docs/_build/html")
