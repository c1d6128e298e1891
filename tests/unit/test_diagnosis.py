"""Each mistake is made here, and what the user then sees is what the troubleshooting page shows."""

import doctest
import html.parser
import itertools
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import l1inf_optax as l1inf
from tests.support import children

PAGE = (children.ROOT / "docs" / "troubleshooting.md").read_text()


def layer(inputs, units, weight=None, bias=0.0):
    """A column has the norm 1 unless a weight is given."""
    weight = 1 / inputs if weight is None else weight
    return {"kernel": jnp.full((inputs, units), weight), "bias": jnp.full(units, bias)}


PARAMS = {"hidden_0": layer(8, 4), "hidden_1": layer(4, 4), "readout": layer(4, 1)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
UNEVEN = jax.tree.map(  # biases without a gradient
    lambda x: jnp.linspace(-1.0, 1.0, x.size).reshape(x.shape) * (x.ndim > 1), PARAMS
)
INPUTS = jnp.eye(8)
TANH = l1inf.linen.AugmentedMLP((16, 3), activation=jnp.tanh)
C = {"hidden_*": 1.0}
KEEP = l1inf.keep_params_in_l1inf_ball(C)
SGD = optax.chain(optax.sgd(0.1), KEEP)


def with_hidden_0(hidden_0):
    return {**PARAMS, "hidden_0": hidden_0}


def numbered(sizes, weight=None):
    return {f"Dense_{i}": layer(n, m, weight) for i, (n, m) in enumerate(itertools.pairwise(sizes))}


def network(params, x):
    for own in params.values():
        x = jax.nn.relu(x @ own["kernel"] * jnp.arange(1, own["bias"].size + 1) + own["bias"])
    return x * jnp.arange(1, 9)[:, None]


class Halved:
    """A schedule with a name to show."""

    def __call__(self, step):
        return 0.5**step

    def __repr__(self):
        return "halved"


halved = Halved()


def masked_without_bias():
    mask = {"hidden_0": {"kernel": True, "bias": False}, "hidden_1": True, "readout": True}
    return optax.masked(KEEP, mask).init(PARAMS)


def with_table():
    return {**PARAMS, "Embed_0": {"embedding": jnp.ones((9, 4))}}


def train_state():
    return TrainState.create(apply_fn=None, params=PARAMS, tx=optax.adam(1e-3))


ERRORS = {
    "forgotten params": lambda: KEEP.update(GRADS, KEEP.init(PARAMS)),
    "a pattern without a match": lambda: l1inf.project_params(PARAMS, {"hiden_*": 1.0}),
    "a pattern that comes too late": lambda: l1inf.project_params(
        PARAMS, {"*": 1.0, "readout": None}
    ),
    "c is not positive": lambda: l1inf.keep_params_in_l1inf_ball(0.0),
    "c is no number": lambda: l1inf.keep_params_in_l1inf_ball("1.0"),
    "c is a list": lambda: l1inf.project_params(PARAMS, [1.0, 2.0]),
    "c is a tree": lambda: l1inf.project_params(PARAMS, {"params": {"hidden_0": 1.0}}),
    "c names what is no layer": lambda: l1inf.project_params(
        with_table(), {"hidden_*": 1.0, "Embed_0": 1.0}
    ),
    "integer weights": lambda: KEEP.init(jax.tree.map(lambda x: x.astype(int), PARAMS)),
    "names of your own": lambda: l1inf.project_params({"W1": jnp.ones((3, 2))}, 1.0),
    "axes in doubt": lambda: l1inf.project_params({"conv": {"kernel": jnp.ones((3, 2, 4))}}, 1.0),
    "layers chosen by layers": lambda: l1inf.project_params(PARAMS, 1.0, layers=["hidden_0"]),
    "the state of something else": lambda: l1inf.keep_params_in_l1inf_ball(1.0).update(
        GRADS, KEEP.init(PARAMS), PARAMS
    ),
    "arguments in another order": lambda: KEEP.update(GRADS, PARAMS, PARAMS),
    "c before the parameters": lambda: l1inf.project_params(1.0, PARAMS),
    "the transformation is not first": lambda: l1inf.diagnose(PARAMS, SGD, C),
    "a pytree for an array": lambda: l1inf.projection_l1inf_ball(PARAMS, 1.0),
    "zeros held from a fraction": lambda: l1inf.keep_params_in_l1inf_ball(1.0, hold_zeros_from=0.8),
    "zeros held from a negative number": lambda: l1inf.keep_params_in_l1inf_ball(
        1.0, hold_zeros_from=-1
    ),
    "stickiness that is no share": lambda: l1inf.keep_params_in_l1inf_ball(1.0, stickiness=2),
    "a radius that falls to nowhere": lambda: l1inf.shrink(over=1000),
    "a radius that falls for a share of training": lambda: l1inf.shrink(1.0, over=0.5),
    "a radius that falls from shapes": lambda: l1inf.keep_params_in_l1inf_ball(
        l1inf.shrink(1.0, over=10)
    ).init(jax.eval_shape(lambda: PARAMS)),
    "more zeros than leave a weight": lambda: l1inf.keep_params_in_l1inf_ball(
        {"hidden_1": l1inf.shrink(zeros=0.9, over=10)}
    ).init(PARAMS),
    "a share of zeros in per cent": lambda: l1inf.prune(95, over=1000),
    "nothing takes up the scale": lambda: l1inf.rescale_params(network, PARAMS, INPUTS, 0.5),
    "a radius whose end is not known": lambda: l1inf.rescale_params(
        network, PARAMS, INPUTS, {"hidden_1": halved}
    ),
    "a network that is not homogeneous": lambda: TANH.rescale(
        TANH.init(jax.random.key(0), INPUTS), 4 * INPUTS, C
    ),
    "the same outputs for all inputs": lambda: l1inf.rescale_params(
        network, jax.tree.map(jnp.zeros_like, PARAMS), INPUTS, C
    ),
    "scales of other parameters": lambda: l1inf.with_scales(
        optax.adam(1e-3), {"hidden_0": 0.1}
    ).init({"readout": jnp.ones(3)}),
    "outputs for no inputs": lambda: l1inf.diagnose(SGD, PARAMS, C, outputs=jnp.ones((1, 3))),
    "a share of no norm": lambda: l1inf.relative_radii(jax.tree.map(jnp.zeros_like, PARAMS), 0.5),
    "a training state for its parameters": lambda: l1inf.project_params(train_state(), C),
    "a module for its parameters": lambda: l1inf.project_params(nn.Dense(3), 1.0),
    "empty parameters": lambda: KEEP.init({}),
    "two leaves of one path": lambda: KEEP.init(
        {"a/b": {"w": jnp.ones((3, 2))}, "a": {"b": {"w": jnp.ones((3, 2))}}}
    ),
    "constrain around a projection": lambda: l1inf.constrain(SGD, C).init(PARAMS),
    "an optimizer without a metric": lambda: l1inf.constrain(optax.lion(1e-3), C).init(PARAMS),
    "a link that mixes or limits entries": lambda: l1inf.constrain(
        optax.chain(optax.centralize(), optax.adam(1e-3)), C
    ).init(PARAMS),
    "half a layer masked": masked_without_bias,
}

# What others raise, or nobody: `test_conformance`, `test_nnx` and `test_linen` make these.
OF_OTHERS = (
    "gradients narrower than the parameters",
    "norms and lora around a layer",
    "export to onnx",
)


def applied_twice():
    updates, state = SGD.update(UNEVEN, SGD.init(PARAMS), PARAMS)
    params = optax.apply_updates(optax.apply_updates(PARAMS, updates), updates)
    return l1inf.diagnose(SGD, params, C, state=state)


def step_too_long():
    return l1inf.diagnose(optax.chain(optax.sgd(1000.0), KEEP), PARAMS, C, grads=UNEVEN)


def after(*links):
    return optax.chain(optax.sgd(0.1), KEEP, *links)


def later(updates):
    """The state after so many updates."""
    return (*SGD.init(PARAMS)[:-1], KEEP.init(PARAMS)._replace(step=jnp.int32(updates)))


def projected_to(c):
    """Columns that differ, all with the norm c."""
    entries = jnp.array([1, 2, 4, 8])
    kernel = jnp.where(jnp.arange(8)[:, None] < entries, c / entries, 0)
    return {"kernel": kernel, "bias": jnp.zeros(4)}


def held_from(start, **kwargs):
    return l1inf.diagnose(
        l1inf.keep_params_in_l1inf_ball(C, hold_zeros_from=start), PARAMS, C, **kwargs
    )


def scheduled(schedule, **kwargs):
    c = {"hidden_*": schedule}
    return l1inf.diagnose(l1inf.keep_params_in_l1inf_ball(c), PARAMS, c, **kwargs)


DEEP = {"Dense_*": 0.05}
FINDINGS = {
    "not kept": lambda: l1inf.diagnose(optax.sgd(0.1), PARAMS, C),
    "not last": lambda: l1inf.diagnose(after(optax.add_decayed_weights(1e-4)), PARAMS, C),
    "another c": lambda: l1inf.diagnose(SGD, PARAMS, {"hidden_*": 2.0}),
    "projected to another c": lambda: l1inf.diagnose(SGD, with_hidden_0(projected_to(0.5)), C),
    "c falls to 0": lambda: scheduled(optax.linear_schedule(1.0, 0.0, 1000)),
    "zeros held from the start": lambda: held_from(0),
    "zeros never held": lambda: held_from(1000, steps=200),
    "few zeros": lambda: l1inf.diagnose(SGD, PARAMS, C, state=later(1000)),
    "wrong optimizer": lambda: l1inf.diagnose(optax.chain(optax.adam(1e-3), KEEP), PARAMS, C),
    "output layer": lambda: l1inf.diagnose(l1inf.keep_params_in_l1inf_ball(1.0), PARAMS, 1.0),
    "starts outside": lambda: l1inf.diagnose(SGD, with_hidden_0(layer(8, 4, 1.0)), C),
    "left the ball": applied_twice,
    "not finite": lambda: l1inf.diagnose(SGD, with_hidden_0(layer(8, 4, jnp.nan)), C),
    "c too small": lambda: l1inf.diagnose(
        l1inf.keep_params_in_l1inf_ball(DEEP),
        {**numbered([4, 4, 4, 4], 0.01), "readout": layer(4, 1)},
        DEEP,
    ),
    "outputs hardly vary": lambda: l1inf.diagnose(
        SGD, PARAMS, C, outputs=jnp.linspace(0, 0.007, 40)[:, None]
    ),
    "c too large": lambda: l1inf.diagnose(
        l1inf.keep_params_in_l1inf_ball({"hidden_*": 10.0}), PARAMS, {"hidden_*": 10.0}
    ),
    "dead units": lambda: l1inf.diagnose(SGD, with_hidden_0(layer(8, 4, 0.0)), C),
    "bias takes c": lambda: l1inf.diagnose(SGD, with_hidden_0(layer(8, 4, 0.005, bias=0.95)), C),
    "batch norm": lambda: l1inf.diagnose(
        SGD, {**PARAMS, "BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, C
    ),
    "weight norm": lambda: l1inf.diagnose(
        l1inf.keep_params_in_l1inf_ball(1.0), {"layer": layer(8, 4), "g": jnp.ones(4)}, 1.0
    ),
    "step too long": step_too_long,
}


@pytest.mark.parametrize(
    ("path", "beside"),
    [
        ("layer_instance", {}),  # of NNX
        ("hidden", {"WeightNorm_0": {"hidden/kernel/scale": jnp.ones(4)}}),  # of Linen
    ],
    ids=["NNX", "Linen"],
)
def test_weight_norms_of_flax_are_told_by_the_names_they_give(path, beside):
    found = l1inf.diagnose(
        l1inf.keep_params_in_l1inf_ball(1.0), {path: layer(8, 4), **beside}, 1.0
    ).findings
    assert [(x.name, x.layers) for x in found if x.name == "weight norm"] == [
        ("weight norm", (path,))
    ]


def words(text):
    return " ".join(text.split())


def shown_under(heading):
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    by_heading = {section.splitlines()[0].replace("`", "").lower(): section for section in sections}
    assert heading in by_heading
    return words(" ".join(re.findall(r"```text\n(.*?)```", by_heading[heading], re.DOTALL)))


@pytest.mark.parametrize("mistake", ERRORS)
def test_the_page_shows_the_error_of(mistake):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the page says what must match
        ERRORS[mistake]()
    assert shown_under(mistake) == words(f"ValueError: {error.value}")


@pytest.mark.parametrize("mistake", FINDINGS)
def test_the_page_shows_the_finding_of(mistake):
    findings = FINDINGS[mistake]().findings
    assert [finding.name for finding in findings] == [mistake]
    assert shown_under(mistake) == words(str(findings[0]))


def test_the_example_on_the_page_runs():
    example = doctest.DocTestParser().get_doctest(PAGE, {}, "troubleshooting.md", None, 0)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_page_has_no_other_entries():
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert [h.replace("`", "").lower() for h in headings] == [*ERRORS, *OF_OTHERS, *FINDINGS]


# --- no false alarms ------------------------------------------------------------------------------


def nothing_wrong(tx, params, c, **kwargs):
    diagnosis = l1inf.diagnose(tx, params, c, **kwargs)
    assert not diagnosis.findings, str(diagnosis)
    return diagnosis


X = jnp.ones((1, 8))


def linen_mlp():
    return l1inf.linen.AugmentedMLP((16, 3)).init(jax.random.key(0), X)


def linen_cnn():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.LayerNorm()(x).mean((1, 2))
            return nn.Dense(4)(x)

    return CNN().init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))


def nnx_mlp():
    return nnx.state(l1inf.nnx.AugmentedMLP(8, (16, 3), rngs=nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize(
    ("make", "c"),
    [
        (linen_mlp, {"hidden_*": 1.0}),
        (linen_mlp, {"hidden_*": 1.0, "readout": 0.5}),
        (linen_cnn, {"Dense_*": None, "*": 1.0}),
        (nnx_mlp, {"hidden_*": optax.linear_schedule(1.0, 0.1, 10)}),
    ],
)
def test_a_fresh_network_in_the_ball_is_well(make, c):
    params = l1inf.project_params(make(), c)
    nothing_wrong(optax.chain(optax.sgd(0.1, momentum=0.9), l1inf.keep_params_in_l1inf_ball(c)),
                  params, c)  # fmt: skip
    nothing_wrong(l1inf.constrain(optax.adam(1e-3), c), params, c)


def test_a_step_of_a_healthy_network_is_well():
    nothing_wrong(SGD, PARAMS, C, grads=UNEVEN)


def test_a_network_whose_c_falls_is_well():
    c = {"hidden_*": optax.exponential_decay(1.0, 1, 0.7)}
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), l1inf.keep_params_in_l1inf_ball(c)), 2)
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(5):
        nothing_wrong(tx, params, c, state=state)
        updates, state = update(UNEVEN, state, params)
        params = optax.apply_updates(params, updates)
    nothing_wrong(tx, params, c, state=state, grads=UNEVEN)


def test_the_network_that_the_readme_trains_is_well():
    readme = (children.ROOT / "README.md").read_text()
    names = {}
    exec(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0], names)
    tx, params, state, c = (names[key] for key in ("tx", "params", "state", "c"))
    x, y, model = (names[key] for key in ("x", "y", "model"))
    grads = jax.grad(lambda params: jnp.mean((model.apply(params, x) - y) ** 2))(params)
    nothing_wrong(tx, params, c, state=state, grads=grads, steps=1500)


@pytest.mark.parametrize(
    "tx",
    [
        optax.named_chain(("sgd", optax.sgd(0.1)), ("ball", KEEP)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.chain(optax.sgd(0.1), KEEP)),
        optax.apply_if_finite(SGD, 3),
        optax.MultiSteps(SGD, 2),
        optax.partition(
            {"ball": SGD, "free": optax.adam(1e-3)},
            {"hidden_0": "ball", "hidden_1": "ball", "readout": "free"},
        ),
        optax.chain(
            optax.masked(optax.adam(1e-3), {"hidden_0": False, "hidden_1": False, "readout": True}),
            KEEP,
        ),
    ],
    ids=["named_chain", "nested chain", "apply_if_finite", "MultiSteps", "partition", "masked"],
)
def test_a_projection_that_is_last_inside_a_wrapper_is_well(tx):
    nothing_wrong(tx, PARAMS, C)


# --- what else it sees ----------------------------------------------------------------------------


def names_found(*args, **kwargs):
    return [finding.name for finding in l1inf.diagnose(*args, **kwargs).findings]


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(SGD, 2),
        optax.partition(
            {"ball": SGD, "free": optax.adam(1e-3)},
            {"hidden_0": "ball", "hidden_1": "ball", "readout": "free"},
        ),
        l1inf.constrain(optax.adam(1e-3), C),
    ],
    ids=["MultiSteps", "partition", "constrain"],
)
def test_another_c_than_that_of_the_transformation_is_found_inside(tx):
    assert names_found(tx, PARAMS, {"hidden_*": 1.5}) == ["another c"]


def test_another_schedule_than_that_of_the_transformation_is_found():
    c, other = ({"hidden_*": optax.linear_schedule(1.0, end, 50)} for end in (0.5, 0.4))
    tx = l1inf.keep_params_in_l1inf_ball(c)
    assert names_found(tx, PARAMS, other) == ["another c"]
    assert names_found(tx, PARAMS, {"hidden_*": 1.0}) == ["another c"]
    assert names_found(KEEP, PARAMS, c) == ["another c"]


def test_the_same_c_written_differently_is_well():
    nothing_wrong(SGD, PARAMS, {"hidden_0": jnp.float32(1), "hidden_1": jnp.ones(4)})
    again, c = ({"hidden_*": optax.linear_schedule(1.0, 0.5, 50)} for _ in range(2))
    nothing_wrong(l1inf.keep_params_in_l1inf_ball(c), PARAMS, again)


def test_a_c_that_is_injected_is_not_guessed():
    tx = optax.inject_hyperparams(lambda c: l1inf.keep_params_in_l1inf_ball({"hidden_*": c}))(c=1.0)
    nothing_wrong(tx, PARAMS, C)


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (optax.linear_schedule(1.0, -1.0, 1000), "0 at step 500"),
        (optax.cosine_decay_schedule(1.0, 300), "0 at step 300"),
        (lambda step: 1.0 - 1e-6 * step, "0 at step 1000000"),
    ],
    ids=["negative", "cosine", "late"],
)
def test_a_schedule_that_leaves_no_ball_is_found_where_it_does(schedule, end):
    (finding,) = scheduled(schedule).findings
    assert (finding.name, finding.severity) == ("c falls to 0", "error")
    assert f"gives {end}" in finding.cause


def test_a_schedule_that_ends_after_the_last_update_is_well():
    schedule = optax.linear_schedule(1.0, 0.0, 1000)
    assert not scheduled(schedule, steps=1000).findings
    assert [f.name for f in scheduled(schedule, steps=1001).findings] == ["c falls to 0"]
    assert not scheduled(optax.exponential_decay(1.0, 100, 0.5)).findings


def test_zeros_are_missed_after_training_where_fewer_than_half_are():
    def found(updates, params=PARAMS, **kwargs):
        diagnosis = l1inf.diagnose(SGD, params, C, state=later(updates), **kwargs)
        return [(finding.name, finding.layers) for finding in diagnosis.findings]

    assert found(5) == found(99) == found(1000, steps=2000) == []
    assert found(2000, steps=2000) == [("few zeros", ("hidden_0", "hidden_1"))]
    sparse = with_hidden_0(projected_to(1.0))
    assert found(1000, sparse) == [("few zeros", ("hidden_1",))], "the other layer is sparse"


def test_a_radius_that_falls_may_start_far_above_every_norm():
    c = {"hidden_*": l1inf.shrink(1.0, over=10, start=1000.0)}
    nothing_wrong(l1inf.keep_params_in_l1inf_ball(c), PARAMS, c)
    wide = {"hidden_*": 1000.0}
    assert names_found(l1inf.keep_params_in_l1inf_ball(wide), PARAMS, wide) == ["c too large"]


def test_zeros_are_not_missed_where_they_are_held():
    for c in ({"hidden_*": 1.0}, {"hidden_*": l1inf.shrink(1.0, over=10, start=1.0)}):
        hold = None if isinstance(c["hidden_*"], l1inf._schedules.Shrink) else 10
        tx = l1inf.keep_params_in_l1inf_ball(c, hold_zeros_from=hold)
        state = tx.init(PARAMS)._replace(step=jnp.int32(1000))
        assert names_found(tx, PARAMS, c, state=state, steps=1000) == []
        assert names_found(tx, PARAMS, c, steps=10) == ["zeros never held"]


def test_zeros_that_are_held_later_or_beside_biases_are_well():
    assert not held_from(1).findings
    assert not held_from(199, steps=200).findings
    params = jax.tree.map(lambda x: x if x.ndim > 1 else x + 0.01, PARAMS)
    params = l1inf.project_params(params, C)
    nothing_wrong(l1inf.constrain(optax.adam(1e-3), C, hold_zeros_from=0), params, C)


def test_of_weights_that_are_all_zero_only_the_dead_units_are_found():
    params = {**PARAMS, "hidden_0": layer(8, 4, 0.0), "hidden_1": layer(4, 4, 0.0)}
    assert names_found(SGD, params, C) == ["dead units"]


def test_columns_that_are_alike_from_the_start_were_not_projected():
    params = with_hidden_0(layer(8, 4, 0.08))
    nothing_wrong(SGD, params, C)


@pytest.mark.parametrize("start", [0.5, 10.0, True, "10", jnp.float32(3), np.ones(2, int)])
def test_zeros_are_held_from_a_whole_number(start):
    for make in (l1inf.keep_params_in_l1inf_ball, partial(l1inf.constrain, optax.sgd(0.1))):
        with pytest.raises(ValueError, match=r"hold_zeros_from=.* is no whole number"):
            make(1.0, hold_zeros_from=start)


@pytest.mark.parametrize("start", [None, 0, 10, np.int64(10), jnp.int32(10)])
def test_zeros_may_be_held_from_whole_numbers_of_any_kind(start):
    l1inf.keep_params_in_l1inf_ball(1.0, hold_zeros_from=start)


@pytest.mark.parametrize("steps", [0, -5])
def test_a_number_of_steps_that_is_not_positive_is_an_error(steps):
    with pytest.raises(ValueError, match=f"steps={steps}: give the number of updates"):
        l1inf.diagnose(SGD, PARAMS, C, steps=steps)


@pytest.mark.parametrize(
    "tx",
    [
        optax.named_chain(("ball", KEEP), ("sgd", optax.sgd(0.1))),
        optax.chain(optax.chain(optax.sgd(0.1), KEEP), optax.clip(1.0)),
        optax.chain(l1inf.constrain(optax.adam(1e-3), C), optax.scale(0.5)),
        optax.MultiSteps(optax.chain(KEEP, optax.sgd(0.1)), 2),
    ],
)
def test_a_link_after_the_projection_is_found_in_chains_of_any_kind(tx):
    assert names_found(tx, PARAMS, C) == ["not last"]


def test_a_wrapper_that_moves_the_parameters_out_is_found_by_a_step():
    def update(*args):
        updates, state = SGD.update(*args)
        return jax.tree.map(lambda x: 2 * x, updates), state

    twice = optax.GradientTransformation(SGD.init, update)
    assert names_found(twice, PARAMS, C, grads=UNEVEN) == ["not last"]


@pytest.mark.parametrize("optimizer", [optax.adamw, optax.rmsprop, optax.lion, optax.adafactor])
def test_optimizers_that_do_not_step_along_the_gradient_are_found(optimizer):
    tx = optax.chain(optimizer(1e-3), KEEP)
    assert names_found(tx, PARAMS, C) == ["wrong optimizer"]


@pytest.mark.parametrize(
    ("sizes", "found"), [([8, 4, 4, 1], ["Dense_2"]), ([4, 8, 4], []), ([8, 4], [])]
)
def test_the_last_of_numbered_layers_is_an_output_layer_if_nothing_can_follow_it(sizes, found):
    params = numbered(sizes)
    tx = l1inf.keep_params_in_l1inf_ball(1.0)
    assert [path for f in l1inf.diagnose(tx, params, 1.0).findings for path in f.layers] == found


def test_another_c_than_that_of_the_transformation_is_an_error():
    with pytest.raises(ValueError, match=r"constrain hidden_0.*but tx constrains .*hidden_1"):
        l1inf.diagnose(SGD, PARAMS, {"hidden_0": 1.0})


# --- how it shows itself --------------------------------------------------------------------------


def test_it_prints_what_is_constrained_and_free_and_errors_first():
    tx = optax.chain(optax.adam(1e-3), KEEP, optax.scale(0.5))
    lines = str(l1inf.diagnose(tx, PARAMS, C)).splitlines()
    assert lines[:2] == ["constrained: hidden_0, hidden_1", "free: readout"]
    starts = [line.split(".")[0] for line in lines[2:] if not line.startswith(" ")]
    assert starts == ["error: not last", "warning: wrong optimizer in hidden_0, hidden_1"]
    assert str(nothing_wrong(SGD, PARAMS, C)).endswith("nothing wrong found")


def test_it_renders_as_html_with_names_escaped():
    params = {"<hidden>": layer(8, 4, 1.0)}
    tx = l1inf.keep_params_in_l1inf_ball(1.0)
    text = l1inf.diagnose(tx, params, 1.0)._repr_html_()
    assert "<hidden>" not in text
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)
    parser.feed(text)
    assert tags == ["p", "br", "ul", "li", "b"]
