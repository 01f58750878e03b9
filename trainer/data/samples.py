"""A prepared sample: named columns, read by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Columns = Mapping[str, np.ndarray]


class Samples(Protocol):
    """One split of a source. Samples are read by index, so that the position of a run in its data stays one integer."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Columns:
        """The columns of a sample. Their first dimension may differ between samples; the task collates them."""

    def cost(self, index: int) -> int:
        """The size of a sample in tokens, or 1 where a task has none. Used for tokens/s, FLOPs and buckets."""
