"""A trainer whose hooks are the functions that a test passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.hooks import Hooks
from nanochat_ray.train.trainer import Trainer

ENDLESS = 50_000
"""Steps of runs that are stopped: no machine ends them while a test looks at them."""


def stop_after(step: int, *, start: int = 0) -> Callable[[], bool]:
    """``should_stop`` of a run that begins behind step ``start`` and ends with ``step``."""
    return iter([*[False] * (step - start - 1), True]).__next__


class FunctionHooks(Hooks):
    def __init__(
        self,
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
        should_stop: Callable[[], bool] = lambda: False,
        should_save: Callable[[], bool] = lambda: False,
        check_publish: Callable[[], None] = lambda: None,
    ):
        self.functions = (on_record, should_stop, should_save, check_publish)

    def on_record(self, record: dict[str, Any]) -> None:
        self.functions[0](record)

    def should_stop(self) -> bool:
        return self.functions[1]()

    def should_save(self) -> bool:
        return self.functions[2]()

    def check_publish(self) -> None:
        self.functions[3]()


def run_trainer(config: TrainerConfig, **functions: Any) -> dict[str, Any]:
    return Trainer(config, hooks=[FunctionHooks(**functions)]).run()
