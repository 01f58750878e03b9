"""The files of `torch.save`: zip archives of one pickle and one record of raw bytes per storage, read and written in
parts. DCP's files are such archives one after the other.

Reading runs nothing that the pickle names (`unpickle.py`). Every number is checked before it is used. A record's CRC-32
is checked when all of the record is read, which PyTorch's own reader does not do.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from launch.checkpoint.convert.unpickle import PICKLE_LIMIT_BYTES, STORAGE_NAMES, ArchivedTensor, Names, unpickle
from trainer.checkpoint.format.boxes import Ints
from trainer.checkpoint.format.files import STEP_BYTES
from trainer.checkpoint.format.pieces import DTYPE_NAMES
from trainer.checkpoint.format.writing import WRITE_BYTES, bytes_of

_OPEN_FILES = 64
_SPAN_LIMIT_BYTES = 1 << 30
_RECORD_ALIGNMENT = 64
_STORED_UTF8_DESCRIPTOR = 0x0808  # flag bits: the CRC follows the data; the name is UTF-8
_LIMIT_32 = 0xFFFFFFFF


class Files:
    """Reads at given positions of the files below a folder, with a few of them open at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def path(self, name: str) -> Path:
        return self.root / name if name else self.root

    def size(self, name: str) -> int:
        return self._opened(name)[1]

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from byte `start` on. Raises UserError when the file cannot be read or is too short."""
        descriptor, size = self._opened(name)
        done = 0
        while done < len(out):
            try:
                got = os.preadv(descriptor, [out[done:]], start + done)
            except OSError as error:
                raise UserError(f"{self.path(name)}: cannot be read at byte {start + done}: {error.strerror}") from None
            if got == 0:
                end = start + len(out)
                raise UserError(f"{self.path(name)}: cut short: bytes {start} to {end} are wanted, it has {size}")
            done += got

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _opened(self, name: str) -> tuple[int, int]:
        found = self._open.get(name)
        if found is None:
            path = self.path(name)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{path}: cannot be opened: {error.strerror}") from None
            found = self._open[name] = (descriptor, os.fstat(descriptor).st_size)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(name)
        return found


class _View(io.RawIOBase):
    """A part of a file that behaves as a whole file, for zipfile."""

    def __init__(self, files: Files, name: str, start: int, length: int) -> None:
        super().__init__()
        self._files, self._name, self._start, self._length, self._at = files, name, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise ValueError("before the beginning")
        self._at = at
        return at

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        view = view[: max(0, min(len(view), self._length - self._at))]
        self._files.read(self._name, self._start + self._at, view)
        self._at += len(view)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        out = bytearray(left if size < 0 else min(size, left))
        self.readinto(out)
        return bytes(out)


@dataclass(frozen=True)
class Record:
    """Raw bytes in a file. `crc` 0: the archive has none."""

    start: int
    size: int
    crc: int


class Archive:
    """One archive in a part of a file. Opening it reads its directory and its pickle."""

    def __init__(
        self, files: Files, name: str, start: int, length: int, label: str = "", more: Names | None = None
    ) -> None:
        self.files, self.name = files, name
        self.where = f"{files.path(name)}{f' ({label})' if label else ''}"
        if start < 0 or start + length > files.size(name):
            raise UserError(
                f"{self.where}: cut short: bytes {start} to {start + length} are wanted, it has {files.size(name)}"
            )
        try:
            with zipfile.ZipFile(_View(files, name, start, length)) as opened:
                entries = opened.infolist()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - zipfile raises errors of many kinds on damaged numbers
            raise UserError(f"{self.where}: not an archive of torch.save, or cut short: {error}") from None
        self._entries = {entry.filename: entry for entry in entries}
        self.start, self._end = start, start + length
        pickles = [name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(self._entries) != len(entries):
            raise UserError(f"{self.where}: not an archive of torch.save: it holds {len(pickles)} of data.pkl")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = self._small("byteorder") if self._prefix + "byteorder" in self._entries else b"little"
        if order != b"little":
            raise UserError(f"{self.where}: written on a machine of another byte order")
        self.root = unpickle(f"{self.where}, data.pkl", self._small("data.pkl"), more)

    def record(self, key: str) -> Record:
        """Where the bytes of a record are."""
        entry = self._entries.get(self._prefix + key)
        if entry is None:
            raise UserError(f"{self.where}: the record {key} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise UserError(f"{self.where}: the record {key} is compressed or encrypted; save it again with torch.save")
        header = bytearray(30)
        local = self.start + entry.header_offset
        if entry.header_offset < 0 or local + len(header) > self._end:
            raise UserError(f"{self.where}: the record {key} lies outside the archive")
        self.files.read(self.name, local, memoryview(header))
        start = local + 30 + sum(struct.unpack_from("<HH", header, 26))
        if header[:4] != b"PK\x03\x04" or start + entry.file_size > self._end:
            raise UserError(f"{self.where}: the record {key} lies outside the archive")
        return Record(start, entry.file_size, entry.CRC)

    def _small(self, key: str) -> bytes:
        record = self.record(key)
        if record.size > PICKLE_LIMIT_BYTES:
            raise UserError(f"{self.where}: {key} is too large to be true")
        content = bytearray(record.size)
        self.files.read(self.name, record.start, memoryview(content))
        if record.crc and zlib.crc32(content) != record.crc:
            raise UserError(f"{self.where}: {key} was damaged: its checksum is wrong")
        return bytes(content)


@dataclass
class ArchivedContent:
    """The numbers of one tensor in an archive."""

    archive: Archive
    tensor: ArchivedTensor
    _record: Record | None = field(default=None, repr=False)
    _crc: int = field(default=0, repr=False)
    _crc_end: int = field(default=0, repr=False)
    _whole: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.tensor.dtype not in DTYPE_NAMES:
            raise UserError(f"{self.archive.where}: a tensor of {self.tensor.dtype}, which safetensors has no name for")

    @property
    def shape(self) -> Ints:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def place(self) -> Any:
        """Equal for tensors that are one and the same."""
        return (self.archive.name, self.archive.start, self.tensor)

    def read_range_into(self, start: int, out: torch.Tensor) -> None:
        self.read_bytes(start * self.dtype.itemsize, bytes_of(out))

    def read_bytes(self, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's row-major bytes from `start` on."""
        tensor, width = self.tensor, self.dtype.itemsize
        if _is_contiguous(tensor.shape, tensor.stride):
            self._read_record(tensor.offset * width + start, out)
            return
        if self._whole is None:
            self._whole = self._gather()
        out[:] = bytes_of(self._whole)[start : start + len(out)]
        if start + len(out) == tensor.numel * width:
            self._whole = None

    def item(self) -> int | float | bool:
        """The value of a tensor with one element."""
        out = torch.empty(1, dtype=self.dtype)
        self.read_range_into(0, out)
        return out.item()

    def _read_record(self, start: int, out: memoryview) -> None:
        if self._record is None:
            self._record = self.archive.record(f"data/{self.tensor.storage.key}")
            if self._record.size != self.tensor.storage.nbytes:
                raise UserError(
                    f"{self.archive.where}: a storage of {self._record.size} bytes, "
                    f"{self.tensor.storage.nbytes} are announced"
                )
        record = self._record
        if start + len(out) > record.size:
            raise UserError(f"{self.archive.where}: a tensor leaves its storage of {record.size} bytes")
        follows = record.crc and start == self._crc_end
        for begin in range(0, len(out), STEP_BYTES):
            step = out[begin : begin + STEP_BYTES]
            self.archive.files.read(self.archive.name, record.start + start + begin, step)
            if follows:
                self._crc, self._crc_end = zlib.crc32(step, self._crc), self._crc_end + len(step)
        if follows and self._crc_end == record.size and self._crc != record.crc:
            begin, end = record.start, record.start + record.size
            raise UserError(f"{self.archive.where}: bytes {begin} to {end} were damaged: their checksum is wrong")

    def _gather(self) -> torch.Tensor:
        """A strided view made contiguous. Takes memory for the range it spans, and for the result."""
        tensor, width = self.tensor, self.dtype.itemsize
        if tensor.span * width > max(_SPAN_LIMIT_BYTES, tensor.numel * width):
            raise UserError(
                f"{self.archive.where}: a tensor of shape {list(tensor.shape)} is a view into {tensor.span * width} "
                "bytes; save a contiguous copy of it"
            )
        held = torch.empty(tensor.span, dtype=self.dtype)
        if tensor.span:
            self._read_record(tensor.offset * width, bytes_of(held))
        return held.as_strided(tensor.shape, tensor.stride).contiguous()


def _is_contiguous(shape: Ints, stride: Ints) -> bool:
    if math.prod(shape) == 0:
        return True
    step = 1
    for size, jump in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and jump != step:
            return False
        step *= size
    return True


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `key` is its storage. Loading ties two tensors of the same key."""

    key: int
    shape: Ints
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _NewStorage:
    def __init__(self, tensor: NewTensor) -> None:
        name = STORAGE_NAMES.get(tensor.dtype)
        self.is_typed = name is not None
        self.kind = getattr(torch, name) if name else torch.UntypedStorage
        self.count = math.prod(tensor.shape) * (1 if name else tensor.dtype.itemsize)
        self.key = str(tensor.key)


class _Pickler(pickle.Pickler):
    """Writes a structure with `NewTensor`s as torch.save would write it with tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, _NewStorage):
            return ("storage", thing.kind, thing.key, "cpu", thing.count)
        return None

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, NewTensor):
            return NotImplemented
        storage = _NewStorage(thing)
        stride = tuple(math.prod(thing.shape[dim + 1 :]) for dim in range(len(thing.shape)))
        common: tuple[Any, ...] = (storage, 0, thing.shape, stride, False, OrderedDict())
        if storage.is_typed:
            return torch._utils._rebuild_tensor_v2, common
        return torch._utils._rebuild_tensor_v3, (*common, thing.dtype)


def pickled(structure: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(structure)
    return file.getvalue()


class ArchiveWriter:
    """Writes one archive from front to back. `write` appends bytes to a file. Offsets count from its start."""

    def __init__(self, write: Callable[[memoryview], None], structure: Any) -> None:
        self._write_out = write
        self._directory: list[bytes] = []
        self.size = 0
        self.add("data.pkl", pickled(structure))
        self.add("byteorder", b"little")

    def add(self, name: str, content: bytes) -> None:
        self.add_parts(name, len(content), iter([memoryview(content)] if content else []))

    def add_parts(self, name: str, size: int, parts: Iterator[memoryview]) -> None:
        """Add a record whose bytes come in parts. It begins at a multiple of 64."""
        title, start, crc, left = f"archive/{name}".encode(), self.size, 0, size
        padding = -(self.size + 30 + len(title) + 4) % _RECORD_ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._write(_local_header(title, extra))
        for part in parts:
            left -= len(part)
            for begin in range(0, len(part), WRITE_BYTES):
                step = part[begin : begin + WRITE_BYTES]
                crc = zlib.crc32(step, crc)
                self._write(step)
        if left:
            raise ValueError(f"{name}: {size - left} bytes given, {size} announced")
        large = size >= _LIMIT_32
        self._write(struct.pack("<4sLQQ" if large else "<4sLLL", b"PK\x07\x08", crc, size, size))
        self._directory.append(_directory_entry(title, crc, size, start))

    def finish(self) -> None:
        self.add("version", b"3\n")
        begin, count = self.size, len(self._directory)
        for entry in self._directory:
            self._write(entry)
        length, end = self.size - begin, self.size
        if begin >= _LIMIT_32 or count >= 0xFFFF:
            self._write(struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, begin))
            self._write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        tail = (min(count, 0xFFFF), min(length, _LIMIT_32), min(begin, _LIMIT_32))
        self._write(struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, tail[0], tail[0], tail[1], tail[2], 0))

    def _write(self, content: bytes | memoryview) -> None:
        self._write_out(memoryview(content))
        self.size += len(content)


def _local_header(title: bytes, extra: bytes) -> bytes:
    flags = _STORED_UTF8_DESCRIPTOR
    return (
        struct.pack("<4sHHHHHLLLHH", b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(title), len(extra)) + title + extra
    )


def _directory_entry(title: bytes, crc: int, size: int, start: int) -> bytes:
    wide = [n for n in (size, size, start) if n >= _LIMIT_32]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    flags, short = _STORED_UTF8_DESCRIPTOR, min(size, _LIMIT_32)
    numbers = (crc, short, short, len(title), len(extra), 0, 0, 0, 0, min(start, _LIMIT_32))
    return (
        struct.pack("<4sHHHHHHLLLHHHHHLL", b"PK\x01\x02", 0, 45 if wide else 0, flags, 0, 0, 0, *numbers)
        + title
        + extra
    )
