"""Writing the files of a checkpoint: laid out before, hashed as they go, streamed out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from trainer.checkpoint.format import disk
from trainer.checkpoint.format.files import BLOCK_BYTES
from trainer.checkpoint.format.pieces import DTYPE_NAMES, Piece

WRITE_BYTES = 1 << 16  # written at a time; for longer aligned writes Linux may take larger pages, at 4 times the CPU
DATA_ALIGNMENT = 64
# Long headers are filled up to the same length on most ranks, whatever digits their offsets have. Then a piece begins
# at the same byte in every rank's file, and the manifest says it once, not a thousand times.
LONG_HEADER_BYTES = 4096


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous host tensor as flat bytes, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class FileLayout:
    """Where each piece of a file lies. The header is made first, as all sizes are known."""

    pieces: list[Piece]
    starts: list[int]  # of each piece, from the beginning of the data
    header: bytes
    data_bytes: int

    @property
    def size(self) -> int:
        return len(self.header) + self.data_bytes

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> FileLayout:
        ordered = in_file_order(pieces)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, position = [], 0
        for piece in ordered:
            shape = [piece.tensor.numel()] if piece.start is not None else list(piece.sizes)
            end = position + piece.nbytes
            entries[piece.label] = {
                "dtype": DTYPE_NAMES[piece.tensor.dtype],
                "shape": shape,
                "data_offsets": [position, end],
            }
            starts.append(position)
            position = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        alignment = DATA_ALIGNMENT if len(text) < LONG_HEADER_BYTES else 1 << (len(text).bit_length() - 2)
        text += b" " * (-(len(text) + 8) % alignment)
        return cls(ordered, starts, len(text).to_bytes(8, "little") + text, position)


def in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Wide dtypes first, so that each tensor is aligned without gaps, which the format forbids. What replicas share
    comes last, as it differs from rank to rank: the rest begins at the same bytes on all."""
    return sorted(pieces, key=lambda p: (-p.tensor.element_size(), p.replicas > 1, p.label))


def write_file(path: str, layout: FileLayout, data: Iterable[memoryview]) -> str:
    """Write a new file of this layout and return its block hashes, 16 hex digits each. Durable but for its name.

    `data` gives the bytes after the header in order. Nothing is copied: parts of views go to the disk as they are.
    """
    file = disk.NewFile(path)
    try:
        hashes: list[str] = []
        block = xxhash.xxh3_64()
        _append(file, memoryview(layout.header), block, hashes)
        for view in data:
            _append(file, view, block, hashes)
        if file.size != layout.size:
            raise ValueError(f"{path}: {file.size} bytes written, {layout.size} announced")
        if file.size % BLOCK_BYTES:
            hashes.append(block.hexdigest())
        file.fsync()
    finally:
        file.close()
    return "".join(hashes)


def _append(file: disk.NewFile, view: memoryview, block: xxhash.xxh3_64, hashes: list[str]) -> None:
    """Write a view step by step, ending a hash at every block boundary."""
    position = 0
    while position < len(view):
        part = view[position : position + min(WRITE_BYTES, BLOCK_BYTES - file.size % BLOCK_BYTES)]
        block.update(part)
        file.write(part)
        position += len(part)
        if file.size % BLOCK_BYTES == 0:
            hashes.append(block.hexdigest())
            block.reset()


def write_bytes(path: str, content: bytes) -> None:
    """A small new file, durable but for its name."""
    file = disk.NewFile(path)
    try:
        file.write(memoryview(content))
        file.fsync()
    finally:
        file.close()
