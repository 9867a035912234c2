"""Reinforcement learning: a chat model learns from answers that a program grades."""
