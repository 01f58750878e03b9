"""A folder of `torch.distributed.checkpoint`, as a source and as a target.

A folder holds `.metadata`, a pickle of a few data classes, and `*.distcp` files. Each of these is a series of
torch.save archives. Reading runs nothing in either. The target holds the nested dict of `names.nested`, flattened as
DCP does; tied tensors are two names of one place.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from launch.checkpoint.convert.archive import Archive, ArchivedContent, ArchiveWriter, Files, NewTensor
from launch.checkpoint.convert.names import FACTS, Path_, is_content, leaves_of, nested, sort_leaves
from launch.checkpoint.convert.state import PART_BYTES, Content, Range, State, stream, take
from launch.checkpoint.convert.unpickle import (
    PICKLE_LIMIT_BYTES,
    ArchivedTensor,
    Enumeration,
    Names,
    Record,
    record_type,
    unpickle,
)
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import Box, Ints, boxes_of_range, intersect, tiling_fault
from trainer.checkpoint.format.writing import bytes_of
from trainer.checkpoint.load.kinds import METADATA

FILE_LIMIT_BYTES = 4 << 30  # a larger file is closed, and a new one begins
CHUNK_LIMIT_BYTES = 1 << 30  # DCP loads a whole chunk before it takes a rank's part of it

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"


def _names() -> Names:
    """The types that a `.metadata` may name."""
    of_metadata = ["Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"]
    of_metadata += ["TensorProperties", "MetadataIndex", "StorageMeta"]
    names: Names = {(_METADATA_MODULE, name): record_type(name) for name in of_metadata}
    names[_OLD_MODULE, "TensorProperties"] = names[_METADATA_MODULE, "TensorProperties"]
    names["torch.distributed.checkpoint.filesystem", "_StorageInfo"] = record_type("_StorageInfo")
    formats = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
    encodings = Enumeration(tuple((name, value) for value, name in enumerate(formats)))
    names |= {(_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): encodings, (_OLD_MODULE, "MEM_FORMAT_ENCODING"): encodings}
    paths = ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    names |= {(module, name): record_type(name) for module in ("pathlib", "pathlib._local") for name in paths}
    return names


@dataclass(frozen=True)
class _Item:
    """Where one archive is."""

    file: str
    start: int
    length: int


class _Folder:
    """The parsed metadata of a DCP folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, Files(path)
        size = self.files.size(METADATA)
        if size > PICKLE_LIMIT_BYTES:
            raise UserError(f"{path / METADATA}: it is too large to be true")
        content = bytearray(size)
        self.files.read(METADATA, 0, memoryview(content))
        root = unpickle(str(path / METADATA), bytes(content), _names())
        try:
            self.entries = dict(root.field("state_dict_metadata"))
            self.paths = dict(root.field("planner_data") or {})
            storage = dict(root.field("storage_data"))
            self.items = {_index(index): self._item(info) for index, info in storage.items()}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{path / METADATA}: not the metadata of torch.distributed.checkpoint") from None

    def _item(self, info: Record) -> _Item:
        name, start, length = info.field("relative_path"), info.field("offset"), info.field("length")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.@=-]+(/[\w.@=-]+)*", name) or ".." in name.split("/"):
            raise UserError(f"{self.path / METADATA}: {str(name)[:80]!r} is not the name of a file in the folder")
        if type(start) is not int or type(length) is not int or start < 0 or length < 0:
            raise ValueError("an item that lies nowhere")
        if info.field("transform_descriptors"):
            raise UserError(f"{self.path / name}: compressed by {info.field('transform_descriptors')}, not read here")
        return _Item(name, start, length)

    def archive(self, key: str, offsets: Ints | None) -> Archive:
        item = self.items.get((key, offsets))
        if item is None:
            raise UserError(f"{self.path / METADATA}: it does not say where {key} {list(offsets or ())} lies")
        return Archive(self.files, item.file, item.start, item.length, key)


def _index(index: Record) -> tuple[str, Ints | None]:
    offset = index.field("offset")
    return str(index.field("fqn")), None if offset is None else tuple(offset)


class DcpContent:
    """A tensor in a DCP folder: chunks, each one a box of the tensor and an archive of its own."""

    def __init__(self, folder: _Folder, key: str, entry: Record) -> None:
        try:
            properties = entry.field("properties")
            dtype = properties.field("dtype") or properties.state[0]
            self.shape: Ints = tuple(entry.field("size"))
            boxes = {(tuple(c.field("offsets")), tuple(c.field("sizes"))) for c in entry.field("chunks")}
            if not isinstance(dtype, torch.dtype):
                raise TypeError(key)
            self.dtype = dtype
            self._boxes = [Box(offsets, sizes) for offsets, sizes in sorted(boxes) if prod(sizes)]
            fault = tiling_fault(self.shape, self._boxes)
        except (AttributeError, TypeError, ValueError, IndexError):
            raise UserError(f"{folder.path / METADATA}: {key} is not described as a tensor") from None
        if fault:
            raise UserError(f"{folder.path / METADATA}: {key}: {fault}")
        self._folder, self._key = folder, key
        self._opened: dict[Ints, ArchivedContent] = {}

    @property
    def place(self) -> Any:
        items = [self._folder.items.get((self._key, box.offsets)) for box in self._boxes]
        return (self.shape, tuple(items)) if items and all(items) else None

    def read_range_into(self, start: int, out: torch.Tensor) -> None:
        content, width = bytes_of(out), self.dtype.itemsize
        for wanted in boxes_of_range(self.shape, start, out.numel()):
            target = content[wanted.start * width : (wanted.start + wanted.numel) * width]
            for chunk in self._boxes:
                shared = intersect(chunk, wanted.offsets, wanted.sizes)
                if shared is not None:
                    self._copy(chunk, wanted, shared, target)

    def _copy(self, chunk: Box, wanted: Box, shared: tuple[Ints, Ints], target: memoryview) -> None:
        """Copy rows of the chunk, some at a time. numpy copies the wanted part of each row."""
        offsets, sizes = shared
        opened, width = self._open(chunk), self.dtype.itemsize
        if not self.shape:
            opened.read_bytes(0, target)
            return
        row = prod(chunk.sizes[1:]) * width
        first = offsets[0] - chunk.offsets[0]
        if sizes == wanted.sizes and sizes[1:] == chunk.sizes[1:]:
            opened.read_bytes(first * row, target)
            return
        out = np.frombuffer(target, dtype=np.uint8).reshape(*wanted.sizes, width)
        from_chunk = tuple(slice(o - c, o - c + n) for o, c, n in zip(offsets, chunk.offsets, sizes, strict=True))
        place = tuple(slice(o - w, o - w + n) for o, w, n in zip(offsets, wanted.offsets, sizes, strict=True))
        at_once = max(1, PART_BYTES // row)
        for done in range(0, sizes[0], at_once):
            rows = min(at_once, sizes[0] - done)
            held = np.empty((rows, *chunk.sizes[1:], width), dtype=np.uint8)
            opened.read_bytes((first + done) * row, held.reshape(-1).data)
            begin = place[0].start + done
            out[(slice(begin, begin + rows), *place[1:])] = held[(slice(None), *from_chunk[1:])]

    def _open(self, chunk: Box) -> ArchivedContent:
        opened = self._opened.get(chunk.offsets)
        if opened is None:
            archive = self._folder.archive(self._key, chunk.offsets)
            tensor = archive.root
            if not isinstance(tensor, ArchivedTensor) or (tensor.shape, tensor.dtype) != (chunk.sizes, self.dtype):
                raise UserError(f"{archive.where}: not the {self.dtype} of shape {list(chunk.sizes)} that is announced")
            opened = self._opened[chunk.offsets] = ArchivedContent(archive, tensor)
        return opened


def read_dcp(path: Path, weights_only: bool) -> State:
    """The state in a DCP folder. Raises UserError for another folder, and for more than tensors and plain values."""
    folder = _Folder(path)
    state = State("dcp", path, close=folder.files.close)
    sort_leaves(state, _leaves(folder, weights_only), weights_only)
    return state


def _leaves(folder: _Folder, weights_only: bool) -> Iterator[tuple[Path_, Any]]:
    for key, entry in folder.entries.items():
        if not isinstance(entry, Record):
            raise UserError(f"{folder.path / METADATA}: {str(key)[:80]} is neither a tensor nor a value")
        told = folder.paths.get(key)
        path: Path_ = (str(key),)
        if isinstance(told, tuple | list) and told:
            path = tuple(part if isinstance(part, int) else str(part) for part in told)
        if entry.field("chunks") is not None:
            yield path, DcpContent(folder, str(key), entry)
        elif not weights_only or path == (FACTS,):
            yield path, folder.archive(str(key), None).root


# ---- the target -----------------------------------------------------------------------------------------------------


class _Items:
    """Writes archives one after the other into files of limited size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: disk.NewFile | None = None
        self._count = 0

    def add(self, structure: Any, size: int | None = None, parts: Iterator[memoryview] | None = None) -> _Item:
        """Write one archive, for a tensor of `size` bytes or for a plain value."""
        if self._file is not None and self._file.size >= FILE_LIMIT_BYTES:
            self.finish()
        if self._file is None:
            self._file = disk.NewFile(str(self._folder / f"__0_{self._count}.distcp"))
            self._count += 1
        begin = self._file.size
        writer = ArchiveWriter(self._file.write, structure)
        if size is not None and parts is not None:
            writer.add_parts("data/0", size, parts)
        writer.finish()
        return _Item(Path(self._file.path).name, begin, writer.size)

    def finish(self) -> None:
        if self._file is not None:
            self._file.fsync()
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_dcp(state: State, folder: Path, progress: Callable[[int], None] | None) -> None:
    """Fill an empty folder. All but the folder's own name is durable then."""
    leaves = list(leaves_of(str(state.path), nested(state)))
    chunks = {id(leaf): _chunks(leaf) for _, leaf in leaves if is_content(leaf)}
    ranges = (wanted for cut in chunks.values() for _, _, wanted in cut)
    items = _Items(folder)
    try:
        with stream(ranges, progress) as parts:
            placed = {key: [_write_chunk(items, chunk, parts) for chunk in cut] for key, cut in chunks.items()}
        plain = {_key(path): items.add(leaf) for path, leaf in leaves if not is_content(leaf)}
        items.finish()
    finally:
        items.close()
    _write_metadata(folder, leaves, placed, plain)
    disk.fsync_dir(str(folder))


def _key(path: Path_) -> str:
    return ".".join(map(str, path))


def _chunks(content: Content) -> list[tuple[Ints, Ints, Range]]:
    """(offsets, sizes, numbers) of the parts in which a tensor is written. A large tensor is cut by rows."""
    shape, width = tuple(content.shape), content.dtype.itemsize
    zeros = (0,) * len(shape)
    if not shape or prod(shape) * width <= CHUNK_LIMIT_BYTES:
        return [(zeros, shape, Range.whole(content))]
    row = prod(shape[1:])
    at_once = max(1, CHUNK_LIMIT_BYTES // (row * width))
    cut = [(begin, min(at_once, shape[0] - begin)) for begin in range(0, shape[0], at_once)]
    return [((b, *zeros[1:]), (rows, *shape[1:]), Range(content, b * row, rows * row)) for b, rows in cut]


def _write_chunk(
    items: _Items, chunk: tuple[Ints, Ints, Range], parts: Iterator[memoryview]
) -> tuple[Ints, Ints, _Item]:
    offsets, sizes, wanted = chunk
    announced = NewTensor(0, sizes, wanted.content.dtype)
    return offsets, sizes, items.add(announced, wanted.nbytes, take(parts, wanted.nbytes))


def _write_metadata(
    target: Path,
    leaves: list[tuple[Path_, Any]],
    placed: dict[int, list[tuple[Ints, Ints, _Item]]],
    plain: dict[str, _Item],
) -> None:
    from torch.distributed.checkpoint import filesystem, metadata

    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for path, leaf in leaves:
        key = _key(path)
        if key in plain:
            entries[key] = metadata.BytesStorageMetadata()
            storage[metadata.MetadataIndex(key)] = _info(filesystem, plain[key])
            continue
        chunks = placed[id(leaf)]
        entries[key] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=leaf.dtype),
            torch.Size(leaf.shape),
            [metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in chunks],
        )
        storage |= {metadata.MetadataIndex(key, offsets): _info(filesystem, item) for offsets, _, item in chunks}
    whole = metadata.Metadata(entries, {_key(path): path for path, _ in leaves}, storage)
    if hasattr(whole, "version"):
        whole.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    text = io.BytesIO()
    pickle.dump(whole, text, protocol=4)
    file = disk.NewFile(os.path.join(target, METADATA))
    try:
        file.write(memoryview(text.getvalue()))
        file.fsync()
    finally:
        file.close()


def _info(filesystem: Any, item: _Item) -> Any:
    return filesystem._StorageInfo(item.file, item.start, item.length)
