"""The command from its arguments to the files it writes, with few steps; the rest of its house."""

import json

import jax
import matplotlib.image
import numpy as np
import optax
import pytest

import l1inf_optax as l1inf
from l1inf_optax.experiments.__main__ import main
from l1inf_optax.experiments.beyond import optimizers
from l1inf_optax.linen import AugmentedMLP

ARGUMENTS = [
    *("optimizers", "--optimizers", "adam", "lion", "--rates", "1e-9", "0.01"),
    *("--trials", "2", "--selection-trials", "1"),
    *("--regression-epochs", "10", "--classification-epochs", "1"),
]
RESULTS = {
    (problem, c, optimizer, projection)
    for problem, c in (("regression", 1.0), ("classification", 1.0), ("classification", 0.3))
    for optimizer, projection in (("adam", "chain"), ("adam", "constrain"), ("lion", "chain"))
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "optimizers"
    with pytest.MonkeyPatch.context() as patch:  # what takes time is compiling hidden layers
        small = optimizers.PROBLEMS["classification"]._replace(network=AugmentedMLP((20, 2)))
        patch.setitem(optimizers.PROBLEMS, "classification", small)
        assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), out


def test_the_json_has_the_promised_keys(result):
    document, out = result
    assert set(document) == {"experiment", "settings", "versions", "rows"}
    assert document["experiment"] == "optimizers"
    assert document["settings"] == {
        "optimizers": ["adam", "lion"],
        "rates": [1e-9, 0.01],
        "trials": 2,
        "selection_trials": 1,
        "regression_epochs": 10,
        "classification_epochs": 1,
        "seed": 1,
    }
    assert str(out) not in json.dumps(document)


def test_every_optimizer_has_a_row_for_every_task_and_projection(result):
    rows = result[0]["rows"]
    keys = [(row["problem"], row["c"], row["optimizer"], row["projection"]) for row in rows]
    assert len(keys) == len(RESULTS)
    assert set(keys) == RESULTS
    for row in rows:
        assert row["trials"] == 2
        assert set(row["std"]) == {"test_error", "sparsity"}
        assert row["std"]["test_error"] >= 0
        assert 0 <= row["sparsity"] <= 100


def test_the_rate_is_the_one_with_the_lowest_validation_error(result):
    for row in result[0]["rows"]:
        errors = row["validation_errors"]
        assert len(errors) == 2
        assert row["rate"] == [1e-9, 0.01][int(np.argmin(errors))]
    by_task = {(r["problem"], r["optimizer"], r["projection"]): r for r in result[0]["rows"]}
    assert by_task["regression", "adam", "constrain"]["rate"] == 0.01


def test_the_table_has_a_line_for_every_optimizer_and_a_dash_where_there_is_no_metric(result):
    head, rule, adam, lion = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in optimizers.markdown(result[0]["rows"]).splitlines()
    )
    assert len(head) == len(rule) == len(adam) == len(lion) == 7
    assert adam[0] == "adam"
    assert all("±" in cell for cell in adam[1:])
    assert lion[0] == "lion"
    assert [cell == "-" for cell in lion[1:]] == 3 * [False, True]


def test_a_result_that_is_not_finite_is_called_diverged(result):
    row = {**result[0]["rows"][0], "test_error": float("nan")}
    assert "diverged" in optimizers.markdown([row])


def test_the_figure_is_written_and_not_blank(result):
    _, out = result
    assert {path.name for path in out.iterdir()} == {"results.json", "errors.png"}
    pixels = matplotlib.image.imread(out / "errors.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("problem", "radius", "bias"),
    [
        ("regression", 1.4 * 0.3, 0.5 * 1.4 * 0.3),
        ("classification", 3 * 0.3, 0.2 * 3 * 0.3),
    ],
)
def test_hidden_units_start_on_the_boundary_with_a_positive_bias(problem, radius, bias):
    task = optimizers.make_task(problem, "sgd", "chain", 10)
    params = task.init(jax.random.key(0), np.float32(0.3))["params"]
    hidden = [layer["augmented_kernel"] for name, layer in params.items() if "hidden" in name]
    assert len(hidden) == len(params) - 1
    for kernel in hidden:
        np.testing.assert_allclose(np.abs(kernel).sum(axis=0), radius, rtol=1e-5)
        np.testing.assert_allclose(kernel[0], bias, rtol=1e-6)


@pytest.mark.parametrize("projection", optimizers.PROJECTIONS)
def test_hidden_units_stay_in_the_falling_ball_and_the_readout_is_free(projection):
    steps = 10
    task = optimizers.make_task("regression", "sgd", projection, steps)
    c = np.float32(0.3)
    params = task.init(jax.random.key(0), c)
    tx = task.optimizer(c, 1.0)
    state, grads = tx.init(params), jax.tree.map(np.ones_like, params)
    norms = []
    for step in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norms.append(l1inf.l1inf_norm(params["params"]["hidden_0"]["augmented_kernel"]))
        if step == 1:  # the first rate is zero, the second the highest
            np.testing.assert_array_equal(updates["params"]["readout"]["kernel"], -1.0)
    assert all(norm <= 1.4 * c for norm in norms)
    assert all(norm <= c for norm in norms[steps // 2 :])
    assert norms[1] > c


def test_the_rate_reaches_every_optimizer():
    for name, make in optimizers.OPTIMIZERS.items():
        params = {"w": np.full((2, 3), 0.5, np.float32)}
        steps = []
        for rate in (1e-3, 1e-1):
            tx = make(optax.constant_schedule(rate))
            updates, _ = tx.update({"w": np.ones((2, 3), np.float32)}, tx.init(params), params)
            steps.append(updates["w"])
        np.testing.assert_allclose(100 * steps[0], steps[1], rtol=1e-4, err_msg=name)


WRONG = {
    "unknown optimizer": (["--optimizers", "adamax"], "adamax"),
    "no rate": (["--rates", "0"], "'0' is not a positive number"),
    "no trials": (["--trials", "0"], "'0' is not a whole number from 1 on"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_ends_in_one_line(case, capsys):
    arguments, complaint = WRONG[case]
    with pytest.raises(SystemExit) as caught:
        main(["optimizers", *arguments])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
