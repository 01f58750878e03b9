"""What a task says: how records become samples, samples become batches, and a batch becomes sums.

Every number of a task is a sum over rows. The step adds sums over micro batches and ranks, and divides by a weight that
was summed in the same way. So a loss or metric does not depend on how samples fall on ranks, and an uneven last batch
counts each sample once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from configs.config import Config
from trainer.data.batch import Batch
from trainer.data.prepared import Prepared
from trainer.data.samples import Columns, Samples


@dataclass(frozen=True)
class Column:
    """One of a task's sums, and the weight that divides it."""

    name: str
    per: str


@dataclass(frozen=True)
class Best:
    """Which metric of a validation decides the best checkpoint and early stopping, and which direction is better."""

    metric: str
    better: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class Row:
    """Where a row of a batch comes from; what is random in collating it follows from this alone."""

    seed: int
    epoch: int
    sample: int


class Task(Protocol):
    """`columns[0]` is the loss, and `columns[0].per` is `weights[0]`: the step divides the gradient by it."""

    columns: tuple[Column, ...]
    weights: tuple[str, ...]
    best: Best
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

    def open(self, path: Path) -> Prepared:
        """The prepared samples, memory-mapped. On every rank."""

    def resolve(self, config: Config, prepared: Prepared) -> Config:
        """The config with the sizes that the data decide. Raises UserError where the data do not fit it."""

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        """A batch of these samples, in this order, on the host. Those from `real` on are fill-ups: repeated samples
        that must have weight 0."""

    def weigh(self, batch: Batch) -> tuple[float, ...]:
        """This batch's share of each of `weights`, on the host."""

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(0-d total to differentiate, fp64 [columns]) of one batch: sums over its rows, never means."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Named numbers from sums over all ranks: columns and weights by name. The first is the loss."""

    def example(self, config: Config) -> Batch:
        """A batch of one row as the largest sample gives it, on the meta device: for FLOPs and plans."""


def mean_loss(task: Task, sums: Mapping[str, float]) -> dict[str, float]:
    """The loss alone, as most tasks have it."""
    loss = task.columns[0]
    return {loss.name: sums[loss.name] / sums[loss.per]}


def named(task: Task, sums: Iterable[float], weights: Iterable[float]) -> dict[str, float]:
    """Columns and weights by name."""
    names = [column.name for column in task.columns]
    return dict(zip([*names, *task.weights], [*sums, *weights], strict=True))


