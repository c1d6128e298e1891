"""Neural networks whose weights live inside an L1,inf ball."""
