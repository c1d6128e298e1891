"""In a notebook a layer shows what the ball has done to it, and no dump of numbers."""

import base64
import io
import re
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import pytest
from flax.nnx import Rngs, eval_shape

import l1inf_optax as l1inf
from l1inf_optax import linen, nnx


def cells(shown):
    return re.findall(r"<t[dh][^>]*>([^<]*)<", shown)


def nnx_layer(**options):
    layer = nnx.AugmentedLinear(6, 4, rngs=Rngs(0), **options)
    layer.augmented_kernel[...] = l1inf.projection_l1inf_ball(layer.augmented_kernel[...], 0.2)
    return layer, layer.augmented_kernel[...]


def linen_layer(**options):
    layer = linen.AugmentedDense(4, **options)
    params = layer.init(jax.random.key(0), jnp.ones((1, 6)))
    params = l1inf.project_params(params, 0.2)
    return layer.bind(params), params["params"]["augmented_kernel"]


LAYERS = pytest.mark.parametrize("make", [nnx_layer, linen_layer])


@LAYERS
def test_a_layer_shows_its_name_dtype_shape_zeros_and_weights(make):
    layer, matrix = make(param_dtype=jnp.bfloat16)
    shown = layer._repr_html_()
    assert type(layer).__name__ in shown
    assert "bfloat16" in shown
    assert "7 x 4" in cells(shown)
    zeros = f"{100 * float((matrix == 0).mean()):.2f}%"
    assert zeros != "0.00%"
    assert zeros in cells(shown)
    picture = base64.b64decode(re.search(r"base64,([^\"]*)", shown)[1])
    assert matplotlib.image.imread(io.BytesIO(picture)).ndim == 3


@LAYERS
def test_a_layer_without_bias_has_no_bias_row(make):
    layer, matrix = make(use_bias=False)
    shown = cells(layer._repr_html_())
    assert "6 x 4" in shown
    unused = int((matrix == 0).all(1).sum())
    assert f"{unused} / 6" in shown


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_network_shows_all_its_layers(use_bias):
    networks = [nnx.AugmentedMLP(6, (4, 2), use_bias=use_bias, rngs=Rngs(0))]
    network = linen.AugmentedMLP((4, 2), use_bias=use_bias)
    networks.append(network.bind(network.init(jax.random.key(0), jnp.ones((1, 6)))))
    for network in networks:
        shown = cells(network._repr_html_())
        names = [name.partition("/")[0] for name in shown]
        assert {"hidden_0", "readout", "total"} <= set(names)
        assert f"{6 + use_bias} x 4" in shown
        assert f"{4 + use_bias} x 2" in shown


def test_convolutions_show_themselves():
    layer = nnx.AugmentedConv(2, 8, (3, 3), rngs=Rngs(0))
    assert "19 x 8" in cells(layer._repr_html_())
    layer = linen.AugmentedConv(8, (3, 3))
    params = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))
    assert "19 x 8" in cells(layer.bind(params)._repr_html_())


def test_without_values_there_is_only_the_text():
    assert linen.AugmentedDense(4)._repr_html_() is None
    assert linen.AugmentedMLP((4, 2))._repr_html_() is None
    assert eval_shape(lambda: nnx_layer()[0])._repr_html_() is None


def test_without_matplotlib_the_picture_is_left_out(monkeypatch):
    monkeypatch.delitem(sys.modules, "l1inf_optax.plotting", raising=False)
    monkeypatch.delattr(l1inf, "plotting", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    shown = nnx_layer()[0]._repr_html_()
    assert "7 x 4" in cells(shown)
    assert "<img" not in shown


def test_the_picture_of_a_huge_layer_is_small():
    layer = nnx.AugmentedLinear(2000, 500, rngs=Rngs(0))
    assert len(layer._repr_html_()) < 200_000
