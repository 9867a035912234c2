"""Tasks with answers that a program can check."""
