"""The flow itself: mathematics on jax and flax only."""
