"""Frozen tensors on their way to files: they do not change, so no copy of them all is held in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from trainer.checkpoint.format.files import BLOCK_BYTES
from trainer.checkpoint.format.writing import bytes_of


class Copies(Protocol):
    """How a block gets into host memory: all that is asked of a GPU here."""

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bytes of a tensor in row-major order."""

    def buffer(self) -> torch.Tensor:
        """Host memory for a block."""

    def begin(self, part: torch.Tensor, held: torch.Tensor) -> Callable[[], None]:
        """Begin to copy bytes into host memory. Returns what waits until they are there."""


class OwnStream:
    """Copies from a GPU on a stream of their own: on the default one each would wait for a whole step's kernels."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.default_stream(device))  # else a tensor may be read before it is made

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            return _flat(tensor)

    def buffer(self) -> torch.Tensor:
        with torch.cuda.stream(self._stream):  # a new thread stands at GPU 0, and would take memory of it
            return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)

    def begin(self, part: torch.Tensor, held: torch.Tensor) -> Callable[[], None]:
        done = torch.cuda.Event(blocking=True)  # whoever waits for it leaves its core to others
        with torch.cuda.stream(self._stream):
            held.copy_(part, non_blocking=True)
            done.record(self._stream)
        return done.synchronize


def copies_from(tensors: Iterable[torch.Tensor]) -> Copies | None:
    """What copies from the GPU that any of the tensors is on; None when all are in host memory. It waits for what was
    queued until now, so it is made by the thread that trains, not once the next step is queued."""
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    return OwnStream(device) if device is not None else None


def host_blocks(tensors: Iterable[torch.Tensor], copies: Copies | None) -> Iterator[memoryview]:
    """The bytes of tensors in row-major order. A view holds until the next one is asked for.

    Host tensors are given as they are; one that is not contiguous is made so first, one at a time. From a GPU they pass
    through two blocks of host memory: while one is hashed and written, the next is being copied into the other.
    """
    if copies is None:
        for tensor in tensors:
            yield bytes_of(_flat(tensor))
        return
    buffers = (copies.buffer(), copies.buffer())
    parts = (part for tensor in tensors for part in copies.flat(tensor).split(BLOCK_BYTES))
    under_way: tuple[torch.Tensor, Callable[[], None]] | None = None
    for number, part in enumerate(parts):
        held = buffers[number % 2][: part.numel()]
        begun = held, copies.begin(part, held)
        if under_way is not None:
            yield _arrived(*under_way)
        under_way = begun
    if under_way is not None:
        yield _arrived(*under_way)


def _arrived(held: torch.Tensor, wait: Callable[[], None]) -> memoryview:
    wait()
    return bytes_of(held)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
