"""Continuously batched inference over token ids, in plain torch."""
