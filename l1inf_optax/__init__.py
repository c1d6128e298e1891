"""Neural networks whose weights live inside an L1,inf ball.

The public names are here and nothing else. The Flax modules, `l1inf_optax.linen` and
`l1inf_optax.nnx`, and everything heavier than jax and optax are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from l1inf_optax._layers import LayerDimensionNumbers, convert_params
from l1inf_optax._projection import l1inf_norm, projection_l1inf_ball
from l1inf_optax._pruning import prune
from l1inf_optax._rescaling import Rescaled, WithScalesState, rescale_params, with_scales
from l1inf_optax._schedules import ShrinkState, shrink
from l1inf_optax._transform import (
    ConstrainState,
    KeepParamsInL1InfBallState,
    constrain,
    keep_params_in_l1inf_ball,
    project_params,
    relative_radii,
)
from l1inf_optax.diagnosis import Diagnosis, Finding, diagnose
from l1inf_optax.sparsity import LayerSparsity, SparsityReport, sparsity_report

if TYPE_CHECKING:
    from l1inf_optax import bounds, linen, nnx, plotting, selection

__all__ = [
    "ConstrainState",
    "Diagnosis",
    "Finding",
    "KeepParamsInL1InfBallState",
    "LayerDimensionNumbers",
    "LayerSparsity",
    "Rescaled",
    "ShrinkState",
    "SparsityReport",
    "WithScalesState",
    "bounds",
    "constrain",
    "convert_params",
    "diagnose",
    "keep_params_in_l1inf_ball",
    "l1inf_norm",
    "linen",
    "nnx",
    "plotting",
    "project_params",
    "projection_l1inf_ball",
    "prune",
    "relative_radii",
    "rescale_params",
    "selection",
    "shrink",
    "sparsity_report",
    "with_scales",
]

_SUBMODULES = ("bounds", "linen", "nnx", "plotting", "selection")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
