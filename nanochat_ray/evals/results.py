"""What was measured of a checkpoint, as JSON beside it: ``evals/step-000200.json`` of its run."""

from __future__ import annotations

import json
import math
import re
import time
from typing import TYPE_CHECKING, Any

from nanochat_ray.storage import Store

if TYPE_CHECKING:
    from nanochat_ray.engine.offline import OfflineEngine

SAVE_S = 10.0
"""Between two writes of answers."""
Z = 1.96
"""Standard deviations of a 95% confidence interval."""


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson, JASA 1927), which holds near 0 and 1 too."""
    share = correct / total
    scale = 1 + Z**2 / total
    center = share + Z**2 / (2 * total)
    spread = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def engine_settings(engine: OfflineEngine) -> dict[str, Any]:
    """What of an engine decides figures, for the settings under which they are stored: not its
    speed or memory."""
    config = engine.config
    return {
        "device": engine.device_type,
        "precision": config.precision,
        "kv_precision": config.kv_precision,
        "batch_invariant": config.batch_invariant,
        "max_model_len": engine.max_model_len,
    }


class Results:
    """The figures of one checkpoint. Each is stored as soon as it is measured, so that a command
    that is repeated need not measure it again."""

    def __init__(self, run: Store, checkpoint: str, weight_version: str):
        """Figures of other weights under the same name are dropped. ValueError names a damaged
        file."""
        self._run, self._checkpoint, self._weights = run, checkpoint, weight_version
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

    def answers(self, name: str, settings: dict[str, Any]) -> Answers:
        """The answers to the task ``name`` that these weights gave with these settings."""
        identity = {"weights": self._weights, "settings": settings}
        return Answers(self._run, self._checkpoint, name, identity)


class Answers:
    """The answers to a task's questions that are complete, stored every few seconds: a command that
    is killed continues behind them. They stay for reading, as
    ``evals/step-000200.gsm8k.answers.json``."""

    def __init__(self, run: Store, checkpoint: str, name: str, identity: dict[str, Any]):
        """``identity``: weights and settings; answers of another one are dropped."""
        self._folder = run.child("evals")
        self._file = f"{checkpoint}.{re.sub(r'[^A-Za-z0-9_=-]+', '-', name)}.answers.json"
        self._identity = identity
        self.texts: dict[str, str] = {}
        """Request id → text."""
        self._saved_at = time.monotonic()
        if self._folder.exists(self._file):
            try:
                content = json.loads(self._folder.read_text(self._file))
                if content["identity"] == identity:
                    self.texts = dict(content["answers"])
            except (ValueError, KeyError, TypeError):
                pass  # what is damaged is answered again

    def add(self, request_id: str, text: str) -> None:
        self.texts[request_id] = text
        if time.monotonic() - self._saved_at >= SAVE_S:
            self.save()

    def save(self) -> None:
        content = {"identity": self._identity, "answers": self.texts}
        self._folder.write_text(self._file, json.dumps(content, indent=1))
        self._saved_at = time.monotonic()
