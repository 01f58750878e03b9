"""What a manifest says of the run that saved it: the types of what is read back, and what must agree. No torch.

These fields are the trainer's own; keys of `loop`, `config` and `model` that nothing reads are plain JSON. A right
digest says who wrote a file last, not that it is true, so each relation that a reader relies on is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

Size = Annotated[int, Field(ge=0, lt=1 << 62)]
Time = Annotated[float, Field(ge=0, lt=1e11)]  # seconds since 1970; what comes after the year 5000 has no date
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=128)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=64)]

_ONLY_THESE = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_AND_OTHERS = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Position(TypedDict, total=False):
    """Where in the data the run is."""

    __pydantic_config__ = _ONLY_THESE  # type: ignore[misc]

    consumed_samples: Size


class _Loop(TypedDict, total=False):
    """The fields of `trainer.loop.Progress`."""

    __pydantic_config__ = _AND_OTHERS  # type: ignore[misc]

    step: Size
    consumed_samples: Size
    nonfinite_in_a_row: Size
    validated_step: Size
    best_loss: float | None
    validations_without_better: Size


class _Converted(TypedDict, total=False):
    """Where a checkpoint of another kind came from, and what it held beside tensors."""

    __pydantic_config__ = _ONLY_THESE  # type: ignore[misc]

    kind: str
    path: str
    values: dict[str, Any]


class _Config(TypedDict, total=False):
    """The parts of a config that a conversion reads."""

    __pydantic_config__ = _AND_OTHERS  # type: ignore[misc]

    optim: dict[str, Any]
    converted_from: _Converted


LOOP = tuple(_Loop.__annotations__)


def _writable(value: Any) -> Any:
    """What JSON cannot hold (NaN, a number of thousands of digits) could be read, but not written again."""
    json.dumps(value, allow_nan=False)
    return value


Position = _Position
Loop = Annotated[_Loop, AfterValidator(_writable)]
Config = Annotated[_Config, AfterValidator(_writable)]
Plain = Annotated[dict[str, Any], AfterValidator(_writable)]


def contradiction(
    step: int,
    metric: float | None,
    position: Mapping[str, Any],
    loop: Mapping[str, Any],
    layout: Mapping[str, Any],
) -> str | None:
    """What cannot be true together; None when all can."""
    if "engine" in layout:  # then a run wrote this, and a run goes on from all of it
        missing = [f"loop.{key}" for key in LOOP if key not in loop]
        missing += [f"position.{key}" for key in _Position.__annotations__ if key not in position]
        if missing:
            return f"{missing[0]} is missing"
    if loop.get("step", step) != step:
        return f"loop.step is {loop['step']}, but step is {step}"
    for key in ("nonfinite_in_a_row", "validated_step", "validations_without_better"):
        if loop.get(key, 0) > step:
            return f"loop.{key} is {loop[key]}, more than step {step}"
    samples = position.get("consumed_samples")
    if loop.get("consumed_samples", samples) != samples:
        return f"loop.consumed_samples is {loop['consumed_samples']}, but position.consumed_samples is {samples}"
    if metric is not None and loop.get("best_loss", metric) != metric:
        return f"loop.best_loss is {loop['best_loss']}, but metric is {metric}"
    return None
