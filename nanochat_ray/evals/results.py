"""What was measured of a checkpoint, as JSON beside it: ``evals/step-000200.json`` of its run."""

from __future__ import annotations

import json
import math
from typing import Any

from nanochat_ray.storage import Store

Z = 1.96
"""Standard deviations of a 95% confidence interval."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson, JASA 1927), which holds near 0 and 1 too."""
    share = correct / total
    scale = 1 + Z**2 / total
    center = share + Z**2 / (2 * total)
    spread = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


class Results:
    """The figures of one checkpoint. Each is stored as soon as it is measured, so that a command
    that is repeated need not measure it again."""

    def __init__(self, run: Store, checkpoint: str, weight_version: str):
        """Figures of other weights under the same name are dropped. ValueError names a damaged
        file."""
        self._folder, self._file = run.child("evals"), f"{checkpoint}.json"
        self._figures: dict[str, Any] = {"weights": weight_version}
        if not self._folder.exists(self._file):
            return
        try:
            figures = json.loads(self._folder.read_text(self._file))
            if not isinstance(figures, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            where = f"{self._folder.uri}/{self._file}"
            raise ValueError(f"{where} is damaged ({error}): delete it") from None
        if figures.get("weights") == weight_version:
            self._figures = figures

    def find(self, group: str, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The figures that were measured with the same settings; None if there are none."""
        entry = self._figures.get(group, {}).get(name)
        return entry if entry is not None and entry.get("settings") == settings else None

    def store(
        self, group: str, name: str, settings: dict[str, Any], figures: dict[str, Any]
    ) -> None:
        self._figures.setdefault(group, {})[name] = {**figures, "settings": settings}
        self._folder.write_text(self._file, json.dumps(self._figures, indent=1))
