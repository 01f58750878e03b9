"""What is learned: one file per task. `TASKS` is the only place that knows which there are."""

from __future__ import annotations

from configs.config import Config
from trainer.tasks.base import Task
from trainer.tasks.lm import LanguageModelling

TASKS = {"lm": LanguageModelling}


def build_task(config: Config) -> Task:
    """The task that the config names."""
    return TASKS[config.task.name](config.lm)
