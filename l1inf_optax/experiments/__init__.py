"""The paper's tables and figures as commands: ``python -m l1inf_optax.experiments NAME``."""
