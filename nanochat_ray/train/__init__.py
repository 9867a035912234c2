"""The training step and loop, in plain torch."""
