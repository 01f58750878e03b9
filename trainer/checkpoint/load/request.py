"""A load plan carried out: what an engine asks for, found under its name in the checkpoint, and read all at once."""

from __future__ import annotations

import torch

from trainer.checkpoint.format.boxes import Box, Ints, Wanted, boxes_of_range, intersect
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.load.plan import Plan


class Loading:
    """Gathers what an engine wants, by the names it has here, and reads it. Raises BadCheckpoint from `read` alone."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._checkpoint, self._plan = checkpoint, plan
        self._wanted: list[Wanted] = []

    def has(self, key: str) -> bool:
        """Whether the checkpoint gives this tensor, in whole or in part."""
        return key in self._plan.read

    def count(self, name: str) -> int:
        """Updates that a parameter's optimizer state has seen."""
        return self._plan.counts[name]

    def want(self, key: str, offsets: Ints, sizes: Ints, out: torch.Tensor) -> None:
        """Have the box (offsets, sizes) of tensor `key` read into `out`. What the checkpoint does not have of it stays
        as it is."""
        if key not in self._plan.read or not out.numel():
            return
        stored = self._plan.read[key]
        if key in self._plan.partial:
            shape = self._checkpoint.manifest.shape_of(stored)
            shared = intersect(Box(offsets, sizes), (0,) * len(shape), shape)
            if shared is None:
                return
            inside = tuple(slice(o - first, o - first + n) for o, n, first in zip(*shared, offsets, strict=True))
            offsets, sizes = shared
            out = out[inside]
        self._wanted.append(Wanted(stored, out, offsets, sizes, cast=True))

    def want_range(self, key: str, shape: Ints, start: int, out: torch.Tensor) -> None:
        """Have the flat range of tensor `key` that begins at `start` read into `out`, of one dimension."""
        for box in boxes_of_range(shape, start, out.numel()):
            self.want(key, box.offsets, box.sizes, out[box.start : box.start + box.numel].view(box.sizes))

    def read(self) -> None:
        """Fill everything that was wanted."""
        self._checkpoint.read_all(self._wanted)
        self._wanted = []
