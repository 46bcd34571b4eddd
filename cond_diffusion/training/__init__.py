"""Training loop, checkpoints, validation and logging."""
