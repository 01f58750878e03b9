"""What is learned: one file per task. Only `TASKS` lists them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from configs.config import Config
from configs.errors import UserError
from configs.own import make_own
from configs.schema.own import OwnTask
from trainer.data.batch import Collates
from trainer.tasks.base import Task
from trainer.tasks.classify import Classification
from trainer.tasks.lm import LanguageModelling
from trainer.tasks.regress import Regression

# Each takes its own section of the config.
TASKS: dict[str, Callable[[Any], Task]] = {
    "lm": LanguageModelling,
    "classify": Classification,
    "regress": Regression,
}


def build_task(config: Config) -> Task:
    """The task that the config names."""
    section = config.task
    if not isinstance(section, OwnTask):
        return TASKS[section.name](section)
    made: Task = make_own("task", section.name, section.options)
    wanted = [name for kind in (Task, Collates) for name in (*vars(kind), *kind.__annotations__) if name[0] != "_"]
    missing = sorted({name for name in wanted if not hasattr(made, name)})
    if missing:
        raise UserError(f"task.name {section.name} is no task: it has no {', '.join(missing)} (trainer/tasks/base.py)")
    return made
