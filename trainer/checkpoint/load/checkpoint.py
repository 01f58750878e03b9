"""Read a checkpoint: any box of any tensor, whatever layout it was written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint.format.boxes import Ints, Wanted, boxes_of_range
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.files import BLOCK_BYTES, FileReader
from trainer.checkpoint.format.inside import check_files, read_small
from trainer.checkpoint.format.manifest import (
    CHECKSUMS,
    MANIFEST_LIMIT_BYTES,
    Manifest,
    StoredFile,
    decode,
    decode_checksums,
    digest_in,
)
from trainer.life.entries import MANIFEST, name_fault

if TYPE_CHECKING:
    import torch


def read_manifest(folder: Path) -> tuple[Manifest, str, dict[str, str]]:
    """The manifest of a checkpoint, its digest, and the block hashes of each file. Raises BadCheckpoint when
    manifest.json or checksums.json is damaged, UserError when one may not be read."""
    text = read_small(folder / MANIFEST, MANIFEST_LIMIT_BYTES)
    manifest = decode(folder / MANIFEST, text)
    fault = name_fault(folder, manifest.step)
    if fault is not None:
        raise BadCheckpoint(folder, fault)
    table = folder / CHECKSUMS
    hashes = decode_checksums(table, read_small(table, MANIFEST_LIMIT_BYTES), manifest, BLOCK_BYTES)
    return manifest, digest_in(text), hashes


def file_path(folder: Path, manifest: Manifest, file: StoredFile) -> Path:
    """Where a file of the checkpoint `folder` is: in it, or in the source that the file names."""
    return (folder if file.source is None else Path(manifest.sources[file.source].path)) / file.path


class Checkpoint:
    """An opened checkpoint. Opening checks the manifest, the checksum table, and the size of each file."""

    def __init__(self, path: str | Path) -> None:
        """Raises BadCheckpoint when the checkpoint is damaged, UserError when it may not be read."""
        self.path = Path(path)
        self.manifest, self.digest, self.hashes = read_manifest(self.path)
        files = [(file_path(self.path, self.manifest, file), file) for file in self.manifest.files]
        check_files((path, file.size) for path, file in files)
        self._readers = [FileReader(str(path), file.size, self.hashes[file.name]) for path, file in files]

    @property
    def step(self) -> int:
        return self.manifest.step

    def read_all(self, wanted: Sequence[Wanted]) -> None:
        """Fill the tensors of all `wanted`, bit for bit, in the order of the files and in several threads.

        Every touched block is read once and checked. Raises BadCheckpoint when one is bad."""
        from trainer.checkpoint.load.read import read_spans, spans_for  # torch is imported only when a tensor is read

        for one in wanted:
            self._check(one)
        read_spans(self._readers, spans_for(self.manifest, wanted))

    def read_into(
        self, key: str, offsets: Sequence[int], sizes: Sequence[int], out: torch.Tensor, cast: bool = False
    ) -> None:
        """Fill one tensor; see `read_all`, which is faster for many."""
        self.read_all([Wanted(key, out, tuple(offsets), tuple(sizes), cast)])

    def read_range_into(self, key: str, start: int, out: torch.Tensor, cast: bool = False) -> None:
        """Fill `out` with the flat range of tensor `key` that begins at `start` of the tensor's row-major order."""
        flat = out.view(-1)
        self.read_all(
            [
                Wanted(key, flat[box.start : box.start + box.numel], box.offsets, box.sizes, cast)
                for box in boxes_of_range(self.manifest.shape_of(key), start, out.numel())
            ]
        )

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor, in host memory."""
        import torch

        from trainer.checkpoint.format.pieces import DTYPES

        shape = self.manifest.shape_of(key)
        out = torch.empty(shape, dtype=DTYPES[self.manifest.dtype_of(key)])
        self.read_into(key, (0,) * len(shape), shape, out)
        return out

    def verify(self, progress: Callable[[int], None] | None = None, threads: int | None = None) -> None:
        """Check every block of every file, and that headers and manifest agree. Raises BadCheckpoint.

        `progress` gets, in the calling thread, how many more bytes were found good."""
        from trainer.checkpoint.load.read import READING_THREADS, verify_files

        self.verify_headers()
        with closing(verify_files(self._readers, threads or READING_THREADS)) as checked:
            for found_good in checked:
                if progress is not None:
                    progress(found_good)
        self.close()

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        for reader in self._readers:
            reader.close()

    def verify_headers(self) -> None:
        manifest = self.manifest
        wanted: list[dict[str, tuple[str, Ints, int, int]]] = [{} for _ in manifest.files]
        for key, tensor in manifest.tensors.items():
            partition = manifest.partitions[tensor.partition]
            for piece, (index, start, end) in zip(partition.pieces, manifest.ranges(key), strict=True):
                wanted[index][piece.label(key)] = (tensor.dtype, tuple(piece.stored_shape), start, end)
        for file, reader, expected in zip(manifest.files, self._readers, wanted, strict=True):
            found = {name: (e.dtype, e.shape, e.start, e.end) for name, e in reader.header().items()}
            if file.source is not None:  # a source also holds other tensors
                found = {name: entry for name, entry in found.items() if name in expected}
            if found != expected:
                odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
                raise BadCheckpoint(reader.path, f"its header and manifest.json disagree about {odd[0]}")

    def _check(self, wanted: Wanted) -> None:
        from trainer.checkpoint.format.pieces import DTYPES

        key, offsets, sizes, out = wanted.key, wanted.offsets, wanted.sizes, wanted.out
        if self.manifest.name_of(key) not in self.manifest.tensors:
            raise KeyError(f"{self.path} holds no tensor {key!r}")
        shape, dtype = self.manifest.shape_of(key), DTYPES[self.manifest.dtype_of(key)]
        if not len(offsets) == len(sizes) == len(shape) or any(
            o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, sizes, shape, strict=True)
        ):
            raise ValueError(f"{key}: box {offsets}, {sizes} is not inside shape {shape}")
        if out.numel() != prod(sizes):
            raise ValueError(f"{key}: {out.numel()} elements to fill with a box of {prod(sizes)}")
        if out.dtype != dtype and not wanted.cast:
            raise ValueError(f"{key}: stored as {dtype}, wanted as {out.dtype}")
