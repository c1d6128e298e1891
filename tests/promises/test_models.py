"""Every public function takes every kind of model, whole modules included, and every kind of c."""

from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import l1inf_optax as l1inf
from l1inf_optax import bounds

mpl.use("Agg")

import matplotlib.pyplot as plt

from l1inf_optax import plotting

X = jnp.ones((2, 3))
C = 0.25


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dense(1, name="last")(nn.Dropout(0.5, deterministic=True)(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)


def linen_variables():
    return LinenNet().init(jax.random.key(0), X)


def nnx_net():
    return NNXNet(nnx.Rngs(0))


def equinox_mlp():
    return eqx.nn.MLP(3, 1, width_size=4, depth=1, key=jax.random.key(0))


def haiku_params():
    return hk.transform(lambda x: hk.nets.MLP([4, 1])(x)).init(jax.random.key(0), X)


def train_state():
    params = linen_variables()["params"]
    return TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))


class Model(NamedTuple):
    make: object  # of the parameters, or of the module
    trained: object = lambda params: params  # what an optimizer is given of them


MODELS = {
    "Linen variables with batch statistics": Model(linen_variables),
    "Linen params": Model(lambda: linen_variables()["params"]),
    "FrozenDict": Model(lambda: FrozenDict(linen_variables())),
    "params of a TrainState": Model(lambda: train_state().params),
    "NNX module with Dropout": Model(nnx_net, lambda model: nnx.state(model, nnx.Param)),
    "whole NNX state": Model(
        lambda: nnx.state(nnx_net()), lambda state: nnx.filter_state(state, nnx.Param)
    ),
    "NNX params": Model(lambda: nnx.state(nnx_net(), nnx.Param)),
    "NNX params as dicts": Model(lambda: nnx.to_pure_dict(nnx.state(nnx_net(), nnx.Param))),
    "Equinox module": Model(equinox_mlp, lambda model: eqx.filter(model, eqx.is_inexact_array)),
    "Equinox arrays": Model(lambda: eqx.filter(equinox_mlp(), eqx.is_array)),
    "Haiku params": Model(haiku_params),
}
KEEP = l1inf.keep_params_in_l1inf_ball(C)
MOMENTUM = optax.chain(optax.sgd(0.1, momentum=0.9), KEEP)
ADAM = l1inf.constrain(optax.adam(0.1), C)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def norms(params):
    return [layer.largest_norm for layer in l1inf.sparsity_report(params).layers]


def test_what_reads_and_projects_parameters_takes_it_as_it_is(model):
    params = model.make()
    projected = l1inf.project_params(params, C)
    assert type(projected) is type(params)
    assert jax.tree.structure(projected) == jax.tree.structure(params)
    report = l1inf.sparsity_report(projected, c=C)
    assert [layer.columns for layer in report.layers] == [4, 1]
    assert [layer.columns_on_boundary for layer in report.layers] == [4, 1]
    assert max(norms(params)) > C >= max(norms(projected))
    copied = l1inf.convert_params(projected, params)
    assert jax.tree.structure(copied) == jax.tree.structure(params)


def test_diagnose_takes_it_as_it_is_with_state_and_gradients_of_what_is_trained(model):
    params = l1inf.project_params(model.make(), C)
    trained = model.trained(params)
    grads = jax.tree.map(jnp.ones_like, trained)
    for tx, more in (
        (ADAM, {}),
        (ADAM, {"state": ADAM.init(trained)}),
        (MOMENTUM, {"grads": grads, "state": MOMENTUM.init(trained)}),
    ):
        diagnosis = l1inf.diagnose(tx, params, C, **more)
        assert len(diagnosis.constrained) == 2, str(diagnosis)
        assert {finding.name for finding in diagnosis.findings} <= {"output layer"}, str(diagnosis)


# --- what holds an optimizer ----------------------------------------------------------------------


def test_diagnose_takes_the_state_where_flax_keeps_it():
    model = l1inf.project_params(nnx_net(), C)
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    state = TrainState.create(apply_fn=None, params=linen_variables()["params"], tx=ADAM)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    for diagnosis in (
        l1inf.diagnose(optimizer, model, C),
        l1inf.diagnose(ADAM, model, C, state=optimizer.opt_state, grads=grads),
        l1inf.diagnose(ADAM, model, C, state=optimizer),
        l1inf.diagnose(state, state.params, C),
    ):
        assert {finding.name for finding in diagnosis.findings} <= {"output layer"}, str(diagnosis)
    kernel = model.first.kernel
    kernel[...] = kernel[...] * 3
    assert "left the ball" in str(l1inf.diagnose(optimizer, model, C))
    assert l1inf.sparsity_report(model, c=C, state=optimizer).total.columns_on_boundary


def test_an_optimizer_is_no_parameters():
    optimizer = nnx.Optimizer(nnx_net(), ADAM, wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"params is a Optimizer.*nnx.state\(model, nnx.Param\)"):
        l1inf.project_params(optimizer, C)


def test_gradients_of_other_parameters_are_an_error():
    params = {"first": {"kernel": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r"grads has a leaf of shape \(3, 4\) at 'first/kernel'"):
        l1inf.diagnose(KEEP, params, C, grads={"first": {"kernel": jnp.ones((3, 4))}})


# --- every kind of c ------------------------------------------------------------------------------

RADII = {
    "int": 2,
    "NumPy float16": np.float16(2),
    "NumPy uint8": np.uint8(2),
    "JAX float8": jnp.asarray(2, jnp.float8_e4m3fn),
    "JAX float16": jnp.float16(2),
    "JAX bfloat16": jnp.bfloat16(2),
    "JAX int32": jnp.int32(2),
}


@pytest.mark.parametrize("name", RADII)
def test_every_public_function_takes_a_radius_of(name):
    c = RADII[name]
    params = {"h": {"kernel": jnp.array([[3.0, 0.5], [1.0, 0.25]])}}
    inside = {"h": {"kernel": jnp.array([[2.0, 0.5], [0.0, 0.25]])}}
    for given in (c, {"h": c}, lambda step: c):
        jax.tree.map(np.testing.assert_array_equal, l1inf.project_params(params, given), inside)
    for tx in (l1inf.keep_params_in_l1inf_ball(c), l1inf.constrain(optax.sgd(0.1), c)):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert norms(optax.apply_updates(params, updates)) == [2.0]
        assert not l1inf.diagnose(tx, inside, c).findings
    assert l1inf.sparsity_report(inside, c=c).total.columns_on_boundary == 1
    sizes = {"n": 500, "m1": 1000, "k": 1, "o": 1}
    assert bounds.rademacher_bound(c=c, **sizes) == bounds.rademacher_bound(c=2.0, **sizes)
    ax = plotting.plot_ball(c, plt.figure().subplots())
    assert ax.patches[0].get_xy().min() == -2
    ax = plotting.plot_newton([3.0, 1.0], c, plt.figure().subplots())
    assert ax.lines[-1].get_xydata().tolist() == [[0.0, 4.0], [1.0, 2.0]]
    plt.close("all")


# --- the certificate ------------------------------------------------------------------------------


class Chain(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x)), deterministic=True))


@pytest.mark.parametrize(
    ("make", "apply", "hidden"),
    [
        (lambda: Chain(nnx.Rngs(0)), lambda model, x: model(x), "first"),
        (equinox_mlp, lambda model, x: jax.vmap(model)(x), "layers/0"),
    ],
    ids=["NNX module with Dropout", "Equinox module"],
)
def test_a_module_is_certified_as_it_is(make, apply, hidden):
    x = jnp.linspace(-1, 1, 12).reshape(4, 3)
    model = l1inf.project_params(make(), {hidden: C})
    found = bounds.certificate(model, x, jnp.zeros((4, 1)), apply=apply, c={hidden: C})
    assert found.for_c.total > 0
