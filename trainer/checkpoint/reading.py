"""Reading many boxes at once: by file and block, in file order, several blocks at a time.

Every touched block is read once and checked whole. A block whose wanted bytes lie as they are needed is read straight
into its destinations; any other goes through a scratch block, out of which each destination takes its part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
import torch

from trainer.checkpoint.files import BLOCK_BYTES, FileReader, bytes_of
from trainer.checkpoint.manifest import Place
from trainer.checkpoint.pieces import Box, Ints, boxes_of_range, intersect

READING_THREADS = 4
TASK_BLOCKS = 16  # consecutive blocks that one thread takes at a time

T = TypeVar("T")
R = TypeVar("R")
# Same-size integers: bits are copied, never interpreted.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Target:
    """Where a box of a tensor goes: `out` has the box's sizes, on any device, in any strides."""

    box: Box
    out: torch.Tensor
    dtype: torch.dtype
    direct: memoryview | None  # the row-major bytes of the box, where `out` is just that

    @classmethod
    def of(cls, box: Box, out: torch.Tensor, dtype: torch.dtype) -> Target:
        out = out.detach()
        direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
        shaped = out if out.shape == box.sizes else out.view(box.sizes)
        return cls(box, shaped, dtype, bytes_of(out) if direct else None)

    def put(self, part: Box, raw: np.ndarray) -> None:
        """Take what is wanted of `part`, a box of the tensor, from its row-major bytes."""
        shared = intersect(self.box, part.offsets, part.sizes)
        if shared is None:
            return
        here = tuple(slice(o - b, o - b + n) for o, b, n in zip(shared[0], self.box.offsets, shared[1], strict=True))
        there = tuple(slice(o - p, o - p + n) for o, p, n in zip(shared[0], part.offsets, shared[1], strict=True))
        bits = _BITS[self.dtype.itemsize]
        source = torch.from_numpy(raw).view(bits).view(part.sizes)[there]
        if self.out.device.type == "cpu" and self.out.dtype == self.dtype:
            self.out.view(bits).numpy()[here] = source.numpy()  # numpy copies in this thread, torch would start more
        else:
            self.out[here].copy_(source.view(self.dtype))


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) of a file, all or some of which are wanted by a target. They are part of the stored box
    `place`. `direct` is where they go when all are wanted and go side by side."""

    start: int
    end: int
    place: Place
    target: Target
    direct: memoryview | None

    def put(self, low: int, block: np.ndarray) -> None:
        """Take what is wanted from a block that begins at the byte `low` of the file."""
        begin, end = max(self.start, low), min(self.end, low + len(block))
        if self.direct is not None:
            self.direct[begin - self.start : end - self.start] = block[begin - low : end - low].data
            return
        width, stored = self.target.dtype.itemsize, self.place.box
        first = (begin - self.place.byte) // width
        for box in boxes_of_range(stored.sizes, first, (end - begin) // width):
            offsets = tuple(a + b for a, b in zip(stored.offsets, box.offsets, strict=True))
            at = begin - low + box.start * width
            self.target.put(Box(offsets, box.sizes), block[at : at + box.numel * width])


def spans_of(place: Place, target: Target) -> list[Span]:
    """The parts of a stored box that a target wants, blocks of which it wants nothing left out."""
    shared = intersect(place.box, target.box.offsets, target.box.sizes)
    return [] if shared is None else _spans(place, target, *shared)


def _spans(place: Place, target: Target, offsets: Ints, sizes: Ints) -> list[Span]:
    width, stored = target.dtype.itemsize, place.box
    is_run = _is_run(sizes, stored.sizes)
    wide = next((d for d, n in enumerate(sizes) if n > 1), None)
    if not is_run and wide is not None and prod(stored.sizes[wide + 1 :]) * width > BLOCK_BYTES:
        ones = [(*offsets[:wide], offsets[wide] + i, *offsets[wide + 1 :]) for i in range(sizes[wide])]
        return [s for o in ones for s in _spans(place, target, o, (*sizes[:wide], 1, *sizes[wide + 1 :]))]
    first = _flat_index(offsets, stored)
    last = _flat_index([o + n - 1 for o, n in zip(offsets, sizes, strict=True)], stored)
    start, end = place.byte + first * width, place.byte + (last + 1) * width
    direct = None
    if target.direct is not None and is_run and _is_run(sizes, target.box.sizes):
        begin = _flat_index(offsets, target.box) * width
        direct = target.direct[begin : begin + end - start]
    return [Span(start, end, place, target, direct)]


class Reading:
    """Reads spans of several files; one object per opened checkpoint. It holds on to the last block that went through
    scratch, as whoever reads small tensors one by one comes back for the rest of it."""

    def __init__(self, readers: Sequence[FileReader]) -> None:
        self._readers = readers
        self._held: tuple[int, int, np.ndarray] | None = None

    def read(self, spans: dict[int, list[Span]]) -> None:
        """Fill all targets. `spans` by file. Raises BadCheckpoint for the first bad block."""
        tasks = []
        for file in sorted(spans):
            blocks: dict[int, list[Span]] = defaultdict(list)
            for span in sorted(spans[file], key=lambda s: s.start):
                for index in range(span.start // BLOCK_BYTES, -(-span.end // BLOCK_BYTES)):
                    blocks[index].append(span)
            touched = sorted(blocks.items())
            tasks += [(file, touched[i : i + TASK_BLOCKS]) for i in range(0, len(touched), TASK_BLOCKS)]
        for _ in in_threads(self._read_blocks, tasks, READING_THREADS):
            pass

    def verify(self, threads: int = READING_THREADS) -> Iterator[int]:
        """Check every block of every file; yields how many bytes more were found good."""
        tasks = [
            (reader, range(first, min(first + TASK_BLOCKS, reader.blocks)))
            for reader in self._readers
            for first in range(0, reader.blocks, TASK_BLOCKS)
        ]
        yield from in_threads(_verify_blocks, tasks, threads)

    def release(self) -> None:
        """Give the held block back."""
        self._held = None

    def _read_blocks(self, task: tuple[int, list[tuple[int, list[Span]]]]) -> None:
        file, blocks = task
        reader = self._readers[file]
        scratch: np.ndarray | None = None
        for index, spans in blocks:
            low, high = reader.block_range(index)
            held = self._held
            if held is not None and held[:2] == (file, index):
                block = held[2]
            else:
                parts = _side_by_side(low, high, spans)
                if parts is not None:
                    reader.read_block(index, parts)
                    continue
                if scratch is None:
                    scratch = np.empty(BLOCK_BYTES, dtype=np.uint8)
                block = scratch[: high - low]
                reader.read_block(index, [block.data])
            for span in spans:
                span.put(low, block)
            last = (file, index, block)
        if scratch is not None:
            self._held = last


def _verify_blocks(task: tuple[FileReader, range]) -> int:
    reader, blocks = task
    scratch = memoryview(bytearray(BLOCK_BYTES))
    done = 0
    for index in blocks:
        low, high = reader.block_range(index)
        reader.read_block(index, [scratch[: high - low]])
        done += high - low
    return done


def _side_by_side(low: int, high: int, spans: Sequence[Span]) -> list[memoryview] | None:
    """The destinations that together are the whole block, or None when there are no such."""
    parts, position = [], low
    for span in spans:
        begin, end = max(span.start, low), min(span.end, high)
        if span.direct is None or begin != position:
            return None
        parts.append(span.direct[begin - span.start : end - span.start])
        position = end
    return parts if position == high else None


def in_threads(work: Callable[[T], R], tasks: Sequence[T], threads: int) -> Iterator[R]:
    """The results of all tasks, in their order, a few being worked on at a time. Raises the first task's error, once
    none runs any more."""
    threads = min(threads, len(tasks))
    if threads <= 1:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(threads, "muster-reader") as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _flat_index(at: Iterable[int], box: Box) -> int:
    """The place of an element of the tensor in a box's row-major order."""
    index = 0
    for position, offset, size in zip(at, box.offsets, box.sizes, strict=True):
        index = index * size + position - offset
    return index


def _is_run(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a part of these sizes is contiguous in the row-major order of the whole: single indices, then at most
    one partial dimension, then full ones."""
    dims = len(whole)
    while dims and part[dims - 1] == whole[dims - 1]:
        dims -= 1
    return all(n == 1 for n in part[: max(0, dims - 1)])
