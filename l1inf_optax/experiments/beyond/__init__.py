"""What the paper does not have: questions of this package, on the paper's data.

- `certificates`: the theorems' bounds beside the generalization errors that are measured;
- `optimizers`: fifteen optimizers, each with the projection after it and with that in its metric.
"""
