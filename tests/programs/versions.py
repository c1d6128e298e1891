"""The test suite on the oldest and on the newest releases of all that the package needs.

``pip install uv && python -m tests.programs.versions`` makes three environments under build/: the
lower bounds of pyproject.toml on the oldest Python that it names, the newest releases on that
Python, and the newest on its newest Python. What follows ``--`` is for pytest.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def supported_pythons():
    """The oldest and the newest Python of the classifiers."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = [c.split(" :: ")[-1] for c in classifiers if c.startswith("Programming Language")]
    return [versions[0], versions[-1]]


def uv(*arguments):
    """What the command prints."""
    command = [sys.executable, "-m", "uv", "--quiet", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def environment(releases, python):
    """The folder of a fresh environment."""
    folder = ROOT / "build" / f"{releases}-{Path(python).name}"
    uv("venv", "--clear", "--python", python, folder)
    resolution = RESOLUTIONS[releases]
    uv("pip", "install", "--python", folder, "--resolution", resolution, "--editable", ".[test]")
    return folder


def row(releases, python, arguments):
    """A line of the table, and whether all tests have passed."""
    folder = environment(releases, python)
    listed = json.loads(uv("pip", "list", "--python", folder, "--format", "json"))
    versions = {package["name"]: package["version"] for package in listed}
    report = folder / "report.xml"
    done = subprocess.run(
        [folder / "bin" / "python", "-m", "pytest", f"--junitxml={report}", *arguments], cwd=ROOT
    )
    suite = ElementTree.parse(report).getroot()[0]
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    skipped = int(suite.get("skipped"))
    passed = int(suite.get("tests")) - failed - skipped
    cells = [releases, Path(python).name.removeprefix("python"), *map(versions.get, PACKAGES)]
    cells += [passed, failed, skipped, round(float(suite.get("time")))]
    return "| " + " | ".join(map(str, cells)) + " |", done.returncode == 0


def main():
    """Runs the suites one after the other, then prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.versions", description=__doc__)
    parser.add_argument("--only", choices=RESOLUTIONS)
    parser.add_argument(
        "--python",
        action="append",
        help="as uv takes it: 3.12, or a path; may be given again, the first is for the oldest",
    )
    parser.add_argument("pytest", nargs="*")
    options = parser.parse_args()
    pythons = options.python or supported_pythons()
    pairs = [("oldest", pythons[0]), *(("newest", python) for python in pythons)]
    rows = [row(*pair, options.pytest) for pair in pairs if options.only in (None, pair[0])]
    head = ["releases", "Python", *PACKAGES, "passed", "failed", "skipped", "seconds"]
    print("| " + " | ".join(head) + " |", "|" + " --- |" * len(head), sep="\n")
    print(*(line for line, _ in rows), sep="\n")
    return not all(passed for _, passed in rows)


if __name__ == "__main__":
    sys.exit(main())
