"""Padding that keeps a row's bits the same whatever runs beside it, with torch's attention.

The order of MKL's sums depends on the CPU. On Intel's, as far as trials show, two things keep it
the same:

- keys beyond a row's own are masked, and a masked tail of zeros changes no bit as long as the
  length is a multiple of 16 and, with several queries for a head, not between 256 and 512 modulo
  512, where MKL would split the sum over keys at another position (``padded_length``);
- queries of a prompt chunk are at least 8 at a time, since with fewer MKL uses another kernel;
  torch processes 32 at a time, so the remainder counts (``padded_queries``).
"""

from __future__ import annotations


def padded_length(n: int, queries: int) -> int:
    """Number of keys to attend to when ``n`` of them are real."""
    n = -(-n // 16) * 16
    remainder = n % 512
    return n if queries == 1 or remainder <= 256 else n - remainder + 512


def padded_queries(n: int) -> int:
    """Number of queries to run ``n`` as."""
    return n + max(0, 8 - n % 32) if n % 32 else n


def slot_length(max_model_len: int, native: bool) -> int:
    """Tokens that a slot has room for, so that attention to ``max_model_len`` has its padding."""
    return padded_length(max_model_len, 1 if native else 2)
