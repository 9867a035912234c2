"""Shapes of requests, responses and stream chunks, with the descriptions that /openapi.json has."""
