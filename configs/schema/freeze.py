"""The `freeze` section of the config."""

from __future__ import annotations

from pydantic import model_validator

from configs.schema.section import MOST_STEPS, Section, result


class FreezeChange(Section):
    """Which parameters train after a step. These patterns replace all earlier ones."""

    step: int = result(..., "the step after which this holds", ge=1, le=MOST_STEPS)
    frozen: list[str] = result([], "parameters that stay as they are from then on")
    trainable: list[str] = result([], "exceptions from `frozen`")


class FreezeSection(Section):
    """Which parameters train. Patterns are globs over parameter names, e.g. `blocks.0.*`; trainable wins."""

    frozen: list[str] = result([], "parameters that stay as they are")
    trainable: list[str] = result([], "exceptions from `frozen`")
    schedule: list[FreezeChange] = result([], "changes at later steps, in order")

    @model_validator(mode="after")
    def _ascending(self) -> FreezeSection:
        steps = [change.step for change in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"freeze.schedule: steps must ascend, got {steps}")
        return self
