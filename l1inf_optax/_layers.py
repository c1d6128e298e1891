"""Pytrees: which leaves of a parameter tree make one augmented matrix."""

from __future__ import annotations

AUGMENTED_KERNEL = "augmented_kernel"
"""The name under which a layer holds its bias and its weights as one augmented matrix."""
