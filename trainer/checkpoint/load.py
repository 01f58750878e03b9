"""Reading a checkpoint: any box of any tensor, from whatever layout it was written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch

from trainer.checkpoint.errors import BadCheckpoint
from trainer.checkpoint.files import BLOCK_BYTES, FileReader, bytes_of
from trainer.checkpoint.inside import check_files, read_small
from trainer.checkpoint.manifest import (
    CHECKSUMS,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Manifest,
    Place,
    StoredFile,
    decode,
    decode_checksums,
)
from trainer.checkpoint.pieces import Box, boxes_of_range, intersect


class Checkpoint:
    """An opened checkpoint. Opening checks the manifest, the checksum table, and that each file has its size."""

    def __init__(self, path: str | Path) -> None:
        """Raises BadCheckpoint when it is damaged, UserError when it may not be read."""
        self.path = Path(path)
        self.manifest: Manifest = decode(self.path / MANIFEST, read_small(self.path / MANIFEST, MANIFEST_LIMIT_BYTES))
        sums_path = self.path / CHECKSUMS
        hashes = decode_checksums(sums_path, read_small(sums_path, MANIFEST_LIMIT_BYTES), self.manifest, BLOCK_BYTES)
        check_files((self.file_path(file), file.size) for file in self.manifest.files)
        self.hashes = hashes
        self._readers = [FileReader(str(self.file_path(f)), f.size, hashes[f.name]) for f in self.manifest.files]

    def file_path(self, file: StoredFile) -> Path:
        """Where a file lies: here, or in the source that it names."""
        folder = self.path if file.source is None else Path(self.manifest.sources[file.source].path)
        return folder / file.path

    @property
    def step(self) -> int:
        return self.manifest.step

    def read_into(
        self, key: str, offsets: Sequence[int], sizes: Sequence[int], out: torch.Tensor, cast: bool = False
    ) -> None:
        """Fill `out` (row-major, prod(sizes) elements, any device) with the box (offsets, sizes) of tensor `key`, bit
        for bit. Another dtype is refused unless `cast`. Raises BadCheckpoint when a block that it touches is bad."""
        self._fill(key, self._wanted(key, Box(tuple(offsets), tuple(sizes))), out, cast)

    def read_range_into(self, key: str, start: int, out: torch.Tensor, cast: bool = False) -> None:
        """Fill `out` with the flat range of tensor `key` that begins at `start` of its row-major order."""
        flat = out.view(-1)
        for box in boxes_of_range(self.manifest.shape_of(key), start, out.numel()):
            self._fill(key, Box(box.offsets, box.sizes), flat[box.start : box.start + box.numel], cast)

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor, in host memory."""
        shape = self.manifest.shape_of(key)
        out = torch.empty(shape, dtype=self.manifest.dtype_of(key))
        self.read_into(key, (0,) * len(shape), shape, out)
        return out

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Check every block of every file, and that the headers say what the manifest says. Raises BadCheckpoint.

        `progress` is told the bytes of each file that was found good."""
        for index, reader in enumerate(self._readers):
            self._verify_header(index, reader)
            reader.verify()
            reader.close()
            if progress is not None:
                progress(reader.size)

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        for reader in self._readers:
            reader.close()

    def _verify_header(self, index: int, reader: FileReader) -> None:
        manifest = self.manifest
        wanted = {}
        for key, tensor in manifest.tensors.items():
            partition = manifest.partitions[tensor.partition]
            ranges = manifest.ranges(key)
            for piece, (file, start, end) in zip(partition.pieces, ranges, strict=True):
                if file == index:
                    wanted[piece.label(key)] = (tensor.dtype, tuple(piece.stored_shape), start, end)
        found = {name: (e.dtype, e.shape, e.start, e.end) for name, e in reader.header().items()}
        if found != wanted:
            odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise BadCheckpoint(reader.path, f"its header and manifest.json disagree about {odd[0]}")

    def _wanted(self, key: str, box: Box) -> Box:
        if self.manifest.name_of(key) not in self.manifest.tensors:
            raise KeyError(f"{self.path} holds no tensor {key!r}")
        shape = self.manifest.shape_of(key)
        if not len(box.offsets) == len(box.sizes) == len(shape) or any(
            o < 0 or n < 0 or o + n > s for o, n, s in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            raise ValueError(f"{key}: box {box.offsets}, {box.sizes} is not inside shape {shape}")
        return box

    def _fill(self, key: str, box: Box, out: torch.Tensor, cast: bool) -> None:
        dtype = self.manifest.dtype_of(key)
        if out.numel() != box.numel:
            raise ValueError(f"{key}: {out.numel()} elements to fill with a box of {box.numel}")
        if out.dtype != dtype and not cast:
            raise ValueError(f"{key}: stored as {dtype}, wanted as {out.dtype}")
        if box.numel == 0:
            return
        direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
        host = out.detach() if direct else torch.empty(box.sizes, dtype=dtype)
        content = bytes_of(host)
        for place in self.manifest.places(key):
            shared = intersect(place.box, box.offsets, box.sizes)
            if shared is not None:
                self._copy(place, shared, box, content, dtype.itemsize)
        if not direct:
            with torch.no_grad():
                out.copy_(host.view(out.shape))

    def _copy(
        self, place: Place, shared: tuple[tuple[int, ...], tuple[int, ...]], box: Box, content: memoryview, width: int
    ) -> None:
        """Copy the shared box out of the place into `content`, the row-major bytes of `box`."""
        offsets, sizes = shared
        reader = self._readers[place.file]
        source_at = [o - p for o, p in zip(offsets, place.box.offsets, strict=True)]
        target_at = [o - b for o, b in zip(offsets, box.offsets, strict=True)]
        first = _flat_index(source_at, place.box.sizes)
        if _is_run(sizes, place.box.sizes) and _is_run(sizes, box.sizes):
            begin = _flat_index(target_at, box.sizes) * width
            reader.read(place.byte + first * width, content[begin : begin + prod(sizes) * width])
            return
        # Rows of the source, some at a time, through a buffer; numpy then copies the part of each row that is wanted.
        row = prod(place.box.sizes[1:])
        rows_at_once = max(1, BLOCK_BYTES // (row * width))
        target = np.frombuffer(content, dtype=np.uint8).reshape(*box.sizes, width)
        inner_source = tuple(slice(a, a + n) for a, n in zip(source_at[1:], sizes[1:], strict=True))
        inner_target = tuple(slice(a, a + n) for a, n in zip(target_at[1:], sizes[1:], strict=True))
        for done in range(0, sizes[0], rows_at_once):
            rows = min(rows_at_once, sizes[0] - done)
            buffer = np.empty((rows, *place.box.sizes[1:], width), dtype=np.uint8)
            reader.read(place.byte + (source_at[0] + done) * row * width, buffer.reshape(-1).data)
            rows_of_target = slice(target_at[0] + done, target_at[0] + done + rows)
            target[(rows_of_target, *inner_target)] = buffer[(slice(None), *inner_source)]


def _flat_index(at: Sequence[int], sizes: Sequence[int]) -> int:
    index = 0
    for position, size in zip(at, sizes, strict=True):
        index = index * size + position
    return index


def _is_run(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a part of these sizes is contiguous in the row-major order of the whole: single indices, then at most
    one partial dimension, then full ones."""
    dims = len(whole)
    while dims and part[dims - 1] == whole[dims - 1]:
        dims -= 1
    return all(n == 1 for n in part[: max(0, dims - 1)])
