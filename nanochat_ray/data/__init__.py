"""Raw text to packed rows in Arrow shards. No torch."""
