"""What tasks of records share: numbers in columns, their means and deviations, errors that name a place."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from configs.config import Config
from configs.errors import UserError
from configs.fingerprint import decide
from configs.schema.own import OwnModel
from trainer.data.batch import Batch
from trainer.data.columns import open_columns
from trainer.data.prepare_records import Facts, prepare_records
from trainer.data.prepared import Prepared
from trainer.data.records import Record, Value
from trainer.tasks.base import Call


class Moments:
    """Count, mean and deviation of rows of numbers, one row at a time (Welford), in fp64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean, self._squares = np.zeros(width), np.zeros(width)

    def add(self, row: np.ndarray) -> None:
        self.count += 1
        delta = row - self.mean
        self.mean += delta / self.count
        self._squares += delta * (row - self.mean)

    @property
    def std(self) -> np.ndarray:
        """Deviation of each column; 1 where all rows are equal, so that dividing by it does no harm."""
        std = np.sqrt(self._squares / max(self.count, 1))
        return np.where(std > 1e-12 * np.abs(self.mean), std, 1.0)


def value_of(record: Record, column: str) -> Value:
    """The value in a column. Raises UserError where the record has no such column, or no value in it."""
    if column not in record.values:
        near = difflib.get_close_matches(column, record.values, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(record.values)}"
        raise UserError(f"{record.place}: there is no column {column!r}; {hint}")
    value = record.values[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{record.place}: column {column!r} is empty")
    return value


def number_of(record: Record, column: str) -> float:
    """The number in a column. Raises UserError for a value that is no finite number."""
    value = value_of(record, column)
    try:
        number = math.nan if isinstance(value, np.ndarray | None) else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        shown = "an image" if isinstance(value, np.ndarray) else repr(value)[:60]
        raise UserError(f"{record.place}: column {column!r} holds {shown}, a finite number was expected")
    return number


def numbers_of(record: Record, columns: Sequence[str]) -> np.ndarray:
    """The numbers in some columns: (columns,) fp64."""
    return np.array([number_of(record, column) for column in columns], dtype=np.float64)


def feature_columns(wanted: Sequence[str], predicted: str, first: Record) -> list[str]:
    """The input columns: those wanted, or all but the predicted one, in the order of the first record."""
    columns = list(wanted) or [name for name in first.values if name != predicted]
    if predicted in columns:
        raise UserError(f"task.features holds {predicted!r}, the column that is to be predicted")
    if not columns:
        raise UserError(f"{first.place}: there is no column beside {predicted!r} to predict it from")
    return columns


def facts_of(prepared: Prepared) -> Facts:
    """The facts that `survey` found."""
    return dict(prepared.facts["facts"])


def sized(config: Config, features: int, outputs: int, why: str) -> Config:
    """The config with the model's sizes. Raises UserError where it has other ones. `why`: what the outputs are."""
    model = config.model
    section, given = ("model.options", model.options) if isinstance(model, OwnModel) else ("model", model.model_dump())
    if given.get("features") not in (None, features):
        raise UserError(f"model.features is {given['features']}, the data have {features}\nremove model.features")
    if given.get("outputs") not in (None, outputs):
        raise UserError(f"model.outputs is {given['outputs']}, {why}\nremove model.outputs")
    return decide(config, {f"{section}.features": features, f"{section}.outputs": outputs})


def features_of(config: Config) -> int:
    """How many numbers are the input; 1 where only the data tell and `sized` has not set it."""
    model = config.model
    found = model.options.get("features") if isinstance(model, OwnModel) else getattr(model, "features", None)
    return int(found or 1)


class OfRecords(ABC):
    """The part of a task that does not depend on what is predicted."""

    unit: Literal["tokens", "samples"] = "samples"
    weights: tuple[str, ...] = ("weight",)

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """See `Encoder`, also for the next two."""

    @abstractmethod
    def survey(self, records: Iterator[Record]) -> Facts: ...

    @abstractmethod
    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]: ...

    def prepare(
        self,
        config: Config,
        cache: Path,
        say: Callable[[str], None],
        should_stop: Callable[[], bool],
        began_with: Mapping[str, str],
    ) -> Path:
        return prepare_records(config, self, cache, say, should_stop)

    def open(self, path: Path, config: Config) -> Prepared:
        return Prepared.open(path, open_columns)

    def weigh(self, batch: Batch) -> tuple[float, ...]:
        return (float(batch.tensors["weight"].double().sum()),)

    def describe(self, prepared: Prepared, config: Config) -> list[str]:
        shares = prepared.shares(config.train.steps * config.train.global_batch)
        width = max(len(s.name) for s in prepared.sources)
        return [
            f"{s.name:<{width}}  {share}; held out {len(s.validation):,} samples"
            for s, share in zip(prepared.sources, shares, strict=True)
        ]

    def show(self, call: Call, config: Config, device: torch.device, step: int) -> str | None:
        return None

    def first_loss(self, config: Config) -> float | None:
        """None: a new model's scores differ enough from 0 to change its loss."""
        return None


def chained(first: Record, rest: Iterable[Record]) -> Iterator[Record]:
    yield first
    yield from rest
