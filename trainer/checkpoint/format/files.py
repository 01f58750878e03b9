"""The files of a checkpoint: ordinary safetensors, written as a stream and read back block by block.

A file is cut into blocks of 4 MiB from its first byte, header included. Each block has an xxh3-64. Writing computes the
hashes on the way. Reading checks every block that it touches, and takes only the requested bytes.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash

from configs.errors import UserError
from trainer.checkpoint.format.boxes import WIDTHS
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.strict import parse

BLOCK_BYTES = 4 << 20
STEP_BYTES = 1 << 20  # read, then hashed, at a time: fits a core's cache, and is enough that threads do not queue
HASH_DIGITS = 16
HEADER_LIMIT_BYTES = 32 << 20  # for some 300,000 tensors in one file


def blocks_in(size: int) -> int:
    return -(-size // BLOCK_BYTES)


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors header. `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(path: str, raw: bytes, file_bytes: int) -> dict[str, Entry]:
    """The entries of a safetensors file from its first bytes (8 + header). Raises BadCheckpoint for any irregularity.

    Names, dtypes, sizes, bounds, gaps and overlaps are checked. No allocation depends on a number from the file.
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
    """The header's length from a file's first 8 bytes, accepted only if the file is long enough."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length < 2 or length > min(HEADER_LIMIT_BYTES, file_bytes - 8):
        raise BadCheckpoint(path, f"safetensors header: impossible length {length} in a file of {file_bytes} bytes")
    return length


def _entry(entry: Any, data_start: int) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 64 or not all(_is_size(n) for n in numbers):
            raise ValueError(f"not a list of sizes: {str(numbers)[:80]}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * WIDTHS[dtype]:
        raise ValueError(f"shape {shape} of {dtype} does not fill bytes {offsets}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 62


@dataclass
class FileReader:
    """Reads blocks of one file, and checks each. Any number of threads may read."""

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
        """The bytes [low, high) of the file that form block `index`."""
        return index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, self.size)

    def announce(self, first: int, last: int) -> None:
        """Let the system begin to fetch these blocks: a disk is fastest when it has much to do at once."""
        low, high = self.block_range(first)[0], self.block_range(last)[1]
        with suppress(OSError):  # some filesystems take no hints; reading reports real faults
            os.posix_fadvise(self._open(), low, high - low, os.POSIX_FADV_WILLNEED)

    def read_block(self, index: int, parts: Iterable[memoryview]) -> None:
        """Read a block into `parts`, which together are as long as the block. Raises BadCheckpoint when the block is
        bad.

        It is hashed step by step, while the bytes read are still in the cache of the hashing core."""
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
        """Fill `out` (flat bytes) from the byte `start` on. Raises BadCheckpoint, which names the bad block."""
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
        """The safetensors header, checked strictly."""
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
        """Close the file. Reading opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        self.close()
