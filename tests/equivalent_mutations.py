"""Mutations that change no result of the program, by file, with the reason.

Read before an entry is added: a reason that is not an argument belongs to a test that is missing.
"""

from __future__ import annotations

SPEED = "how much is computed at once; the result is the same"
ORDER = "both are done, in either order"

EQUIVALENT: dict[str, dict[str, str]] = {
    "nanochat_ray/model/loss.py": {
        "function: max(16, CHUNK // vocab)  →  min(16, CHUNK // vocab)": SPEED,
        "operator: CHUNK // vocab  →  CHUNK * vocab": SPEED,
        "constant: 16  →  17": SPEED,
        "constant: 13  →  14": SPEED,
        "operator: 1 << 13  →  1 >> 13": SPEED,
    },
    "nanochat_ray/model/rotary.py": {
        "comparison: factor > 1  →  factor >= 1": "YaRN by the factor 1 changes no frequency",
    },
    "nanochat_ray/serve/metrics.py": {
        "arguments: self._both(self._one.gauge(*args), self._other.gauge(*args))  →  "
        "self._both(self._other.gauge(*args), self._one.gauge(*args))": ORDER,
        "arguments: self._both(self._one.counter(*args), self._other.counter(*args))  →  "
        "self._both(self._other.counter(*args), self._one.counter(*args))": ORDER,
        "arguments: self._both(self._one.histogram(*args), self._other.histogram(*args))  →  "
        "self._both(self._other.histogram(*args), self._one.histogram(*args))": ORDER,
    },
}
