"""Read many boxes at once, by file and block: in file order, several blocks at a time.

Every touched block is read once and checked whole. Bytes that are needed as they are go straight to their destination.
The rest of a block goes through a buffer, and each destination copies its part from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import torch

from trainer.checkpoint.format.boxes import Box, Ints, Wanted, boxes_of_range, intersect
from trainer.checkpoint.format.collector import no_collection
from trainer.checkpoint.format.files import BLOCK_BYTES, FileReader
from trainer.checkpoint.format.manifest import Manifest, Place
from trainer.checkpoint.format.pieces import DTYPES
from trainer.checkpoint.format.threads import in_threads
from trainer.checkpoint.format.writing import bytes_of

READING_THREADS = 4  # on fewer cores too: a disk is fastest when it has much to do at once
TASK_BLOCKS = 8  # blocks that one thread takes at a time
TASKS_AHEAD = 8  # tasks that the system is asked to fetch meanwhile

# Integers of the same size: bits are copied, never interpreted.
_BITS = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.int16),
    4: (torch.int32, np.int32),
    8: (torch.int64, np.int64),
}


@dataclass(frozen=True)
class Destination:
    """Where a box of a tensor goes: `out` has the box's sizes, on any device, with any strides."""

    box: Box
    out: torch.Tensor
    dtype: torch.dtype
    bits: np.ndarray | None  # `out` as integers, if it is in host memory and has the stored dtype
    direct: memoryview | None  # the row-major bytes of the box, if `out` has exactly these

    @classmethod
    def of(cls, box: Box, out: torch.Tensor, dtype: torch.dtype) -> Destination:
        out = out.detach()
        if out.shape != box.sizes:
            out = out.view(box.sizes)
        plain = out.device.type == "cpu" and out.dtype == dtype
        bits = out.view(_BITS[dtype.itemsize][0]).numpy() if plain else None
        return cls(box, out, dtype, bits, bytes_of(out) if plain and out.is_contiguous() else None)

    def put(self, part: Box, raw: np.ndarray) -> None:
        """Copy the wanted numbers of `part`, a box of the tensor, from its row-major bytes."""
        shared = intersect(self.box, part.offsets, part.sizes)
        if shared is None:
            return
        here = tuple(slice(o - b, o - b + n) for o, b, n in zip(shared[0], self.box.offsets, shared[1], strict=True))
        there = tuple(slice(o - p, o - p + n) for o, p, n in zip(shared[0], part.offsets, shared[1], strict=True))
        source = raw.view(_BITS[self.dtype.itemsize][1]).reshape(part.sizes)[there]
        if self.bits is not None:
            self.bits[here] = source  # by numpy, in this thread: torch would start more threads
        else:
            self.out[here].copy_(torch.from_numpy(source).view(self.dtype))


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) of a file, all or some of which a destination wants. They are part of the stored box
    `place`. `direct`: where they go, if the destination wants all of them contiguously."""

    start: int
    end: int
    place: Place
    destination: Destination
    direct: memoryview | None

    def put(self, low: int, content: np.ndarray) -> None:
        """Copy the wanted numbers from bytes of the file that begin at the byte `low`."""
        begin, end = max(self.start, low), min(self.end, low + len(content))
        if begin >= end:
            return
        width, stored = self.destination.dtype.itemsize, self.place.box
        first = (begin - self.place.byte) // width
        for box in boxes_of_range(stored.sizes, first, (end - begin) // width):
            offsets = tuple(a + b for a, b in zip(stored.offsets, box.offsets, strict=True))
            at = begin - low + box.start * width
            self.destination.put(Box(offsets, box.sizes), content[at : at + box.numel * width])


_Task = tuple[FileReader, list[tuple[int, list[Span]]]]  # blocks of a file, and the spans that touch each


def spans_of(place: Place, destination: Destination) -> list[Span]:
    """The parts of a stored box that a destination wants, without blocks of which it wants nothing."""
    shared = intersect(place.box, destination.box.offsets, destination.box.sizes)
    return [] if shared is None else _spans(place, destination, *shared)


def _spans(place: Place, destination: Destination, offsets: Ints, sizes: Ints) -> list[Span]:
    width, stored = destination.dtype.itemsize, place.box
    is_run = _is_run(sizes, stored.sizes)
    wide = next((d for d, n in enumerate(sizes) if n > 1), None)
    if not is_run and wide is not None and prod(stored.sizes[wide + 1 :]) * width > BLOCK_BYTES:
        ones = [(*offsets[:wide], offsets[wide] + i, *offsets[wide + 1 :]) for i in range(sizes[wide])]
        return [s for o in ones for s in _spans(place, destination, o, (*sizes[:wide], 1, *sizes[wide + 1 :]))]
    first = _flat_index(offsets, stored)
    last = _flat_index([o + n - 1 for o, n in zip(offsets, sizes, strict=True)], stored)
    start, end = place.byte + first * width, place.byte + (last + 1) * width
    direct = None
    if destination.direct is not None and is_run and _is_run(sizes, destination.box.sizes):
        begin = _flat_index(offsets, destination.box) * width
        direct = destination.direct[begin : begin + end - start]
    return [Span(start, end, place, destination, direct)]


def read_spans(readers: Sequence[FileReader], spans: Mapping[int, list[Span]]) -> None:
    """Fill all destinations. `spans`: by file. Raises BadCheckpoint for the first bad block."""
    tasks: list[_Task] = []
    for file in sorted(spans):
        blocks: dict[int, list[Span]] = defaultdict(list)
        for span in sorted(spans[file], key=lambda s: s.start):
            for index in range(span.start // BLOCK_BYTES, -(-span.end // BLOCK_BYTES)):
                blocks[index].append(span)
        touched = sorted(blocks.items())
        tasks += [(readers[file], touched[i : i + TASK_BLOCKS]) for i in range(0, len(touched), TASK_BLOCKS)]
    for _ in _read_tasks(tasks, READING_THREADS):
        pass


def verify_files(readers: Sequence[FileReader], threads: int) -> Generator[int, None, None]:
    """Check every block of every file; yields how many more bytes were found good."""
    tasks: list[_Task] = [
        (reader, [(index, []) for index in range(first, min(first + TASK_BLOCKS, reader.blocks))])
        for reader in readers
        for first in range(0, reader.blocks, TASK_BLOCKS)
    ]
    return _read_tasks(tasks, threads)


def _read_tasks(tasks: Sequence[_Task], threads: int) -> Generator[int, None, None]:
    """Read the blocks of all tasks; yields the bytes of each task."""
    for task in tasks[:TASKS_AHEAD]:
        _announce(task)

    def read(index: int) -> int:
        if index + TASKS_AHEAD < len(tasks):
            _announce(tasks[index + TASKS_AHEAD])
        return _read_blocks(tasks[index])

    return in_threads(read, range(len(tasks)), threads)


def _announce(task: _Task) -> None:
    """Announce a task's blocks, unless they are far apart: the bytes between them are not wanted."""
    reader, blocks = task
    if blocks[-1][0] - blocks[0][0] < 2 * len(blocks):
        reader.announce(blocks[0][0], blocks[-1][0])


def _read_blocks(task: _Task) -> int:
    """Read some blocks of a file for the spans that touch each. Returns their bytes."""
    reader, blocks = task
    buffer = np.empty(BLOCK_BYTES, dtype=np.uint8)
    done = 0
    for index, spans in blocks:
        low, high = reader.block_range(index)
        reader.read_block(index, _parts(low, high, spans, buffer))
        done += high - low
    return done


def _parts(low: int, high: int, spans: Sequence[Span], buffer: np.ndarray) -> Iterator[memoryview]:
    """The memory to read the block [low, high) into, part by part: a span's own, or the buffer. Before the next part,
    the spans copy what they want from the buffer."""
    inside = [(max(span.start, low), min(span.end, high)) for span in spans]
    apart = all(begin >= end for (_, end), (begin, _) in pairwise(inside))
    direct = [
        (begin, end, span.direct[begin - span.start : end - span.start])
        for (begin, end), span in zip(inside, spans, strict=True)
        if apart and span.direct is not None
    ]
    loose = [span for span in spans if not apart or span.direct is None]
    position = low
    for begin, end, out in [*direct, (high, high, memoryview(b""))]:
        if position < begin:
            part = buffer[: begin - position]
            yield part.data
            for span in loose:
                span.put(position, part)
        yield out
        position = end


def _flat_index(at: Iterable[int], box: Box) -> int:
    """The index of a tensor's element in a box's row-major order."""
    index = 0
    for position, offset, size in zip(at, box.offsets, box.sizes, strict=True):
        index = index * size + position - offset
    return index


def _is_run(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a part of these sizes is contiguous in the row-major order of the whole. Then it has single indices
    first, at most one partial dimension, and full ones after that."""
    dims = len(whole)
    while dims and part[dims - 1] == whole[dims - 1]:
        dims -= 1
    return all(n == 1 for n in part[: max(0, dims - 1)])


@no_collection()
def spans_for(manifest: Manifest, wanted: Iterable[Wanted]) -> dict[int, list[Span]]:
    """File -> the parts of it that must be read to fill all `wanted`."""
    spans: dict[int, list[Span]] = {}
    for one in wanted:
        if one.out.numel() == 0:
            continue
        box = Box(tuple(one.offsets), tuple(one.sizes))
        destination = Destination.of(box, one.out, DTYPES[manifest.dtype_of(one.key)])
        for place in manifest.places(one.key, box.offsets, box.sizes):
            spans.setdefault(place.file, []).extend(spans_of(place, destination))
    return spans
