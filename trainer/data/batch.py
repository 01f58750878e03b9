"""What a step computes with: batches of rows, each the tensors of one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from trainer.data.samples import Columns


@dataclass
class Batch:
    """One forward. `tensors`: the first dimension is rows, alike for all. `rows`: how many are samples; the rest repeat
    a sample and have weight 0. `extra`: integers that the model needs on the host, so that it does not
    wait for the device."""

    tensors: dict[str, torch.Tensor]
    rows: int
    extra: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Rows, fill-ups included."""
        return len(next(iter(self.tensors.values())))

    def to(self, device: torch.device) -> Batch:
        """On `device`; a copy from page-locked memory runs behind the work that is queued there."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.rows, self.extra)

    def pinned(self) -> Batch:
        """In page-locked memory."""
        return Batch({name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.rows, self.extra)


@dataclass
class StepBatch:
    """One rank's share of a step."""

    step: int  # the number of the step that this batch makes, from 1
    batches: list[Batch]
    weights: tuple[float, ...]  # of this rank: what the task's sums are divided by, once summed over ranks
    samples: np.ndarray  # this rank's positions in the global order, int64
    consumed_samples: int  # the position after this step
    cost: int  # of all ranks' samples: tokens, or samples where a task has no tokens


@dataclass(frozen=True)
class Row:
    """Where a row of a batch comes from; what is random in collating it follows from this alone."""

    seed: int
    epoch: int
    sample: int


class Collates(Protocol):
    """What makes batches of samples: the part of a task that the loader needs."""

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        """A batch of these samples, in this order, on the host. Those from `real` on are fill-ups: repeated samples
        that must have weight 0."""

    def weigh(self, batch: Batch) -> tuple[float, ...]:
        """This batch's share of what sums are divided by, on the host."""
