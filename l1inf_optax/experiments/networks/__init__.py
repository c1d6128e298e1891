"""What is trained, and what it is worth.

- `vgg16`: the network for CIFAR-10; the others are `l1inf_optax.linen.AugmentedMLP`;
- `recipes`: starts, optimizers and schedules;
- `evaluation`: the best of several starts, and the columns of the paper's tables.
"""
