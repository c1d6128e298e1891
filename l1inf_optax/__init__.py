"""Neural networks whose weights live inside an L1,inf ball."""

from l1inf_optax._projection import l1inf_norm, projection_l1inf_ball

__all__ = ["l1inf_norm", "projection_l1inf_ball"]
