"""The only layer that knows Ray."""

import os

if os.environ.get("RAY_AUTH_TOKEN"):
    # Ray reads the mode when it is imported, and sends the token in this one alone.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
