"""The flow itself: pure mathematics on jax and flax, nothing else."""
