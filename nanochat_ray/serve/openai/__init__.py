"""OpenAI's HTTP API: requests to generation requests, and deltas to responses or events."""
