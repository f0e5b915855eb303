"""Training: the step, its state, checkpoints, metrics and the loop around them."""
