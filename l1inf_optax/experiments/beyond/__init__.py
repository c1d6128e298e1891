"""What the paper does not have: questions of this package, on the paper's data.

- `certificates`: the theorems' bounds beside measured errors (the command ``bounds``);
- `optimizers`: fifteen optimizers, each with the projection after it and with that in its metric.
"""
