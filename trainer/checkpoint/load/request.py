"""Carry out a load plan: an engine's requests, found under their names in the checkpoint, and read all at once."""

from __future__ import annotations

import torch

from trainer.checkpoint.format.boxes import Box, Ints, Wanted, boxes_of_range, intersect
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.load.plan import Plan


class Loading:
    """Collects what an engine wants, by its names here, and reads it. Only `read` raises BadCheckpoint."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._checkpoint, self._plan = checkpoint, plan
        self._wanted: list[Wanted] = []

    def has(self, key: str) -> bool:
        """Whether the checkpoint has this tensor, in whole or in part."""
        return key in self._plan.read

    def count(self, name: str) -> int:
        """How many updates a parameter's optimizer state has seen."""
        return self._plan.counts[name]

    def want(self, key: str, offsets: Ints, sizes: Ints, out: torch.Tensor) -> None:
        """Request the box (offsets, sizes) of tensor `key`, to be read into `out`. Missing elements stay unchanged."""
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
        """Request the flat range of tensor `key` that begins at `start`, to be read into `out` (one dimension)."""
        for box in boxes_of_range(shape, start, out.numel()):
            self.want(key, box.offsets, box.sizes, out[box.start : box.start + box.numel].view(box.sizes))

    def read(self) -> None:
        """Fill everything that was requested."""
        self._checkpoint.read_all(self._wanted)
        self._wanted = []
