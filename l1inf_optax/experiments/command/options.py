"""What the experiments' commands have in common: options, settings, and how a value is checked.

An experiment says in a frozen dataclass what can be set: its fields are the settings, its values
the defaults. Another instance has what ``--quick`` takes instead.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")  # the settings of one experiment


class OptionError(ValueError):
    """An option's value that only turns out wrong when it is used, in one sentence."""


def positive_int(text: str) -> int:
    """A whole number from 1 on."""
    return _whole_number(text, 1, math.inf, "from 1 on")


def natural_int(text: str) -> int:
    """A whole number from 0 to 2^32 - 1: what a random seed may be."""
    return _whole_number(text, 0, 2**32 - 1, "from 0 to 2^32 - 1")


def _whole_number(text: str, least: float, most: float, name: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number {name}")
    return value


def positive_float(text: str) -> float:
    """A positive, finite number."""
    value = radius(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def radius(text: str) -> float:
    """A normalization constant: a positive number, or ``inf`` for no constraint."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number or inf")
    return value


def add_output_option(parser: argparse.ArgumentParser, default: str) -> None:
    """``--out``, the folder that an experiment writes to: see `make_folder`."""
    parser.add_argument(
        "--out",
        default=default,
        metavar="DIR",
        help="folder for results and figures (default: %(default)s)",
    )


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``, the folder that a run goes on from if it was stopped."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="keep the state of the training here, and go on from it if there is one",
    )


def make_folder(name: str, option: str = "--out") -> Path:
    """The folder to write to, made if need be: better before the training than after it.

    Raises:
        OptionError: if there can be no such folder.
    """
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"{option} {name}: {reason}; name another folder") from error
    return path


def add_option(
    parser: argparse.ArgumentParser,
    defaults: DataclassInstance,
    flag: str,
    text: str,
    **more: Any,
) -> None:
    """An option that stays absent from the namespace if it is not given.

    So `settings` can tell a default from a choice.

    Args:
        parser: the experiment's parser.
        defaults: the experiment's settings when an option is not given; its help shows this one's.
        flag: its name, such as ``--batch-size``.
        text: help.
        **more: what ``add_argument`` takes.
    """
    default = _shown(getattr(defaults, _field(flag)))
    text = f"{text} (default: {default})"
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **more)


def add_training_options(parser: argparse.ArgumentParser, defaults: S, quick: S) -> None:
    """The options of every experiment that trains networks, as `add_option` declares them.

    Args:
        parser: the experiment's parser.
        defaults: the experiment's settings when an option is not given. Of c, epochs, batch_size,
            trials, starts and seed it has an option for those that are named here.
        quick: what ``--quick`` takes instead.
    """
    names = {field.name for field in fields(defaults)}

    def add(flag: str, kind: Any, text: str, **more: Any) -> None:
        if _field(flag) in names:
            add_option(parser, defaults, flag, text, type=kind, **more)

    add("--c", radius, "normalization constants; inf: no constraint", nargs="+", metavar="C")
    add("--epochs", positive_int, "passes over the training data", metavar="N")
    add("--batch-size", positive_int, "examples per minibatch", metavar="N")
    add("--trials", positive_int, "networks to train for every c", metavar="N")
    add("--starts", positive_int, "of which the lowest training error is kept", metavar="N")
    add("--seed", natural_int, "of everything random", metavar="N")
    changed = changes(defaults, quick)
    instead = ", ".join(f"--{k.replace('_', '-')} {_shown(v)}" for k, v in changed.items())
    parser.add_argument("--quick", action="store_true", help=f"a first look: {instead}")


def settings(args: argparse.Namespace, defaults: S, quick: S) -> S:
    """The settings of a run: what was chosen, then what ``--quick`` asks, then the defaults."""
    names = {field.name for field in fields(defaults)}
    chosen = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in names
    }
    return replace(quick if args.quick else defaults, **chosen)


def changes(defaults: S, quick: S) -> dict[str, Any]:
    """The settings that ``--quick`` changes, in the order of the fields."""
    values = {field.name: getattr(quick, field.name) for field in fields(quick)}
    return {name: value for name, value in values.items() if value != getattr(defaults, name)}


def _field(flag: str) -> str:
    """The setting of an option such as ``--batch-size``."""
    return flag.removeprefix("--").replace("-", "_")


def _shown(value: Any) -> str:
    """As one would type it."""
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{v:g}" if isinstance(v, int | float) else str(v) for v in values)
