"""What a task says: how records become samples, samples become batches, and a batch becomes sums.

Every number of a task is a sum over rows. The step adds sums over micro batches and ranks, and divides by a weight that
was summed in the same way. So a loss or metric does not depend on how samples fall on ranks, and an uneven last batch
counts each sample once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from configs.config import Config
from configs.errors import UserError
from trainer.data.batch import Batch, Collates
from trainer.data.prepared import Prepared

Call = Callable[[Callable[[Callable[..., Any]], torch.Tensor]], torch.Tensor]  # `Engine.call`


@dataclass(frozen=True)
class Column:
    """One of a task's sums, and the weight that divides it."""

    name: str
    per: str


Better = Literal["min", "max"]


class Task(Collates, Protocol):
    """`columns[0]` is the loss, and `columns[0].per` is `weights[0]`: the step divides the gradient by it."""

    columns: tuple[Column, ...]
    weights: tuple[str, ...]
    # Every metric of a validation, and which direction is better. The first, the loss, decides which checkpoint is best
    # and when to stop early, unless `train.best_metric` names another.
    better: Mapping[str, Better]
    unit: Literal["tokens", "samples"]  # of `Samples.cost`, and of the speed that is shown

    def prepare(
        self,
        config: Config,
        cache: Path,
        say: Callable[[str], None],
        should_stop: Callable[[], bool],
        began_with: Mapping[str, str],
    ) -> Path:
        """Make the samples once, on rank 0, and return what `open` takes. Raises UserError and Interrupted."""

    def open(self, path: Path, config: Config) -> Prepared:
        """The prepared samples, memory-mapped. On every rank."""

    def resolve(self, config: Config, prepared: Prepared) -> Config:
        """The config with the sizes that the data decide. Raises UserError where the data do not fit it."""

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(0-d total to differentiate, fp64 [columns]) of one batch: sums over its rows, never means."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Named numbers from sums over all ranks: columns and weights by name. The first is the loss."""

    def example(self, config: Config) -> tuple[Batch, int]:
        """A batch of one row as the largest sample gives it, on the meta device, and its cost: for FLOPs and plans."""

    def describe(self, prepared: Prepared, config: Config) -> list[str]:
        """A line per source for the start-up summary."""

    def show(self, call: Call, config: Config, device: torch.device, step: int) -> str | None:
        """What a finished run prints of what it has learned. All ranks call it together."""

    def fault(self, batch: Batch) -> str | None:
        """What is wrong with a batch, for `--debug`."""

    def first_loss(self, config: Config) -> float | None:
        """The loss of a model that knows nothing, where there is such a number; for `--debug`."""


def mean_loss(task: Task, sums: Mapping[str, float]) -> dict[str, float]:
    """The loss alone: what a row of training shows."""
    loss = task.columns[0]
    return {loss.name: sums[loss.name] / sums[loss.per]}


def named(task: Task, sums: Iterable[float], weights: Iterable[float]) -> dict[str, float]:
    """Columns and weights by name."""
    names = [column.name for column in task.columns]
    return dict(zip([*names, *task.weights], [*sums, *weights], strict=True))


def best_metric(task: Task, config: Config) -> tuple[str, Better]:
    """Which metric decides, and its better direction. UserError where the task has no such metric."""
    name = config.train.best_metric or next(iter(task.better))
    if name not in task.better:
        raise UserError(
            f"train.best_metric: {name!r} is no metric of task {config.task.name}: {', '.join(task.better)}"
        )
    return name, task.better[name]
