import dataclasses
import html.parser
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l1inf_optax as l1inf

V = np.array(
    [  # bias, then three inputs; four units
        [0.0, 0.5, 0.0, 0.0],
        [1.0, 0.5, 0.0, 2e-4],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, -0.25, 0.0, 0.5],
    ],
    np.float32,
)
PARAMS = {
    "hidden": {"augmented_kernel": jnp.asarray(V)},
    "readout": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
    "norm": {"scale": jnp.zeros(9)},
}


def test_every_count_is_the_count_by_hand():
    report = l1inf.sparsity_report(PARAMS, c={"hidden": 1.25}, threshold=1e-3)
    (layer,) = report.layers
    assert layer.used.tolist() == [True, False, True]
    assert {key: x for key, x in dataclasses.asdict(layer).items() if key != "used"} == {
        "path": "hidden",
        "shape": (4, 4),
        "entries": 16,
        "zeros": 10,
        "below_threshold": 11,
        "largest_norm": 1.25,
        "columns": 4,
        "columns_on_boundary": 1,
        "empty_columns": 1,
        "inputs": 3,
        "unused_inputs": 1,
    }
    assert layer.sparsity == 62.5


def test_inputs_are_named_by_index_or_name():
    report = l1inf.sparsity_report({"params": PARAMS})
    names = ["age", "height", "weight"]
    for path in ("params/hidden", "hidden"):
        np.testing.assert_array_equal(report.used_inputs(path), [0, 2])
        np.testing.assert_array_equal(report.unused_inputs(path), [1])
        assert report.used_inputs(path, names) == ["age", "weight"]
        assert report.unused_inputs(path, names) == ["height"]
        (name,) = report.unused_inputs(path, np.array(names))
        assert type(name) is str
    for wrong in ("hid", "", "hidden_0"):
        with pytest.raises(ValueError, match=r"layer=.* 0 layers: name one of params/hidden, "):
            report.used_inputs(wrong)
    with pytest.raises(ValueError, match="names has 2 entries, but 'params/hidden' has 3 inputs"):
        report.used_inputs("hidden", names[:2])
    twice = l1inf.sparsity_report({"a": PARAMS, "b": PARAMS})
    with pytest.raises(ValueError, match="2 layers: name one of a/hidden"):
        twice.used_inputs("hidden")


def test_inputs_of_a_stack_have_the_index_of_their_layer_first():
    kernel = jnp.zeros((2, 3, 4)).at[1, 2, 0].set(1).at[0, 1, 3].set(1)
    layers = {"*": l1inf.LayerDimensionNumbers(1, 2)}
    report = l1inf.sparsity_report({"kernel": kernel}, layers=layers)
    path = report.layers[0].path
    np.testing.assert_array_equal(report.used_inputs(path), [[0, 1], [1, 2]])
    assert report.used_inputs(path, list("abc")) == ["b", "c"]


def test_a_report_is_rows_of_numbers():
    report = l1inf.sparsity_report(PARAMS, c={"hidden": 1.25}, threshold=1e-3)
    as_dict = json.loads(json.dumps(report.to_dict()))
    (row,) = as_dict["layers"]
    assert row["path"] == "hidden"
    assert row["zeros"] == as_dict["total"]["zeros"] == 10
    assert row["sparsity"] == 62.5
    assert as_dict["threshold"] == 1e-3
    assert {type(x) for x in row.values()} <= {str, int, float, list}
    assert "used" not in row


def test_without_a_radius_every_layer_is_reported_and_no_boundary():
    report = l1inf.sparsity_report(PARAMS)
    assert [layer.path for layer in report.layers] == ["hidden", "readout"]
    assert [layer.columns_on_boundary for layer in (*report.layers, report.total)] == [None] * 3
    assert "boundary" not in str(report) + report._repr_html_()
    assert [layer.shape for layer in report.layers] == [(4, 4), (3, 3)]
    assert report.layers[0].below_threshold is None


def test_the_total_adds_counts_and_takes_the_largest_norm():
    total = l1inf.sparsity_report(PARAMS, threshold=1e-3).total
    assert (total.entries, total.zeros, total.below_threshold) == (25, 13, 14)
    assert (total.largest_norm, total.columns, total.inputs) == (2.0, 7, 5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_projected_columns_are_on_the_boundary(dtype):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(40, 9)), dtype)
    params = l1inf.project_params({"kernel": kernel.at[:, 0].multiply(1e-3)}, 0.7)
    (layer,) = l1inf.sparsity_report(params, c=0.7).layers
    assert layer.columns_on_boundary == 8


def test_convolutions_and_stacked_layers_are_matrices():
    conv = {"kernel": jnp.zeros((3, 3, 2, 4)).at[:, :, 1].set(1.0), "bias": jnp.zeros(4)}
    stacked = {"kernel": jnp.ones((5, 2, 3)), "bias": jnp.zeros((5, 3))}
    first, second = l1inf.sparsity_report({"a": conv, "b": stacked}).layers
    assert (first.shape, first.inputs, first.unused_inputs) == ((19, 4), 18, 9)
    assert (second.shape, second.columns, second.inputs) == ((5, 3, 3), 15, 10)


# name: shape of the kernel, dimension numbers. Norms and c of a column meet in the kernel's order.
ORDERS = {
    "heads": ((4, 2, 3), l1inf.LayerDimensionNumbers(0, (1, 2))),
    "units before inputs in a stack": ((3, 4, 3), l1inf.LayerDimensionNumbers(1, 0)),
    "stack on the last axis": ((4, 3, 2), l1inf.LayerDimensionNumbers(0, 1)),
    "inputs on two axes": ((2, 3, 4), l1inf.LayerDimensionNumbers((0, 2), 1)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_radius_for_each_column_meets_its_own_column(name):
    shape, numbers = ORDERS[name]
    axes = np.atleast_1d(numbers.reduction_axis)
    columns = tuple(n for i, n in enumerate(shape) if i not in axes)
    c = np.arange(1.0, 1 + np.prod(columns)).reshape(columns)
    w = np.ones(shape) / np.prod([shape[i] for i in axes]) * np.expand_dims(c, tuple(axes))
    w = np.where(np.expand_dims(c == 2, tuple(axes)), w / 2, w)  # one column is inside
    params, layers = {"w": jnp.asarray(w, jnp.float32)}, {"w": numbers}
    (layer,) = l1inf.sparsity_report(params, c={"w": c}, layers=layers).layers
    assert (layer.columns, layer.columns_on_boundary) == (c.size, c.size - 1)
    tx = l1inf.keep_params_in_l1inf_ball({"w": c}, layers=layers)
    assert not l1inf.diagnose(tx, params, {"w": c}, layers=layers).findings


def test_a_radius_that_fits_no_column_is_an_error():
    with pytest.raises(ValueError, match=r"c has shape \(3,\).*\(4,\)"):
        l1inf.sparsity_report(PARAMS, c={"hidden": np.ones(3)})


def test_a_schedule_is_read_where_the_last_update_read_it():
    c = {"hidden": lambda step: 2.0 / (1 + step)}
    params = {"hidden": {"kernel": jnp.array([[1.5, 0.2], [1.5, 0.2]])}}
    tx = optax.chain(optax.sgd(0.1), l1inf.keep_params_in_l1inf_ball(c))
    state = tx.init(params)

    def on_boundary(**kwargs):
        return l1inf.sparsity_report(params, c=c, **kwargs).total.columns_on_boundary

    assert on_boundary(state=state) == on_boundary() == 1
    for radius in (2.0, 1.0):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        assert l1inf.sparsity_report(params).total.largest_norm == pytest.approx(radius)
        assert on_boundary(state=state) == 1
    assert on_boundary() == 0, "at step 0 the radius is 2"


def test_a_state_without_a_ball_is_an_error():
    with pytest.raises(ValueError, match="state, a tuple, holds no state of keep_params"):
        l1inf.sparsity_report(PARAMS, c=1.0, state=optax.sgd(0.1).init(PARAMS))


def test_it_prints_as_an_aligned_table():
    lines = str(l1inf.sparsity_report(PARAMS, threshold=1e-3)).splitlines()
    assert "below 0.001" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["hidden", "readout"]
    assert "4 x 4  62.50%       68.75%" in lines[2]
    ends = {len(line) for line in lines}
    assert len(ends) == 1, "the last column is flush right"


def test_it_renders_as_one_html_table_with_names_escaped():
    class Cells(html.parser.HTMLParser):
        cells = 0

        def handle_starttag(self, tag, attrs):
            self.cells += tag in ("td", "th")

    params = {"<script>": PARAMS["hidden"]}
    text = l1inf.sparsity_report(params)._repr_html_()
    parser = Cells()
    parser.feed(text)
    assert parser.cells == 3 * 6
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_layer_of_the_network_that_was_trained_is_reported_as_it_is():
    model = l1inf.linen.AugmentedMLP((30, 5))
    params = model.init(jax.random.key(0), jnp.ones((1, 20)))
    params = l1inf.project_params(params, {"hidden_*": 0.2})
    kernel = np.asarray(params["params"]["hidden_0"]["augmented_kernel"])
    (layer,) = l1inf.sparsity_report(params, c={"hidden_*": 0.2}).layers
    assert layer.zeros == np.count_nonzero(kernel == 0) > 0
    assert layer.largest_norm == pytest.approx(0.2, rel=1e-6)


def test_an_unknown_pattern_is_an_error():
    with pytest.raises(ValueError, match="matches nothing"):
        l1inf.sparsity_report(PARAMS, c={"hiden": 1.0})
