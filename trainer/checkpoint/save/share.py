"""One rank's share of a checkpoint: which files it writes, and what it reports about them.

A rank writes one or several files per group, each bounded, by a few threads. What is larger than the bound is cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from sys import intern
from typing import Any, NamedTuple

from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import GROUPS, Group, Ints
from trainer.checkpoint.format.collector import no_collection
from trainer.checkpoint.format.pieces import DTYPE_NAMES, Piece
from trainer.checkpoint.format.threads import in_threads
from trainer.checkpoint.format.writing import FileLayout, in_file_order, write_file
from trainer.checkpoint.save.streaming import Copies, host_blocks

FILE_BYTES = 2 << 30  # of tensors in one file, at most (a single element aside)
WRITING_THREADS = 4  # files that a rank writes at a time


class WrittenPiece(NamedTuple):
    """A piece as the manifest needs it; `byte` counts from the beginning of the file. (Rank 0 of a large run makes
    millions of them, hence no dataclass.)"""

    key: str
    group: Group
    dtype: str
    shape: Sequence[int]
    offsets: Sequence[int]
    sizes: Sequence[int]
    start: int | None
    numel: int
    byte: int


@dataclass(frozen=True)
class WrittenFile:
    """A file of this save. `written` is False when it is a link to an earlier one."""

    path: str
    size: int
    data: int
    hashes: str
    written: bool
    pieces: list[WrittenPiece]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "pieces": self.pieces}

    @classmethod
    @no_collection()
    def from_json(cls, content: dict[str, Any]) -> WrittenFile:
        """Shapes and places of which there are many alike are kept once."""
        same: dict[Ints, Ints] = {}

        def once(numbers: Sequence[int]) -> Ints:
            key = tuple(numbers)
            return same.setdefault(key, key)

        pieces = [
            WrittenPiece(intern(key), group, intern(dtype), once(shape), once(offsets), once(sizes), start, numel, byte)
            for key, group, dtype, shape, offsets, sizes, start, numel, byte in content["pieces"]
        ]
        return cls(**{**content, "pieces": pieces})


@dataclass(frozen=True)
class PlannedFile:
    """A file that this rank will write; `path` is below the checkpoint's folder."""

    group: Group
    path: str
    layout: FileLayout


def plan_files(pieces: Sequence[Piece], rank: int) -> list[PlannedFile]:
    """The files that this rank writes, group by group: its pieces in file order, none above FILE_BYTES."""
    parts = [part for piece in pieces if piece.tensor.numel() for part in _cut(piece)]
    mine = [part for part in parts if part.is_mine()]
    return [
        PlannedFile(group, f"{group}/{file_name(rank, index)}", FileLayout.of(content))
        for group in GROUPS
        for index, content in enumerate(_bounded([part for part in mine if part.group == group]))
    ]


def file_name(rank: int, index: int) -> str:
    """A rank's files of a group: rank-00003.safetensors, rank-00003-001.safetensors and so on."""
    return f"rank-{rank:05d}{f'-{index:03d}' if index else ''}.safetensors"


def _cut(piece: Piece) -> Iterator[Piece]:
    """A piece as parts that fit into a file each: ranges, or boxes cut along the first dimension that can be. Cut alike
    on every rank that holds it, so replicas share the parts."""
    if piece.nbytes <= FILE_BYTES or piece.tensor.numel() == 1:
        yield piece
        return
    width = piece.tensor.element_size()
    if piece.start is not None:
        start = piece.start
        for part in piece.tensor.reshape(-1).split(max(1, FILE_BYTES // width)):
            yield replace(piece, tensor=part, start=start)
            start += part.numel()
        return
    dim = next(d for d, size in enumerate(piece.sizes) if size > 1)
    rows = max(1, FILE_BYTES // (prod(piece.sizes[dim + 1 :]) * width))
    offset = piece.offsets[dim]
    for part in piece.tensor.split(rows, dim):
        offsets = (*piece.offsets[:dim], offset, *piece.offsets[dim + 1 :])
        yield from _cut(replace(piece, tensor=part, offsets=offsets, sizes=tuple(part.shape)))
        offset += part.shape[dim]


def _bounded(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces, in file order, as lists of at most FILE_BYTES each."""
    files: list[list[Piece]] = []
    room = 0
    for piece in in_file_order(pieces):
        if piece.nbytes > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(piece)
        room -= piece.nbytes
    return files


def write_files(
    folder: str, files: Sequence[PlannedFile], held: Mapping[str, memoryview], copies: Copies | None
) -> list[WrittenFile]:
    """Write files below `folder`, a few at a time, durable with their names. `held` is data by path; the tensors of a
    file without any are streamed by `copies`. Raises the first error once all threads have ended."""

    def write(file: PlannedFile) -> WrittenFile:
        data, layout = held.get(file.path), file.layout
        blocks = [data] if data is not None else host_blocks([piece.tensor for piece in layout.pieces], copies)
        hashes = write_file(os.path.join(folder, file.path), layout, blocks)
        return report_of(file, hashes)

    written = list(in_threads(write, files, WRITING_THREADS))
    for group in dict.fromkeys(file.group for file in files):
        disk.fsync_dir(os.path.join(folder, group))
    return written


def report_of(file: PlannedFile, hashes: str) -> WrittenFile:
    """What is told about a file once it is written."""
    return WrittenFile(file.path, file.layout.size, len(file.layout.header), hashes, True, _describe(file.layout))


def _describe(layout: FileLayout) -> list[WrittenPiece]:
    return [
        WrittenPiece(
            key=piece.key,
            group=piece.group,
            dtype=DTYPE_NAMES[piece.tensor.dtype],
            shape=piece.shape,
            offsets=piece.offsets,
            sizes=piece.sizes,
            start=piece.start,
            numel=piece.tensor.numel(),
            byte=len(layout.header) + start,
        )
        for piece, start in zip(layout.pieces, layout.starts, strict=True)
    ]
