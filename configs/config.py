"""The typed config of a run."""

from __future__ import annotations

from pydantic import model_validator

from configs.rules import mistakes
from configs.schema.sections import Sections


class Config(Sections):
    """Everything a run is. The sections are right by themselves and fit each other."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        found = mistakes(self)
        if found:
            raise ValueError("; ".join(found))
        return self
