"""The settings that come out of a command line."""

import argparse
import json
from dataclasses import FrozenInstanceError, asdict, dataclass

import pytest

from l1inf_optax.experiments.command import options


@dataclass(frozen=True)
class Settings:
    c: tuple[float, ...] = (float("inf"), 2.0)
    epochs: int = 30
    seed: int = 0
    name: str | None = None


DEFAULTS = Settings()
QUICK = Settings(c=(0.5,), epochs=4)


def parser():
    made = argparse.ArgumentParser()
    options.add_training_options(made, DEFAULTS, QUICK)
    options.add_output_option(made, "results")
    return made


def settings(*arguments):
    return options.settings(parser().parse_args(arguments), DEFAULTS, QUICK)


def test_what_was_chosen_comes_before_quick_and_quick_before_the_defaults():
    assert settings() == DEFAULTS
    assert settings("--quick") == QUICK
    assert settings("--quick", "--epochs", "30") == Settings(c=(0.5,), epochs=30)
    assert settings("--c", "3", "inf", "--seed", "7") == Settings(c=(3.0, float("inf")), seed=7)


def test_settings_stay_as_they_are_and_are_what_json_can_say():
    chosen = settings("--c", "3", "1")
    with pytest.raises(FrozenInstanceError):
        chosen.epochs = 1
    assert json.loads(json.dumps(asdict(chosen))) == {
        "c": [3.0, 1.0],
        "epochs": 30,
        "seed": 0,
        "name": None,
    }


def test_help_shows_the_defaults_and_what_quick_changes():
    text = " ".join(parser().format_help().split())
    assert "inf: no constraint (default: inf 2)" in text
    assert "passes over the training data (default: 30)" in text
    assert "a first look: --c 0.5, --epochs 4 " in text + " "
    assert "--batch-size" not in text
