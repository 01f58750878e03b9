"""manifest.json: everything that a checkpoint is, except the numbers in its tensors.

It suffices to load without the run's code or config. All of it is checked before any of it is used. It has the digest
of `checksums.json` and of itself, so a checksum covers every byte of a checkpoint. Format 1:

    format, step, attempt, saved_s, metric              which checkpoint this is
    position, loop, config, fingerprint, model, layout, data    the trainer's own, see facts.py
    step_counts {parameter: updates}, aliases {name of a tied tensor: the name it is stored under}
    files [{path, size, data}]                          data: the byte where tensors begin
    partitions [{shape, pieces [{file, offsets, sizes} or {file, start, length}]}]
    tensors {key: {group, dtype, partition, bytes, trained_step}}
    checksums, digest

A partition tells how a shape is cut over files. Tensors of one shape and group usually share a partition, so that the
manifest stays small at a thousand ranks. `bytes`: where each piece begins in its file, one number if all agree.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.checkpoint.format.boxes import (
    WIDTHS,
    Box,
    Group,
    Ints,
    box_label,
    boxes_of_range,
    range_label,
    ranges_fault,
    tiling_fault,
)
from trainer.checkpoint.format.collector import no_collection
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.facts import Config, Hex, Loop, Plain, Position, Size, Time, Word, contradiction
from trainer.checkpoint.format.strict import parse

FORMAT = 1
CHECKSUMS = "checksums.json"
MANIFEST_LIMIT_BYTES = 256 << 20  # also of checksums.json: enough for 64 TB
PIECES_LIMIT = 1 << 24  # of all tensors together: 4,096 ranks of the largest model

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
M = TypeVar("M", bound=BaseModel)
_DIGEST_TAIL = re.compile(rb',"digest":"([0-9a-f]{32})"}\n\Z')
_LATER_FIELDS = ("buffers", "stateless", "sources")  # left out when empty: the bytes are then those of older versions
_BLANK_TAIL = b',"digest":""}\n'


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Source(_Part):
    """Another checkpoint that holds files of this one: its folder, its step, and the digest of its manifest."""

    path: str = Field(pattern=r"^/[^\x00]*$")
    step: Size
    digest: Digest


class StoredFile(_Part):
    """One safetensors file. Its path stays inside the checkpoint's folder, or inside that of the named source."""

    path: str = Field(pattern=r"^(model|frozen|optim)/[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$")
    size: Size
    data: Size
    source: Size | None = None

    @property
    def name(self) -> str:
        """The file's name in checksums.json."""
        return self.path if self.source is None else f"source-{self.source}/{self.path}"

    def may_hold(self, group: Group) -> bool:
        """Whether this file may hold tensors of the group. A tensor frozen here may have been trained in the source."""
        return self.source is not None or self.path.startswith(f"{group}/")


class BoxPiece(_Part):
    file: Size
    offsets: list[Size]
    sizes: list[Size]

    @property
    def stored_shape(self) -> list[int]:
        return self.sizes

    def label(self, key: str) -> str:
        """The piece's name in its file."""
        return box_label(key, self.offsets)


class FlatPiece(_Part):
    file: Size
    start: Size
    length: Size

    @property
    def stored_shape(self) -> list[int]:
        return [self.length]

    def label(self, key: str) -> str:
        """The piece's name in its file."""
        return range_label(key, self.start)


class Partition(_Part):
    """A shape and the pieces that cover it: every element exactly once, no empty piece."""

    shape: list[Size] = Field(max_length=64)
    pieces: list[BoxPiece | FlatPiece]

    @cached_property
    def boxes(self) -> list[list[Box]]:
        """The boxes of each piece."""
        return [
            boxes_of_range(tuple(self.shape), p.start, p.length)
            if isinstance(p, FlatPiece)
            else [Box(tuple(p.offsets), tuple(p.sizes))]
            for p in self.pieces
        ]

    @cached_property
    def flat_boxes(self) -> list[tuple[int, Box]]:
        """Every box with the number of its piece."""
        return [(number, box) for number, boxes in enumerate(self.boxes) for box in boxes]

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """First indices and ends of all boxes, one row per box."""
        boxes = [box for _, box in self.flat_boxes]
        low = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), len(self.shape))
        return low, low + np.array([box.sizes for box in boxes], dtype=np.int64).reshape(low.shape)

    def touching(self, offsets: Ints, sizes: Ints) -> list[tuple[int, Box]]:
        """The boxes that share elements with a non-empty box, each with the number of its piece."""
        low, high = self._edges
        begin = np.array(offsets, dtype=np.int64)
        found = ((low < begin + np.array(sizes, dtype=np.int64)) & (high > begin)).all(axis=1)
        return [self.flat_boxes[i] for i in np.flatnonzero(found).tolist()]

    @cached_property
    def numels(self) -> list[int]:
        return [p.length if isinstance(p, FlatPiece) else math.prod(p.sizes) for p in self.pieces]

    @model_validator(mode="after")
    def _tiles(self) -> Partition:
        total = math.prod(self.shape)
        for piece in self.pieces:
            if isinstance(piece, FlatPiece):
                if piece.length == 0 or piece.start + piece.length > total:
                    raise ValueError(f"range {piece.start} + {piece.length} in a shape of {total} elements")
            elif not len(piece.offsets) == len(piece.sizes) == len(self.shape):
                raise ValueError(f"a box {piece.offsets}, {piece.sizes} in shape {self.shape}")
        flat = [(piece.start, piece.length) for piece in self.pieces if isinstance(piece, FlatPiece)]
        if len(flat) == len(self.pieces):
            fault = ranges_fault(total, flat)
        else:
            fault = tiling_fault(tuple(self.shape), [box for boxes in self.boxes for box in boxes])
        if fault:
            raise ValueError(fault)
        return self


class StoredTensor(_Part):
    """One tensor. `trained_step`: the step at which it last changed; None for optimizer state."""

    group: Group
    dtype: str
    partition: Size
    bytes: Size | list[Size]
    trained_step: Size | None = None

    @model_validator(mode="after")
    def _known(self) -> StoredTensor:
        if self.dtype not in WIDTHS:
            raise ValueError(f"unknown dtype {self.dtype!r}")
        return self


class Place(NamedTuple):
    """A box of a tensor and where its row-major content begins in a file."""

    file: int
    byte: int
    box: Box


class Manifest(_Part):
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT
    step: Size
    attempt: Size = 0
    saved_s: Time = 0.0
    metric: float | None = None
    position: Position = {}
    loop: Loop = {}
    config: Config = {}
    fingerprint: Hex = ""
    model: Plain = {}
    layout: dict[Word, Size | Word] = {}
    data: dict[str, Hex] = {}
    step_counts: dict[str, Size] = {}
    aliases: dict[str, str] = {}
    buffers: list[str] = []
    stateless: list[str] = []
    sources: list[Source] = []
    files: list[StoredFile]
    partitions: list[Partition]
    tensors: dict[str, StoredTensor]
    checksums: Digest

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file stands twice")
        if any(file.source is not None and file.source >= len(self.sources) for file in self.files):
            raise ValueError("a file lies in a source that is not listed")
        for partition in self.partitions:
            if any(piece.file >= len(self.files) for piece in partition.pieces):
                raise ValueError("a piece lies in a file that is not listed")
        self._check_tensors()
        used: list[list[tuple[int, int, str]]] = [[] for _ in self.files]
        for key in self.tensors:
            for file, start, end in self.ranges(key):
                used[file].append((start, end, key))
        for stored, ranges in zip(self.files, used, strict=True):
            position, shared = stored.data, stored.source is not None  # a source also holds other tensors
            for start, end, key in sorted(ranges):
                if start != position and not (shared and start > position):
                    raise ValueError(f"{stored.path}: {key} begins at byte {start}, not at {position}")
                position = end
            if position > stored.size or (position < stored.size and not shared):
                raise ValueError(f"{stored.path}: tensors end at byte {position}, the file at {stored.size}")
        self._check_names()
        fault = contradiction(self.step, self.metric, self.position, self.loop, self.layout)
        if fault:
            raise ValueError(fault)
        return self

    def _check_tensors(self) -> None:
        """Check that each tensor's partition is listed, fits its group and has a place for each piece."""
        suits: set[tuple[int, Group]] = set()
        count = 0
        for key, tensor in self.tensors.items():
            if tensor.partition >= len(self.partitions):
                raise ValueError(f"{key}: partition {tensor.partition} is not listed")
            pieces = self.partitions[tensor.partition].pieces
            count += len(pieces)
            if count > PIECES_LIMIT:
                raise ValueError("too many pieces to be true")
            if (tensor.partition, tensor.group) not in suits:
                files = {piece.file for piece in pieces}
                odd = [self.files[i] for i in files if not self.files[i].may_hold(tensor.group)]
                if odd:
                    raise ValueError(f"{key} of group {tensor.group} lies in {odd[0].path}")
                suits.add((tensor.partition, tensor.group))
            starts = [tensor.bytes] if isinstance(tensor.bytes, int) else tensor.bytes
            if not isinstance(tensor.bytes, int) and len(starts) != len(pieces):
                raise ValueError(f"{key}: {len(starts)} places for {len(pieces)} pieces")
            width = WIDTHS[tensor.dtype]
            if any(start % width for start in starts):
                raise ValueError(f"{key}: begins at a byte where {tensor.dtype} cannot")
            if (tensor.trained_step is None) != (tensor.group == "optim") or (tensor.trained_step or 0) > self.step:
                raise ValueError(f"{key} of group {tensor.group}: trained_step {tensor.trained_step} of {self.step}")

    def _check_names(self) -> None:
        """Check that every name in a field about parameters or buffers is one of this checkpoint's."""
        here = {key for key, tensor in self.tensors.items() if tensor.group != "optim"}
        for alias, name in self.aliases.items():
            if alias in self.tensors or name not in here:
                raise ValueError(f"{alias} cannot be another name of {name}")
        named = {"step_counts": self.step_counts, "buffers": self.buffers, "stateless": self.stateless}
        for what, found in named.items():
            strangers = set(found) - here
            if strangers:
                raise ValueError(f"{what}: no parameter or buffer {min(strangers)} is here")

    def ranges(self, key: str) -> Iterator[tuple[int, int, int]]:
        """(file, first byte, end) of each piece of a tensor."""
        tensor = self.tensors[key]
        partition, width = self.partitions[tensor.partition], WIDTHS[tensor.dtype]
        starts = _spread(tensor.bytes, len(partition.pieces))
        for piece, start, numel in zip(partition.pieces, starts, partition.numels, strict=True):
            yield piece.file, start, start + numel * width

    def name_of(self, key: str) -> str:
        """The key under which a tensor is stored: its own, or the first name of a tied one."""
        return self.aliases.get(key, key)

    def shape_of(self, key: str) -> Ints:
        return tuple(self.partitions[self.tensors[self.name_of(key)].partition].shape)

    def dtype_of(self, key: str) -> str:
        """The name of a tensor's number format."""
        return self.tensors[self.name_of(key)].dtype

    def places(self, key: str, offsets: Ints | None = None, sizes: Ints | None = None) -> list[Place]:
        """Where a tensor's content is: boxes that cover it exactly once, or those that overlap a non-empty box."""
        tensor = self.tensors[self.name_of(key)]
        partition, width = self.partitions[tensor.partition], WIDTHS[tensor.dtype]
        starts = _spread(tensor.bytes, len(partition.pieces))
        whole = offsets is None or sizes is None
        boxes = partition.flat_boxes if whole else partition.touching(offsets, sizes)  # type: ignore[arg-type]
        return [Place(partition.pieces[i].file, starts[i] + box.start * width, box) for i, box in boxes]

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def encode(self) -> bytes:
        """The text of manifest.json, with its digest in the last field."""
        absent: dict[str, Any] = {name: True for name in _LATER_FIELDS if not getattr(self, name)}
        if not self.sources:
            absent["files"] = {"__all__": {"source"}}
        body = self.model_dump(mode="json", exclude=absent)
        text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        blank = text[:-1] + _BLANK_TAIL
        return text[:-1] + b',"digest":"' + digest(blank).encode() + b'"}\n'


def _spread(starts: int | list[int], count: int) -> list[int]:
    return [starts] * count if isinstance(starts, int) else starts


def digest(content: bytes) -> str:
    """The checksum of a small file: xxh3-128 as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_in(content: bytes) -> str:
    """The digest at the end of a manifest's text."""
    tail = _DIGEST_TAIL.search(content[-64:])
    return tail.group(1).decode() if tail else ""


@no_collection()
def decode(path: str | Path, content: bytes) -> Manifest:
    """The manifest in `content`. Raises BadCheckpoint, which names `path`, unless every field can be trusted."""
    tail = _DIGEST_TAIL.search(content[-64:])
    if tail is None:
        raise BadCheckpoint(path, "does not end with its digest: cut short or not a manifest")
    body = content[: -len(tail.group())]
    if digest(body + _BLANK_TAIL) != tail.group(1).decode():
        raise BadCheckpoint(path, "its digest is wrong: the file was damaged or edited")
    return _parsed(Manifest, path, body + b"}")


def _parsed(kind: type[M], path: str | Path, text: bytes) -> M:
    """JSON as a strict model. Raises BadCheckpoint, also for two equal keys, where pydantic would take the last one."""
    try:
        found = kind.model_validate_json(text)
        parse(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadCheckpoint(path, f"{where + ': ' if where else ''}{first['msg']}") from None
    except ValueError as error:
        raise BadCheckpoint(path, str(error)) from None
    return found


def encode_checksums(files: dict[str, str], block_bytes: int) -> bytes:
    """The text of checksums.json: for each file its block hashes in one string, 16 hex digits each."""
    return json.dumps({"block_bytes": block_bytes, "xxh3_64": files}, separators=(",", ":")).encode() + b"\n"


class Checksums(_Part):
    """The content of checksums.json."""

    block_bytes: Size
    xxh3_64: dict[str, Annotated[str, Field(pattern=r"^([0-9a-f]{16})*$")]]


def parse_checksums(path: str | Path, content: bytes) -> Checksums:
    """Raises BadCheckpoint unless the form is right. `decode_checksums` checks that it belongs to the manifest."""
    return _parsed(Checksums, path, content)


def decode_checksums(path: str | Path, content: bytes, manifest: Manifest, block_bytes: int) -> dict[str, str]:
    """File name -> block hashes. Raises BadCheckpoint unless this is the file that the manifest means."""
    if digest(content) != manifest.checksums:
        raise BadCheckpoint(path, "not the file that manifest.json means: its digest is another")
    checksums = parse_checksums(path, content)
    if checksums.block_bytes != block_bytes or checksums.xxh3_64.keys() != {f.name for f in manifest.files}:
        raise BadCheckpoint(path, "its blocks or files are not those of manifest.json")
    return checksums.xxh3_64
