"""The three studies that the paper says its supplement has: what one quantity does.

- `sample_size`, `depth`, `step_size`: the quantities;
- `study`: what the three share.
"""
