"""A nanochat-style GPT on Ray: from raw text to a served chat model."""
