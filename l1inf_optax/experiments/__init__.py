"""The paper's tables and figures as commands: ``python -m l1inf_optax.experiments NAME``.

- `paper`: its tables and figures;
- `supplement`: the studies of its supplement;
- `beyond`: what the paper does not have;
- `data`, `networks`, `command`: what these share.

`supplement` and `beyond` import from `paper`, these three from the others, and none the other way.
All train in the lanes of `l1inf_optax._lanes`.
"""
