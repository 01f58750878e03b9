"""What a manifest tells about the run that saved it: the types of the fields, and which of them must agree. No torch.

These fields are the trainer's own. Keys of `loop`, `config` and `model` that nothing reads are plain JSON. A right
digest tells who wrote a file last, not that its content is true. So each relation that a reader needs is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

Size = Annotated[int, Field(ge=0, lt=1 << 62)]
Time = Annotated[float, Field(ge=0, lt=1e11)]  # seconds since 1970, up to about the year 5000: later times have no date
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=128)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=64)]

_ONLY_THESE = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_AND_OTHERS = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Position(TypedDict, total=False):
    """The run's position in the data."""

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
    """Where a checkpoint of another kind came from, and its values beside tensors."""

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
    """Refuse what JSON can read but not write again: NaN, or a number of thousands of digits."""
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
    """Two values that contradict each other, in words; None when all agree."""
    if "engine" in layout:  # then a run wrote this, and a run needs all of it to go on
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
