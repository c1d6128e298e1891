"""The command from its arguments to the files it writes, on digits small enough to be quick."""

import json
import shutil
import struct
import sys

import matplotlib.image
import numpy as np
import pytest

from l1inf_optax.experiments.__main__ import main
from tests.support import children
from tests.support.digits import COMMON, blobs

MEASURES = {
    "train_error",
    "test_error",
    "generalization_error",
    "test_accuracy",
    "sparsity",
    "sparsity_1e-3",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "blobs.npz"
    rng = np.random.default_rng(0)
    x_train, y_train = blobs(60, rng)
    x_test, y_test = blobs(20, rng)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def run(digits, out, *more):
    assert main([*COMMON, "--data", str(digits), "--out", str(out), *more]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def result(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return run(digits, out), out


def test_the_json_has_the_promised_keys(result):
    document, _ = result
    assert set(document) == {"experiment", "settings", "versions", "rows"}
    assert document["experiment"] == "mnist"
    assert document["settings"] == {
        "c": [None, 0.5, 3.0],
        "epochs": 4,
        "batch_size": 10,
        "trials": 2,
        "seed": 0,
        "optimizer": "momentum",
        "learning_rate": 0.2,
        "data": "blobs.npz",
    }
    assert {"python", "jax", "optax", "flax", "numpy"} <= set(document["versions"])
    assert [row["c"] for row in document["rows"]] == [None, 0.5, 3.0]
    for row in document["rows"]:
        assert set(row) == {"c", "trials", "std"} | MEASURES
        assert set(row["std"]) == MEASURES
        assert row["trials"] == 2
        for name in MEASURES:
            assert isinstance(row[name], float)
            assert row["std"][name] >= 0


def test_the_json_names_no_folder(result, digits):
    _, out = result
    text = (out / "results.json").read_text()
    assert str(digits.parent) not in text
    assert str(out) not in text


def test_the_numbers_make_sense(result):
    document, _ = result
    free, small, large = document["rows"]
    for row in document["rows"]:
        assert 0 <= row["sparsity"] <= row["sparsity_1e-3"] <= 100
        gap = abs(row["test_error"] - row["train_error"])
        assert row["generalization_error"] >= gap - 1e-6
    assert free["sparsity"] < 0.5
    assert free["test_accuracy"] > 90
    assert large["sparsity"] > 10
    assert small["sparsity"] > large["sparsity"]
    assert small["train_error"] > free["train_error"]


def test_the_figures_are_written_and_not_blank(result):
    _, out = result
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "tradeoff.png",
        "weights.png",
    }
    for name in ("tradeoff.png", "weights.png"):
        pixels = matplotlib.image.imread(out / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_the_same_seed_gives_the_same_rows(result, digits, tmp_path):
    document, _ = result
    assert run(digits, tmp_path)["rows"] == document["rows"]


def test_a_run_with_checkpoints_goes_on_by_itself(digits, tmp_path):
    few = ["--epochs", "40", "--trials", "1", "--c", "0.5"]  # three compiled calls
    expected = run(digits, tmp_path / "plain", *few)
    folder = tmp_path / "checkpoints"
    for out in ("first", "second"):
        document = run(digits, tmp_path / out, *few, "--checkpoint", str(folder))
        assert document == expected
        *before, last = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=step_of)
        assert [step_of(p) for p in before] == [96, 192]
        shutil.rmtree(last)
    with pytest.raises(SystemExit):
        run(digits, tmp_path / "other", *few, "--seed", "1", "--checkpoint", str(folder))


def step_of(path):
    return int(path.name)


def test_another_seed_gives_other_rows_in_the_papers_columns(result, digits, tmp_path, capsys):
    other = run(digits, tmp_path, "--seed", "1")
    for row, before in zip(other["rows"], result[0]["rows"], strict=True):
        assert row["test_error"] != before["test_error"]
    out = capsys.readouterr().out
    for heading in ("train err", "test err", "gen err", "test acc %", "zeros %"):
        assert heading in out
    assert "±" in out
    assert "…" not in out


def test_quick_chooses_less_and_yields_to_what_is_said(digits, tmp_path):
    arguments = ["mnist", "--quick", "--data", str(digits), "--out", str(tmp_path)]
    assert main([*arguments, "--c", "inf", "--epochs", "1", "--optimizer", "sgd"]) == 0
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["trials"] == 2
    assert settings["c"] == [None]
    assert settings["epochs"] == 1
    assert settings["optimizer"] == "sgd"
    assert (tmp_path / "weights.png").stat().st_size > 10_000  # without constrained networks


WRONG = {
    "no command": ([], "NAME"),
    "unknown command": (["cifar"], "cifar"),
    "negative c": (["mnist", "--c", "-1"], "-1"),
    "zero c": (["mnist", "--c", "1", "0"], "'0' is not a positive number or inf"),
    "c that is no number": (["mnist", "--c", "nan"], "'nan' is not a positive number or inf"),
    "no c": (["mnist", "--c"], "--c"),
    "half an epoch": (["mnist", "--epochs", "0.5"], "'0.5' is not a whole number from 1 on"),
    "no trials": (["mnist", "--trials", "0"], "'0' is not a whole number from 1 on"),
    "negative seed": (["mnist", "--seed", "-3"], "--seed"),
    "infinite rate": (["mnist", "--learning-rate", "inf"], "'inf' is not a finite number"),
    "unknown optimizer": (["mnist", "--optimizer", "lion"], "lion"),
    "missing data": (["mnist", "--data", "nowhere.npz"], "nowhere.npz: no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_ends_in_one_line(case, capsys):
    arguments, complaint = WRONG[case]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error.splitlines()[-1]
    assert "Traceback" not in error


def test_bad_data_ends_in_one_line(digits, tmp_path, capsys):
    content = struct.pack(">2I", 0x801, 0)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main(["mnist", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train-images-idx3-ubyte" in error
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_ends_in_one_line(digits, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["mnist", "--data", str(digits), "--out", str(digits)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--out" in error


@pytest.mark.parametrize("package", ["rich", "matplotlib", "mlxtend"])
def test_a_missing_package_ends_in_one_line_that_names_the_extra(package, tmp_path):
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from l1inf_optax.experiments.__main__ import main\n"
        f"main(['mnist', '--out', {str(tmp_path)!r}])"
    )
    done = children.run([sys.executable, "-c", program])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert package in done.stderr
    assert 'pip install "l1inf-optax[experiments]"' in done.stderr


def test_help_lists_the_experiments():
    done = children.run([sys.executable, "-m", "l1inf_optax.experiments", "--help"])
    assert done.returncode == 0
    assert "mnist" in done.stdout
    assert done.stderr == ""


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["mnist", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for option in ("--c", "--optimizer", "--epochs", "--batch-size", "--trials", "--seed", "--out"):
        assert f"{option} " in out
