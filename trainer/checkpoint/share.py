"""One rank's share of a checkpoint: which files it writes, and what it reports about them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.checkpoint import disk
from trainer.checkpoint.files import FileLayout, host_blocks, write_file
from trainer.checkpoint.pieces import DTYPE_NAMES, GROUPS, Group, Piece


@dataclass(frozen=True)
class WrittenPiece:
    """A piece as the manifest needs it; `byte` counts from the beginning of the file."""

    key: str
    group: Group
    dtype: str
    shape: list[int]
    offsets: list[int]
    sizes: list[int]
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
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> WrittenFile:
        return cls(**{**content, "pieces": [WrittenPiece(**piece) for piece in content["pieces"]]})


@dataclass(frozen=True)
class FrozenBase:
    """A file of frozen tensors in a committed checkpoint that later ones may link to."""

    folder: str
    file: WrittenFile
    signature: tuple[Any, ...]
    links: int = 0


def layouts_of(pieces: Sequence[Piece]) -> dict[Group, FileLayout]:
    """The file of each group that this rank writes; groups in which it has nothing are absent."""
    mine = [piece for piece in pieces if piece.is_mine() and piece.tensor.numel()]
    layouts = {group: FileLayout.of(piece for piece in mine if piece.group == group) for group in GROUPS}
    return {group: layout for group, layout in layouts.items() if layout.pieces}


def signature_of(layout: FileLayout, trained_steps: dict[str, int]) -> tuple[Any, ...]:
    """Equal exactly when two files of frozen tensors hold the same: the same places, last trained at the same steps."""
    return (layout.header, tuple(trained_steps.get(piece.key, 0) for piece in layout.pieces))


def write_group(
    folder: str, group: Group, rank: int, layout: FileLayout, data: memoryview | None, base: FrozenBase | None
) -> WrittenFile:
    """Write (or link) one file below `folder`, durable with its name. `data` None: the tensors are streamed."""
    name = f"{group}/rank-{rank:05d}.safetensors"
    path = os.path.join(folder, name)
    if base is not None and _linked(os.path.join(base.folder, base.file.path), path):
        hashes, written = base.file.hashes, False
    else:
        blocks = [data] if data is not None else host_blocks([piece.tensor for piece in layout.pieces])
        hashes, written = write_file(path, layout, blocks), True
    disk.fsync_dir(os.path.join(folder, group))
    pieces = [
        _describe(piece, len(layout.header) + start) for piece, start in zip(layout.pieces, layout.starts, strict=True)
    ]
    return WrittenFile(name, layout.size, len(layout.header), hashes, written, pieces)


def _linked(source: str, path: str) -> bool:
    """Link when the filesystem can; if it cannot, or the source is gone, the file is written instead."""
    try:
        disk.link(source, path)
    except OSError:
        return False
    return True


def _describe(piece: Piece, byte: int) -> WrittenPiece:
    return WrittenPiece(
        key=piece.key,
        group=piece.group,
        dtype=DTYPE_NAMES[piece.tensor.dtype],
        shape=list(piece.shape),
        offsets=list(piece.offsets),
        sizes=list(piece.sizes),
        start=piece.start,
        numel=piece.tensor.numel(),
        byte=byte,
    )
