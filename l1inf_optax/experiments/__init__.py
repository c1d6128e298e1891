"""The paper's tables and figures as commands: ``python -m l1inf_optax.experiments NAME``.

- `paper`: its tables and figures;
- `supplement`: the studies of its supplement;
- `beyond`: what the paper does not have;
- `data`, `networks`, `command`: what these share.

An import goes from the first three to the last three. All train in the lanes of
`l1inf_optax._lanes`.
"""
