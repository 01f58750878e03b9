"""What a section of the config is, and the two kinds of fields in it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def result(default: Any = ..., doc: str = "", **constraints: Any) -> Any:
    """A field that changes the numbers a run produces; part of the fingerprint."""
    return Field(default, description=doc, json_schema_extra={"changes": "result"}, **constraints)


def speed(default: Any = ..., doc: str = "", **constraints: Any) -> Any:
    """A field that changes only speed, memory, or what is written where."""
    return Field(default, description=doc, json_schema_extra={"changes": "speed"}, **constraints)


class Section(BaseModel):
    """Unknown keys are refused, values are never coerced between types, a built config does not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)
