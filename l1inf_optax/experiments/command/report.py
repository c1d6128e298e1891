"""Results for readers (a table) and for programs (JSON), in the columns of the paper's tables."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from numpy.typing import ArrayLike
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from l1inf_optax import _lanes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What an experiment may vary beside c, and what it measures: name to heading and format.
VARIED = {
    "samples": ("samples", "{:d}"),
    "hidden_layers": ("hidden layers", "{:d}"),
    "rate": ("rate", "{:g}"),
}
COLUMNS = {
    "train_error": ("train err", "{:.3f}"),
    "test_error": ("test err", "{:.3f}"),
    "paper_test_error": ("(paper)", "{:.3f}"),
    "generalization_error": ("gen err", "{:.3f}"),
    "test_accuracy": ("test acc %", "{:.2f}"),
    "paper_test_accuracy": ("(paper)", "{:.2f}"),
    "sparsity": ("zeros %", "{:.1f}"),
    "sparsity_1e-3": ("<1e-3 %", "{:.1f}"),
    "paper_sparsity": ("(paper)", "{:.1f}"),
}

Row = dict[str, Any]  # of results, as JSON has it: see `rows`

PACKAGES = ("l1inf-optax", "jax", "jaxlib", "optax", "flax", "numpy")


@contextmanager
def training_bar(console: Console, steps: int) -> Iterator[Callable[[_lanes.Progress], None]]:
    """A progress bar over ``steps`` minibatches, with the latest loss and exact zeros.

    Yields:
        The ``watch`` for `_lanes.train`. It shows the range over all networks.
    """
    columns = (
        BarColumn(bar_width=20),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]}, zeros {task.fields[zeros]} %"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps, loss="-", zeros="-")

        def watch(progress: _lanes.Progress) -> None:
            loss, zeros = _range(progress.loss, "{:.3f}"), _range(progress.sparsity, "{:.0f}")
            bar.update(task, completed=progress.step, loss=loss, zeros=zeros)

        yield watch


def rows(lanes: Sequence[_lanes.Lane], measured: Mapping[str, np.ndarray]) -> list[Row]:
    """One row per c: means and standard deviations over its trials.

    Args:
        lanes: what was trained.
        measured: name to ``(lanes,)`` values.

    Returns:
        Rows in the order in which the lanes first name each c, with the keys c, trials, the names,
        and std, which holds the names again: the sample standard deviations, 0 for a single trial.
    """
    table = []
    for c in dict.fromkeys(lane.c for lane in lanes):
        own = np.array([lane.c == c for lane in lanes])
        values = {name: v[own] for name, v in measured.items()}
        table.append({"c": c, "trials": int(own.sum()), **summary(values)})
    return table


def beside_the_paper(row: Row, paper: Mapping[float, Sequence[float]], *names: str) -> Row:
    """A row with what the paper has for its c, where it has that c.

    Args:
        row: as `rows` makes it.
        paper: c to figures of the paper.
        names: those of the figures; their columns are called ``paper_`` and the name.
    """
    figures = paper.get(row["c"], ())
    return row | {f"paper_{name}": value for name, value in zip(names, figures, strict=False)}


def summary(measured: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Means over the trials, and in std their sample standard deviations, 0 for a single trial.

    Args:
        measured: name to ``(trials,)`` values.
    """
    values = {name: np.asarray(v, np.float64) for name, v in measured.items()}
    spread = {name: float(v.std(ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()}
    return {**{name: float(v.mean()) for name, v in values.items()}, "std": spread}


def print_table(console: Console, title: str, table: Sequence[Row]) -> None:
    """Print rows in the paper's columns, as mean ± standard deviation over the trials.

    A column without a standard deviation, such as a figure of the paper, is printed as it is.
    """
    out = _table(title, table, "±")
    unlimited = console.options.update(max_width=1000)
    wanted = console.measure(out, options=unlimited).maximum
    if wanted > console.width:  # no figure is cut: its spread goes below it
        out = _table(title, table, "\n±")
    console.print(out)


def _table(title: str, table: Sequence[Row], separator: str) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    out.add_column("c", justify="right")
    columns = VARIED | COLUMNS
    names = [name for name in columns if any(name in row for row in table)]
    for name in names:
        out.add_column(columns[name][0], justify="right")
    for row in table:
        cells = ["∞" if math.isinf(row["c"]) else f"{row['c']:g}"]
        for name in names:
            number = columns[name][1].format
            mean = number(row[name]) if name in row else ""
            has_spread = name in row["std"] and row["trials"] > 1
            cells.append(f"{mean}{separator}{number(row['std'][name])}" if has_spread else mean)
        out.add_row(*cells)
    return out


def write_json(
    path: Path,
    experiment: str,
    settings: DataclassInstance,
    table: Sequence[Row],
    **more: Any,
) -> None:
    """Write settings, versions and rows to ``path``.

    JSON has no word for what is not finite, so ``null`` stands for c = inf, and for the results of
    a training that diverged.

    Args:
        path: the file to write.
        experiment: the command's name.
        settings: what the run was asked to do.
        table: rows as `rows` makes them.
        **more: further entries of the document.
    """
    document = {
        "experiment": experiment,
        "settings": asdict(settings),
        "versions": _versions(),
        "rows": table,
        **more,
    }
    path.write_text(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")


def device() -> str:
    """What computes, as its maker calls it, such as ``1 x NVIDIA H100 80GB HBM3``."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return versions


def _range(values: np.ndarray, number: str) -> str:
    low, high = (number.format(v) for v in (values.min(), values.max()))
    return low if low == high else f"{low}-{high}"
