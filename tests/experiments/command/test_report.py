"""Tables for readers and for programs, from numbers known beforehand."""

import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from l1inf_optax._lanes import Lane
from l1inf_optax.experiments.command import report

LANES = [Lane(t, c) for t in range(3) for c in (np.inf, 0.5)]
ROWS = report.rows(LANES, {"test_error": np.array([1.0, 10, 2, 20, 6, 60])})


def test_a_row_has_mean_and_sample_standard_deviation_over_its_trials():
    free, inside = ROWS
    assert (free["c"], free["trials"], free["test_error"]) == (np.inf, 3, 3.0)
    assert free["std"]["test_error"] == pytest.approx(7**0.5)
    assert (inside["c"], inside["test_error"]) == (0.5, 30.0)
    assert report.rows(LANES[:1], {"test_error": np.ones(1)})[0]["std"] == {"test_error": 0.0}


def test_the_table_prints_what_has_no_spread_as_it_is():
    out = Console(file=io.StringIO(), width=200)
    report.print_table(out, "title", [ROWS[0], {**ROWS[1], "paper_test_error": 2.14}])
    *_, head, _, free, inside = (
        line.split() for line in out.file.getvalue().splitlines() if line.strip()
    )
    assert head == ["c", "test", "err", "(paper)"]
    assert free == ["∞", "3.000±2.646"]
    assert inside == ["0.5", "30.000±26.458", "2.140"]


def test_the_table_says_what_was_varied_beside_c():
    out = Console(file=io.StringIO(), width=200)
    report.print_table(out, "title", [{**row, "samples": 125} for row in ROWS])
    lines = [line.split() for line in out.file.getvalue().splitlines() if line.strip()]
    assert lines[1][:2] == ["c", "samples"]
    assert [line[:2] for line in lines[-2:]] == [["∞", "125"], ["0.5", "125"]]


def test_a_narrow_table_cuts_no_figure():
    wide = {name: 12.345 for name in report.COLUMNS if "accuracy" not in name}
    spread = {name: 1.234 for name in wide if "paper" not in name}
    row = {"c": 0.5, "trials": 2, **wide, "std": spread}
    out = Console(file=io.StringIO(), width=80)
    report.print_table(out, "title", [row])
    text = out.file.getvalue()
    assert "…" not in text
    assert text.count("±1.234") == 3
    assert max(map(len, text.splitlines())) <= 80


@dataclass(frozen=True)
class Settings:
    c: tuple[float, ...]


def test_json_says_null_for_what_is_not_finite_and_takes_further_entries(tmp_path):
    path = tmp_path / "results.json"
    report.write_json(path, "name", Settings((np.inf,)), ROWS, more={"x": float("nan")})
    document = json.loads(path.read_text())
    assert document["rows"][0]["c"] is None
    assert document["settings"] == {"c": [None]}
    assert document["more"] == {"x": None}
