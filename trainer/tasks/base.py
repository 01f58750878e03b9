"""What a task defines: how records become samples, samples become batches, and a batch becomes sums.

Every number of a task is a sum over rows. The step adds the sums over micro batches and ranks, and divides by a weight
that is summed in the same way. So a loss or metric does not depend on which rank has which sample, and an uneven last
batch counts each sample once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from configs.config import Config
from configs.errors import UserError
from trainer.data.batch import Batch, Collates
from trainer.data.prepared import Prepared

Call = Callable[[Callable[[Callable[..., Any]], torch.Tensor]], torch.Tensor]  # `Engine.call`


Better = Literal["min", "max"]


class Task(Collates, Protocol):
    """The step divides the gradient of the first column, the loss, by the first weight. `metrics` divides the rest."""

    columns: tuple[str, ...]  # what `sums` gives, in this order
    weights: tuple[str, ...]  # what `weigh` gives, in this order
    # Metrics that may decide which checkpoint is best and when to stop early, and which direction is better. The first
    # one does, unless `train.best_metric` names another.
    better: Mapping[str, Better]
    unit: Literal["tokens", "samples"]  # of `Samples.cost`, and of the printed speed

    def prepare(
        self,
        config: Config,
        cache: Path,
        say: Callable[[str], None],
        should_stop: Callable[[], bool],
        began_with: Mapping[str, str],
    ) -> Path:
        """Make the samples once, on rank 0; return what `open` takes. Raises UserError and Interrupted."""

    def open(self, path: Path, config: Config) -> Prepared:
        """The prepared samples, memory-mapped, on every rank."""

    def resolve(self, config: Config, prepared: Prepared) -> Config:
        """The config with the sizes that the data decide. Raises UserError where data and config do not fit."""

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(0-d total to differentiate, fp64 [columns]) of one batch. Both are sums over its rows, never means."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metric -> value, from the sums over all ranks (columns and weights by name). The first metric is the loss."""

    def example(self, config: Config) -> tuple[Batch, int]:
        """A batch with one row as large as the largest sample, on the meta device; its cost. For FLOPs and plans."""

    def describe(self, prepared: Prepared, config: Config) -> list[str]:
        """A line per source for the start-up summary."""

    def show(self, call: Call, config: Config, device: torch.device, step: int) -> str | None:
        """The text that a finished run prints about what it learned. All ranks call this together."""

    def fault(self, batch: Batch) -> str | None:
        """What is wrong with a batch, for `--debug`."""

    def first_loss(self, config: Config) -> float | None:
        """The loss of a model that has learned nothing, where that number is known; for `--debug`."""


def mean_loss(task: Task, sums: Mapping[str, float]) -> dict[str, float]:
    """The loss alone, as a training row shows it."""
    loss, weight = task.columns[0], task.weights[0]
    return {loss: sums[loss] / sums[weight]}


def named(task: Task, sums: Iterable[float], weights: Iterable[float]) -> dict[str, float]:
    """Name -> value of columns and weights."""
    return dict(zip([*task.columns, *task.weights], [*sums, *weights], strict=True))


def best_metric(task: Task, config: Config) -> tuple[str, Better]:
    """Which metric decides, and its better direction. Raises UserError where the task has no such metric."""
    name = config.train.best_metric or next(iter(task.better))
    if name not in task.better:
        raise UserError(
            f"train.best_metric: {name!r} is no metric of task {config.task.name}: {', '.join(task.better)}"
        )
    return name, task.better[name]
