"""What is learned: one file per task. `TASKS` is the only place that knows which there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from configs.config import Config
from trainer.tasks.base import Task
from trainer.tasks.classify import Classification
from trainer.tasks.lm import LanguageModelling
from trainer.tasks.regress import Regression

# Each takes its own section.
TASKS: dict[str, Callable[[Any], Task]] = {
    "lm": LanguageModelling,
    "classify": Classification,
    "regress": Regression,
}


def build_task(config: Config) -> Task:
    """The task that the config names."""
    return TASKS[config.task.name](config.task)
