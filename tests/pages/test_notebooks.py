"""The notebooks run from top to bottom, quickly and without a word of warning.

Pytest's filters do not reach a notebook's kernel. There PYTHONWARNINGS shows every warning, and
whatever is written to stderr fails the test.

`jupyter nbconvert --clear-output --inplace notebooks/*.ipynb` strips them and lays them out as
asked for here.
"""

import os
import re
import resource
from tempfile import TemporaryDirectory

import matplotlib.font_manager  # noqa: F401, makes its cache: in a notebook it would say so
import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from tests.support import children

FOLDER = children.ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
EVERY = pytest.mark.parametrize("name", NAMES)
# Flax 0.12.0 looks for two names as it is imported that are deprecated on JAX 0.8.0.
OLD = "jax.array_ref is deprecated", "jax.ArrayRef is deprecated"
SHOWN = ",".join(["default", *(f"ignore:{message}" for message in OLD)])
TIME_LIMIT = 120  # processor seconds: wall time would depend on what else runs


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def processor_time():
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_there_are_the_seven():
    assert set(NAMES) == {
        "quickstart",
        "projection",
        "classification",
        "choosing_c",
        "any_optimizer",
        "bounds",
        "scaling",
    }


@EVERY
def test_it_runs_without_warnings_in_time(name):
    notebook, before = read(name), processor_time()
    environment = {**os.environ, "PYTHONPATH": str(children.ROOT), "PYTHONWARNINGS": SHOWN}
    resources = {"metadata": {"path": str(FOLDER)}}
    with TemporaryDirectory() as sockets:  # files, as a port may be taken before a kernel has it
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            resources=resources,
            config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
            timeout=children.PATIENCE,  # for a cell
            iopub_timeout=children.PATIENCE,  # what it shows would be lost after that
        )
        client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert processor_time() - before < TIME_LIMIT


@EVERY
def test_outputs_are_stripped(name):
    for cell in read(name).cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@EVERY
def test_the_file_is_laid_out_so_that_a_diff_shows_what_has_changed(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == nbformat.writes(read(name)) + "\n"


@EVERY
def test_it_has_one_title_and_first_installs_what_is_missing(name):
    title, first, *others = read(name).cells
    assert title.source.startswith("# ")
    assert not any(cell.cell_type == "markdown" and cell.source.startswith("# ") for cell in others)
    assert re.match(r"try:\n    import .*\nexcept ImportError:.*\n    %pip install", first.source)


@EVERY
def test_its_links_lead_to_other_notebooks(name):
    text = "".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (FOLDER / link).suffix == ".ipynb"
        assert (FOLDER / link).exists()
