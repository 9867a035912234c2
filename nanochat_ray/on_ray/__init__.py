"""The only floor that knows Ray."""
