"""Training: the step, its state, the loop, validation, checkpoints and metrics."""
