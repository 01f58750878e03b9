"""What a prepared sample is: named columns, read by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Columns = Mapping[str, np.ndarray]


class Samples(Protocol):
    """One split of a source. Map style, so that the position of a run in its data stays one integer."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Columns:
        """The columns of a sample. Their first dimension may differ from sample to sample: the task collates."""

    def cost(self, index: int) -> int:
        """How large a sample is, in tokens, or 1 where a task has none: for tokens/s, FLOPs and buckets."""
