"""The batches of a step. Each batch is some rows, and the tensors of one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from trainer.data.samples import Columns


@dataclass
class Batch:
    """The input of one forward. `tensors`: the first dimension is the rows, equal for all tensors. `rows`: how many
    rows are samples. The other rows repeat a sample and have weight 0. `extra`: integers that the model needs on the
    host, where reading them from a tensor would wait for the device."""

    tensors: dict[str, torch.Tensor]
    rows: int
    extra: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Rows, with fill-ups."""
        return len(next(iter(self.tensors.values())))

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`. A copy from page-locked memory is queued there, and this returns at once."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.rows, self.extra)

    def pinned(self) -> Batch:
        """The batch in page-locked memory."""
        return Batch({name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.rows, self.extra)


@dataclass
class StepBatch:
    """One rank's share of a step."""

    step: int  # the number of the step that uses this batch, from 1
    batches: list[Batch]
    weights: tuple[float, ...]  # of this rank: summed over ranks, they divide the task's sums
    samples: np.ndarray  # this rank's positions in the global order, int64
    consumed_samples: int  # the position after this step
    cost: int  # of all ranks' samples: tokens, or samples where a task has no tokens


@dataclass(frozen=True)
class Row:
    """Where a row of a batch comes from. All randomness in collating must derive from these values alone."""

    seed: int
    epoch: int
    sample: int


class Collates(Protocol):
    """Makes batches of samples: the part of a task that the loader needs."""

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        """A batch of these samples, in this order, on the host. Samples from index `real` on are fill-ups: they repeat
        other samples, and must have weight 0."""

    def weigh(self, batch: Batch) -> tuple[float, ...]:
        """This batch's part of the weights that divide the sums, on the host."""
