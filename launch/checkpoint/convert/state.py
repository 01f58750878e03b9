"""What a checkpoint of any kind holds, in Muster's names, read a few MB at a time.

Every conversion passes through `State`: a source makes one, a target writes it. Tensors are named "<parameter>" or
"<parameter>.<state>". Step counts are integers per parameter. All other values are plain JSON.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from trainer.checkpoint.format.boxes import Group, Ints
from trainer.checkpoint.format.pieces import DTYPES
from trainer.checkpoint.format.writing import bytes_of
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.load.kinds import Kind

PART_BYTES = 8 << 20
_PARTS_AHEAD = 4

# Fields of a manifest that describe its storage, not its content.
STORAGE_FIELDS = {"format", "files", "partitions", "tensors", "checksums", "sources", "aliases", "step_counts"}


class Content(Protocol):
    """The source of one tensor's numbers."""

    @property
    def shape(self) -> Ints: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read_range_into(self, start: int, out: torch.Tensor) -> None:
        """Fill `out` (flat, of the tensor's dtype) with the row-major range that begins at `start`."""


@dataclass(frozen=True)
class StateTensor:
    group: Group
    content: Content

    @property
    def numel(self) -> int:
        return math.prod(self.content.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.content.dtype.itemsize


@dataclass
class State:
    """`facts`: a manifest's fields without those about files and tensors. `values`: plain values that a source of
    another kind held beside its tensors. `left_out`: names that could not be converted."""

    kind: Kind
    path: Path
    tensors: dict[str, StateTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    step_counts: dict[str, int] = field(default_factory=dict)
    trained_steps: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    @property
    def step(self) -> int:
        return int(self.facts.get("step", 0))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def parameters(self) -> dict[str, StateTensor]:
        """Parameters and buffers."""
        return {key: tensor for key, tensor in self.tensors.items() if tensor.group != "optim"}

    def optimizer(self) -> dict[str, dict[str, StateTensor]]:
        """Parameter -> state -> tensor."""
        found: dict[str, dict[str, StateTensor]] = {}
        for key, tensor in self.tensors.items():
            if tensor.group == "optim":
                name, _, state = key.rpartition(".")
                found.setdefault(name, {})[state] = tensor
        return found


@dataclass(frozen=True)
class _StoredContent:
    checkpoint: Checkpoint
    key: str
    shape: Ints
    dtype: torch.dtype

    def read_range_into(self, start: int, out: torch.Tensor) -> None:
        self.checkpoint.read_range_into(self.key, start, out)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(first element, its byte in a file) of the stored parts that are contiguous in row-major order."""
        found = []
        for place in self.checkpoint.manifest.places(self.key):
            if place.box.sizes[1:] == self.shape[1:]:
                found.append(((place.box.offsets or (0,))[0] * math.prod(self.shape[1:]), place.byte))
        return sorted(found)


def state_of(checkpoint: Checkpoint, weights_only: bool = False) -> State:
    """The state in a Muster checkpoint."""
    manifest = checkpoint.manifest
    tensors = {
        key: StateTensor(
            tensor.group, _StoredContent(checkpoint, key, manifest.shape_of(key), DTYPES[manifest.dtype_of(key)])
        )
        for key, tensor in manifest.tensors.items()
        if not (weights_only and tensor.group == "optim")
    }
    trained = {key: manifest.tensors[key].trained_step for key in tensors}
    return State(
        kind="muster",
        path=checkpoint.path,
        tensors=tensors,
        aliases=dict(manifest.aliases),
        step_counts={} if weights_only else dict(manifest.step_counts),
        trained_steps={key: step for key, step in trained.items() if step is not None},
        values=dict(manifest.config.get("converted_from", {}).get("values", {})),
        facts={k: v for k, v in manifest.model_dump(mode="json").items() if k not in STORAGE_FIELDS},
        close=checkpoint.close,
    )


@dataclass(frozen=True)
class Range:
    """A row-major range of a tensor."""

    content: Content
    start: int
    count: int

    @classmethod
    def whole(cls, content: Content) -> Range:
        return cls(content, 0, math.prod(content.shape))

    @property
    def nbytes(self) -> int:
        return self.count * self.content.dtype.itemsize


@contextmanager
def stream(ranges: Iterable[Range], progress: Callable[[int], None] | None = None) -> Iterator[Iterator[memoryview]]:
    """The bytes of ranges, one after the other, at most PART_BYTES at a time. A thread reads ahead.

    A part is valid until the next one is taken. No part spans two ranges, and an empty range gives no part. The thread
    ends with the `with` block, even after an error: a thread left to the garbage collector could wait for itself for
    ever.
    """
    pool = ThreadPoolExecutor(1)
    try:
        yield _read_ahead(pool, ranges, progress)
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(
    pool: ThreadPoolExecutor, ranges: Iterable[Range], progress: Callable[[int], None] | None
) -> Iterator[memoryview]:
    free = deque(torch.empty(PART_BYTES, dtype=torch.uint8) for _ in range(_PARTS_AHEAD + 1))
    pending: deque[tuple[Future[None], torch.Tensor, torch.Tensor]] = deque()

    def finish() -> Iterator[memoryview]:
        future, buffer, part = pending.popleft()
        future.result()
        if progress is not None:
            progress(part.numel() * part.element_size())
        yield bytes_of(part)
        free.append(buffer)

    for wanted in ranges:
        done, width = 0, wanted.content.dtype.itemsize
        while done < wanted.count:
            if len(pending) == _PARTS_AHEAD:
                yield from finish()
            buffer, start = free.popleft(), wanted.start + done
            count = min(_part_elements(wanted.content, start), wanted.count - done)
            part = buffer[: count * width].view(wanted.content.dtype)
            pending.append((pool.submit(wanted.content.read_range_into, start, part), buffer, part))
            done += count
    while pending:
        yield from finish()


def _part_elements(content: Content, start: int) -> int:
    """How many elements to read from `start` on. A part of a Muster checkpoint ends where a block of its file ends:
    reading within a block reads all of it."""
    width = content.dtype.itemsize
    places = content.places if isinstance(content, _StoredContent) else []
    index = bisect_right(places, (start, math.inf)) - 1
    if index < 0:
        return PART_BYTES // width
    first, byte = places[index]
    return max(1, (PART_BYTES - (byte + (start - first) * width) % PART_BYTES) // width)


def take(parts: Iterator[memoryview], count: int) -> Iterator[memoryview]:
    """Take as many parts as make `count` bytes."""
    while count > 0:
        part = next(parts)
        count -= len(part)
        yield part
