"""Raw text or conversations to shuffled shards of packed sequences. No torch, no Ray."""
