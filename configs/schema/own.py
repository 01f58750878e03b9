"""Sections that name a task or a model of the user's own, in a file of theirs."""

from __future__ import annotations

from typing import Any, ClassVar

from configs.schema.section import Section, result

PLACE = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


SIZES = ("features", "outputs")  # options of a model that the data decide when the config leaves them out


class OwnTask(Section):
    """A task of your own: a class in a module of the folder where you work."""

    needs_tokenizer: ClassVar[bool] = False

    name: str = result(..., "`module:Class`, a task as `trainer/tasks/base.py` describes it", pattern=PLACE)
    options: dict[str, Any] = result({}, "its settings, checked by the section that its `__init__` takes")


class OwnModel(Section):
    """A model of your own: a function in a module of the folder where you work."""

    name: str = result(..., "`module:function`, which gives a `models.base.Model`", pattern=PLACE)
    options: dict[str, Any] = result({}, "its settings, checked by the section that the function takes")
