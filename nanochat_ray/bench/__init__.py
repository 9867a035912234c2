"""Benchmarks, run as ``nanochat-ray bench NAME``, and the load generator that they share."""
