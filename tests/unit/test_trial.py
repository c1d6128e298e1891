"""What `constrain` makes of each of optax's transformations."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import l1inf_optax as l1inf
from l1inf_optax import _optimizers

KEY = jax.random.key(0)
OF_VERSION = (0, 2, 8)
PARAMS = {"layer": {"kernel": jnp.full((6, 3), 0.1), "bias": jnp.full(3, 0.1)}}
MASK = {"layer": {"kernel": True, "bias": True}}


def last(link):
    """A link that needs only a learning rate to be an optimizer."""
    return optax.chain(link, optax.scale(-0.1))


def with_adam(link):
    return optax.chain(link, optax.adam(0.1))


def with_sgd(link):
    return optax.chain(link, optax.sgd(0.1))


# What becomes of it. "metric": its own is read off it; "gradient": it is projected as SGD is;
# otherwise it is an error, which says this. The factories call by name: old releases lack some.
OPTAX = {
    "adabelief": ("metric", lambda f: f(0.1)),
    "adadelta": ("metric", lambda f: f(0.1)),
    "adafactor": ("metric", lambda f: f(0.1)),
    "adagrad": ("metric", lambda f: f(0.1)),
    "adam": ("metric", lambda f: f(0.1)),
    "adamax": ("metric", lambda f: f(0.1)),
    "adamaxw": ("metric", lambda f: f(0.1)),
    "adamw": ("metric", lambda f: f(0.1)),
    "adan": ("metric", lambda f: f(0.1)),
    "adaptive_grad_clip": ("in front", lambda f: with_adam(f(0.1))),
    "add_decayed_weights": ("metric", lambda f: with_adam(f(0.1))),
    "add_noise": ("metric", lambda f: with_adam(f(0.1, 0.5, KEY))),
    "amsgrad": ("metric", lambda f: f(0.1)),
    "apply_every": ("metric", lambda f: with_adam(f(2))),
    "apply_if_finite": ("metric", lambda f: f(optax.adam(0.1), 3)),
    "centralize": ("in front", lambda f: with_adam(f())),
    "chain": ("gradient", lambda f: f(optax.sgd(0.1))),
    "clip": ("metric", lambda f: with_adam(f(1.0))),
    "clip_by_block_rms": ("in front", lambda f: with_adam(f(1.0))),
    "clip_by_global_norm": ("metric", lambda f: with_adam(f(1.0))),
    "conditionally_mask": ("gradient", lambda f: f(optax.sgd(0.1), lambda step: step > 2)),
    "conditionally_transform": ("gradient", lambda f: f(optax.sgd(0.1), lambda step: step > 2)),
    "ema": ("metric", lambda f: with_adam(f(0.9))),
    "flatten": ("metric", lambda f: f(optax.adam(0.1))),
    "freeze": (
        "metric",
        lambda f: optax.chain(optax.adam(0.1), f(jax.tree.map(lambda _: False, MASK))),
    ),
    "fromage": ("gradient", lambda f: f(0.1)),
    "identity": ("metric", lambda f: with_adam(f())),
    "inject_hyperparams": ("metric", lambda f: f(optax.adam)(0.1)),
    "inject_stateful_hyperparams": ("metric", lambda f: f(optax.adam)(0.1)),
    "keep_params_nonnegative": ("metric", lambda f: optax.chain(optax.adam(0.1), f())),
    "lamb": ("metric", lambda f: f(0.1)),
    "lars": ("metric", lambda f: f(1e-3)),
    "lbfgs": ("whole matrices", lambda f: f()),
    "lion": ("by signs", lambda f: f(0.1)),
    "lookahead": ("Put it around", lambda f: f(optax.adam(0.1), 6, 0.5)),
    "masked": ("metric", lambda f: f(optax.adam(0.1), MASK)),
    "measure_with_ema": (
        "metric",
        lambda f: with_adam(optax.monitor({"x": f(optax.tree.norm, 0.9)})),
    ),
    "monitor": ("metric", lambda f: with_adam(f({"x": optax.tree.norm}))),
    "multi_transform": ("metric", lambda f: f({"a": optax.adam(0.1)}, {"layer": "a"})),
    "nadam": ("metric", lambda f: f(0.1)),
    "nadamw": ("metric", lambda f: f(0.1)),
    "named_chain": ("gradient", lambda f: f(("sgd", optax.sgd(0.1)))),
    "noisy_sgd": ("gradient", lambda f: f(0.1, key=KEY)),
    "normalize_by_update_norm": ("metric", lambda f: with_adam(f())),
    "novograd": ("metric", lambda f: f(0.1)),
    "optimistic_adam": ("metric", lambda f: f(0.1)),
    "optimistic_adam_v2": ("metric", lambda f: f(0.1)),
    "optimistic_gradient_descent": ("gradient", lambda f: f(0.1)),
    "partition": ("metric", lambda f: f({"a": optax.adam(0.1)}, {"layer": "a"})),
    "polyak_sgd": ("gradient", lambda f: f()),
    "radam": ("metric", lambda f: f(0.1)),
    "rmsprop": ("metric", lambda f: f(0.1)),
    "rprop": ("by signs", lambda f: f(0.1)),
    "scale": ("metric", lambda f: with_adam(f(2.0))),
    "scale_by_adadelta": ("metric", lambda f: last(f())),
    "scale_by_adam": ("metric", lambda f: last(f())),
    "scale_by_adamax": ("metric", lambda f: last(f())),
    "scale_by_adan": ("metric", lambda f: last(f())),
    "scale_by_amsgrad": ("metric", lambda f: last(f())),
    "scale_by_backtracking_linesearch": (
        "gradient",
        lambda f: optax.chain(optax.sgd(1.0), f(5)),
    ),
    "scale_by_belief": ("metric", lambda f: last(f())),
    "scale_by_distance_over_gradients": ("gradient", lambda f: last(f())),
    "scale_by_factored_rms": ("metric", lambda f: last(f())),
    "scale_by_lbfgs": ("whole matrices", lambda f: last(f())),
    "scale_by_learning_rate": ("metric", lambda f: with_adam(f(0.1))),
    "scale_by_lion": ("by signs", lambda f: last(f())),
    "scale_by_novograd": ("metric", lambda f: last(f())),
    "scale_by_optimistic_gradient": ("metric", lambda f: with_adam(f())),
    "scale_by_param_block_norm": ("gradient", lambda f: with_sgd(f())),
    "scale_by_param_block_rms": ("gradient", lambda f: with_sgd(f())),
    "scale_by_polyak": ("gradient", lambda f: last(f())),
    "scale_by_radam": ("metric", lambda f: last(f())),
    "scale_by_rms": ("metric", lambda f: last(f())),
    "scale_by_rprop": ("by signs", lambda f: last(f(0.1))),
    "scale_by_rss": ("metric", lambda f: last(f())),
    "scale_by_schedule": ("metric", lambda f: with_adam(f(lambda step: 0.5))),
    "scale_by_sign": ("Steps by signs", lambda f: last(f())),
    "scale_by_sm3": ("metric", lambda f: last(f())),
    "scale_by_stddev": ("metric", lambda f: last(f())),
    "scale_by_trust_ratio": ("gradient", lambda f: with_sgd(f())),
    "scale_by_yogi": ("metric", lambda f: last(f())),
    # A line search after an adaptive optimizer is an error.
    "scale_by_zoom_linesearch": (
        "schedule for the learning rate",
        lambda f: optax.chain(optax.adam(1.0), f(5)),
    ),
    "selective_transform": (
        "metric",
        lambda f: f(optax.adam(0.1), freeze_mask=jax.tree.map(lambda _: False, MASK)),
    ),
    "set_to_zero": ("frozen", lambda f: with_adam(f())),
    "sgd": ("gradient", lambda f: f(0.1, momentum=0.9)),
    "sign_sgd": ("Steps by signs", lambda f: f(0.1)),
    "signum": ("Steps by signs", lambda f: f(0.1)),
    "sm3": ("metric", lambda f: f(0.1)),
    "snapshot": ("metric", lambda f: with_adam(f("x", lambda updates: updates))),
    "stateless": ("metric", lambda f: with_adam(f(lambda updates, params: updates))),
    "stateless_with_tree_map": ("in front", lambda f: last(f(lambda u, p: u * p))),
    "trace": ("metric", lambda f: with_adam(f(0.9))),
    "with_extra_args_support": ("gradient", lambda f: f(optax.sgd(0.1))),
    "yogi": ("metric", lambda f: f(0.1)),
    "zero_nans": ("metric", lambda f: with_adam(f())),
}
CONTRIB = {
    "acprop": ("metric=f", lambda f: f(0.1)),
    "ademamix": ("metric", lambda f: f(0.1)),
    "adopt": ("metric=f", lambda f: f(0.1)),
    "cocob": ("every coordinate anew", lambda f: f()),
    "dadapt_adamw": ("exp_avg_sq", lambda f: f()),
    "differentially_private_aggregate": ("in front", lambda f: with_sgd(f(1.0, 0.1, key=0))),
    "dog": ("gradient", lambda f: f(0.1)),
    "dowg": ("gradient", lambda f: f(0.1)),
    "dpsgd": ("in front", lambda f: f(0.1, 1.0, 0.1, 0)),
    "galore": ("whole matrices", lambda f: f(0.1)),
    "hutchinson_estimator_diag_hessian": ("no updates", lambda f: f()),
    "madgrad": ("dual averaging", lambda f: f(0.1)),
    "mechanize": ("Constrain the optimizer inside", lambda f: f(optax.adam(0.1))),
    "momo": ("metric='euclidean'", lambda f: f()),
    "momo_adam": ("exp_avg_sq", lambda f: f()),
    "muon": ("whole matrices", lambda f: f(0.1)),
    "normalize": ("gradient", lambda f: with_sgd(f())),
    "prodigy": ("exp_avg_sq", lambda f: f()),
    "reduce_on_plateau": ("metric", lambda f: optax.chain(optax.adam(0.1), f())),
    "sam": ("Put it around", lambda f: f(optax.sgd(0.1), optax.sgd(0.1))),
    "scale_by_acprop": ("metric=f", lambda f: last(f())),
    "scale_by_ademamix": ("metric", lambda f: last(f())),
    "scale_by_adopt": ("metric=f", lambda f: last(f())),
    "scale_by_cocob": ("every coordinate anew", lambda f: f()),
    "scale_by_galore": ("whole matrices", lambda f: last(f())),
    "scale_by_madgrad": ("dual averaging", lambda f: f(0.1)),
    "scale_by_muon": ("whole matrices", lambda f: last(f())),
    "scale_by_simplified_ademamix": ("metric", lambda f: last(f())),
    "schedule_free": ("averages", lambda f: f(optax.adam(0.1), 0.1)),
    "schedule_free_adamw": ("averages.*a learning rate that decays", lambda f: f()),
    "schedule_free_sgd": ("averages", lambda f: f()),
    "simplified_ademamix": ("metric", lambda f: f(0.1)),
    "sophia": ("most of its steps are signs", lambda f: f(0.1)),
    "split_real_and_imaginary": ("metric", lambda f: f(optax.adam(0.1))),
}
TABLES = {optax: OPTAX, optax.contrib: CONTRIB}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(module, name, id=name)
        for module, table in TABLES.items()
        for name in table
        if hasattr(module, name)
    ],
)
def test_a_transformation_of_optax_is_read_rightly_or_an_error_that_says_what_to_write(
    module, name
):
    verdict, make = TABLES[module][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tx = l1inf.constrain(make(getattr(module, name)), 1.0)
    if verdict in ("metric", "gradient"):
        state = tx.init(PARAMS).inner_state
        assert _optimizers.is_euclidean(state) == (verdict == "gradient")
    else:
        with pytest.raises(ValueError, match=f"metric='auto'.*{verdict}"):
            tx.init(PARAMS)


def makes_transformations(f):
    """Whether a public name is, by its annotation, a function that returns a transformation."""
    if inspect.isclass(f) or not callable(f):
        return False
    returned = getattr(f, "__annotations__", {}).get("return", "")
    return "GradientTransformation" in str(returned)


def test_the_table_names_all_of_optax():
    missing = {
        name
        for module, table in TABLES.items()
        for name in dir(module)
        if not name.startswith("_") and makes_transformations(getattr(module, name))
        if name not in table
    }
    newer = tuple(map(int, optax.__version__.split(".")[:3])) > OF_VERSION
    if missing and newer:
        pytest.skip(f"optax {optax.__version__} has what the table lacks: {sorted(missing)}")
    assert not missing
