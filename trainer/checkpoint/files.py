"""The files of a checkpoint: ordinary safetensors, streamed out and read back block by block.

A file is cut into blocks of 4 MiB from its first byte, header included; each block has an xxh3-64. Writing hashes as it
goes; reading checks every block that it touches and takes only the bytes that were asked for.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from configs.errors import UserError
from trainer.checkpoint import disk
from trainer.checkpoint.errors import BadCheckpoint
from trainer.checkpoint.pieces import DTYPE_NAMES, DTYPES, Piece
from trainer.checkpoint.strict import parse

BLOCK_BYTES = 4 << 20
STEP_BYTES = 1 << 20  # read, then hashed, at a time: within a core's cache, and not so little that threads queue
WRITE_BYTES = 1 << 16  # written at a time; for longer aligned writes Linux may take larger pages, at 4 times the CPU
HASH_DIGITS = 16
HEADER_LIMIT_BYTES = 32 << 20  # of some 300,000 tensors in one file
DATA_ALIGNMENT = 64
# Long headers are filled up to the same length on most ranks, whatever digits their offsets have: then a piece begins
# at the same byte in every rank's file, which the manifest says once instead of a thousand times.
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


def blocks_in(size: int) -> int:
    return -(-size // BLOCK_BYTES)


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors header; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(path: str, raw: bytes, file_bytes: int) -> dict[str, Entry]:
    """The entries of a safetensors file from its first bytes (8 + header). Raises BadCheckpoint for anything odd.

    Names, dtypes, sizes, bounds, gaps and overlaps are checked; no allocation depends on a number that is read.
    """

    def bad(reason: str) -> BadCheckpoint:
        return BadCheckpoint(path, f"safetensors header: {reason}", (0, min(file_bytes, len(raw))))

    length = header_length(path, raw[:8], file_bytes)
    if len(raw) < 8 + length:
        raise bad("cut short")
    try:
        entries = parse(raw[8 : 8 + length])
    except ValueError as error:
        raise bad(f"not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise bad("not a JSON object")
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        try:
            found[name] = _entry(entry, 8 + length)
        except ValueError as error:
            raise bad(f"tensor {name!r}: {error}") from None
    position = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise bad(f"tensor {name!r} begins at byte {tensor.start}, not at {position}: a gap or an overlap")
        position = tensor.end
    if position != file_bytes:
        raise bad(f"tensors end at byte {position}, the file at {file_bytes}")
    return found


def header_length(path: str, first: bytes, file_bytes: int) -> int:
    """The header's length from a file's first 8 bytes, believed only when the file can hold it."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length < 2 or length > min(HEADER_LIMIT_BYTES, file_bytes - 8):
        raise BadCheckpoint(path, f"safetensors header: impossible length {length} in a file of {file_bytes} bytes")
    return length


def _entry(entry: Any, data_start: int) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 64 or not all(_is_size(n) for n in numbers):
            raise ValueError(f"not a list of sizes: {str(numbers)[:80]}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"shape {shape} of {dtype} does not fill bytes {offsets}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 62


@dataclass
class FileReader:
    """Reads blocks of one file, each checked. Any number of threads may."""

    path: str
    size: int
    hashes: str
    _fd: int = field(default=-1, repr=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if len(self.hashes) != HASH_DIGITS * self.blocks:
            raise BadCheckpoint(self.path, f"{len(self.hashes) // HASH_DIGITS} block hashes for {self.size} bytes")

    @property
    def blocks(self) -> int:
        return blocks_in(self.size)

    def block_range(self, index: int) -> tuple[int, int]:
        """The bytes [low, high) of the file that are block `index`."""
        return index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, self.size)

    def announce(self, first: int, last: int) -> None:
        """Let the system begin to fetch these blocks: a disk is fastest when it has much to do at once."""
        low, high = self.block_range(first)[0], self.block_range(last)[1]
        with suppress(OSError):  # not every filesystem takes hints; what is wrong with a file is said by reading it
            os.posix_fadvise(self._open(), low, high - low, os.POSIX_FADV_WILLNEED)

    def read_block(self, index: int, parts: Iterable[memoryview]) -> None:
        """Fill `parts`, together just as long as the block, with it. Raises BadCheckpoint when it is bad.

        Hashed step by step, while what was read is still in the cache of the core that hashes."""
        low, high = self.block_range(index)
        found, position = xxhash.xxh3_64(), low
        for part in parts:
            for begin in range(0, len(part), STEP_BYTES):
                step = part[begin : begin + STEP_BYTES]
                self._fill(position, step)
                found.update(step)
                position += len(step)
        if position != high:
            raise ValueError(f"{position - low} bytes to fill with a block of {high - low}")
        if found.hexdigest() != self.hashes[index * HASH_DIGITS : (index + 1) * HASH_DIGITS]:
            raise BadCheckpoint(self.path, "the block's checksum is wrong", (low, high))

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` (flat bytes) from the byte `start` on. Raises BadCheckpoint, naming the block, when one is bad."""
        end = start + len(out)
        if start < 0 or end > self.size:
            raise BadCheckpoint(self.path, f"read beyond the file's {self.size} bytes", (start, end))
        for index in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            low, high = self.block_range(index)
            block = memoryview(bytearray(high - low))
            self.read_block(index, [block])
            begin, stop = max(low, start), min(high, end)
            out[begin - start : stop - start] = block[begin - low : stop - low]

    def header(self) -> dict[str, Entry]:
        """The safetensors header, parsed strictly."""
        first = bytearray(min(8, self.size))
        self.read(0, memoryview(first))
        raw = bytearray(8 + header_length(self.path, bytes(first), self.size))
        self.read(0, memoryview(raw))
        return parse_header(self.path, bytes(raw), self.size)

    def _fill(self, start: int, out: memoryview) -> None:
        done = 0
        try:
            fd = self._open()
            while done < len(out):
                got = os.preadv(fd, [out[done:]], start + done)
                if got == 0:
                    raise BadCheckpoint(self.path, "the file ends too early", (start + done, start + len(out)))
                done += got
        except PermissionError:
            raise UserError(f"{self.path}: no permission to read this file of a checkpoint") from None
        except OSError as error:
            raise BadCheckpoint(self.path, f"cannot be read: {error.strerror}", (start, start + len(out))) from error

    def _open(self) -> int:
        if self._fd < 0:
            with self._opening:
                if self._fd < 0:
                    self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._fd

    def close(self) -> None:
        """Give the file back. Reading opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        self.close()


def host_blocks(tensors: Sequence[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of tensors in row-major order, at most a block of host memory at a time.

    Host tensors are given as they are; device tensors pass through one block. (A tensor that is not contiguous is made
    so first, one at a time.)
    """
    scratch: torch.Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if flat.device.type == "cpu":
            yield bytes_of(flat)
            continue
        if scratch is None:
            scratch = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        for part in flat.split(BLOCK_BYTES):
            held = scratch[: part.numel()]
            held.copy_(part)
            yield bytes_of(held)
