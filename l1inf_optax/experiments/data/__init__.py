"""What the networks learn from.

- `digits`, `images`: readers of MNIST and CIFAR-10;
- `files`: what the two readers do alike;
- `synthetic`: the simulated data of Sections 5.1 and 5.2.
"""
