"""What a step computes with: batches of rows, each the tensors of one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Batch:
    """One forward. `tensors`: the first dimension is rows, alike for all. `rows`: how many are samples of this step; the
    rest repeat a sample and have weight 0. `extra`: integers that the model needs on the host, so that it does not
    wait for the device."""

    tensors: dict[str, torch.Tensor]
    rows: int
    extra: Mapping[str, int] = field(default_factory=dict)

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
