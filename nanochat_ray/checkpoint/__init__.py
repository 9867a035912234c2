"""Checkpoints of a run, and the way to and from other formats."""
