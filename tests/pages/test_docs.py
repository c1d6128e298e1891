"""The code that README.md and the pages of docs/ show runs, and prints what they say.

The `python` blocks of a page run one after the other in one namespace. A `text` block is what the
block before it has printed. `pycon` blocks are doctests. A block after ``<!-- skip: next -->`` is
left out, and ``<!-- invisible-code: python ... -->`` runs unseen.
"""

import contextlib
import doctest
import importlib.util
import io
import re
import shlex

import pytest
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

from l1inf_optax.experiments.__main__ import make_parser
from tests.support import children

PAGES = [children.ROOT / "README.md", *sorted((children.ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"\d[\d.,]*\d|\d")


def run(example):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        PythonEvaluator()(example)
    example.namespace["printed"] = printed.getvalue()


def compare(example):
    """Word for word; numbers to ten percent or, of what is counted, two: JAX and CPUs differ."""
    printed, shown = example.namespace["printed"], example.parsed
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        most = 2 * ("." not in theirs)
        expected = pytest.approx(float(theirs.replace(",", "")), rel=0.1, abs=most)
        assert float(ours.replace(",", "")) == expected, printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(children.ROOT)))
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page):
    parsers = [
        CodeBlockParser("python", run),
        CodeBlockParser("text", compare),
        DocTestParser(doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE),
        SkipParser(),
    ]
    for example in Sybil(parsers).parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(children.ROOT)))
def test_the_commands_of_a_page_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m ((?:docs|l1inf_optax|tests)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for options in re.findall(
        r"python -m l1inf_optax\.experiments ((?:--distributed|[a-z])[^`'#\n]*)", text
    ):
        make_parser().parse_args(shlex.split(options))
