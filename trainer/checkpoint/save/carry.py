"""What a save takes over from an earlier checkpoint, file by file, because no rank holds it in memory.

That is the originals of frozen parameters, in the number format in which they were last trained or loaded. It is also
the optimizer state of parameters that were trained and are frozen now. Within an attempt a file is linked. The first
save of an attempt, and every few after, copy it and check every block, so that one bad block is not in all checkpoints.
A file of which only a part is still carried is written anew with that part.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import GROUPS, Group
from trainer.checkpoint.format.files import BLOCK_BYTES, FileReader
from trainer.checkpoint.format.manifest import BoxPiece, FlatPiece, Manifest, Source, StoredFile
from trainer.checkpoint.format.pieces import DTYPES, Piece
from trainer.checkpoint.format.threads import in_threads
from trainer.checkpoint.format.writing import FileLayout, write_file
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.share import WRITING_THREADS, WrittenFile, WrittenPiece

_CARRIED = re.compile(r"^carried-\d{8,}-")


@dataclass(frozen=True)
class Base:
    """The checkpoint that the next save takes things over from. `lineage`: its steps are steps of this run. `own`: it
    was committed by this attempt, so its files may be linked. `foreign`: it lies in another run's folder. `links`:
    saves since its files were last written afresh."""

    folder: Path
    manifest: Manifest
    hashes: Mapping[str, str]
    digest: str
    lineage: bool
    own: bool = False
    foreign: bool = False
    links: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, lineage: bool, foreign: bool) -> Base:
        folder = checkpoint.path.resolve()
        return cls(folder, checkpoint.manifest, checkpoint.hashes, checkpoint.digest, lineage, foreign=foreign)

    @property
    def stored_bytes(self) -> int:
        """What its folder holds."""
        return sum(file.size for file in self.manifest.files if file.source is None)

    def where(self, file: StoredFile) -> Source:
        """The checkpoint in which a file of this one lies."""
        if file.source is not None:
            return self.manifest.sources[file.source]
        return Source(path=str(self.folder), step=self.manifest.step, digest=self.digest)


@dataclass(frozen=True)
class Job:
    """One file to take over: linked, copied, or written anew from parts of it. `source` is the path of the file as it
    is; for a file written anew, `file.pieces` tell where each part lies in it."""

    how: str
    source: str
    source_size: int
    source_hashes: str
    file: WrittenFile

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Job:
        return cls(**{**content, "file": WrittenFile.from_json(content["file"])})


@dataclass(frozen=True)
class Carrying:
    """What rank 0 decided for one save: each rank's jobs, files that stay where they are, facts for the manifest."""

    jobs: list[list[Job]]
    references: list[tuple[Source, WrittenFile]]
    trained_steps: dict[str, int]
    step_counts: dict[str, int]


class _Part(NamedTuple):
    """A stored piece of a carried tensor, under the name that it has here."""

    old: str
    piece: WrittenPiece


def plan_carrying(
    base: Base,
    carried: Mapping[str, str],
    world_size: int = 1,
    link: bool = False,
    reference: bool = False,
    beside_new: bool = False,
) -> Carrying:
    """Decide how each carried tensor (name here -> name in `base`) gets into the next checkpoint.

    `link` allows links. With `reference`, frozen parameters that lie in another run's checkpoint stay there and are
    only named. `beside_new`: other frozen parameters are written from memory, under names that must not be taken.
    """
    manifest = base.manifest
    jobs, references, taken = [], [], set[str]()
    counts = _pieces_per_file(manifest)
    for index, parts in sorted(_by_file(manifest, carried).items()):
        stored = manifest.files[index]
        if reference and (base.foreign or stored.source is not None) and parts[0].piece.group == "frozen":
            file = _written(stored, stored.path, base.hashes[stored.name], parts)
            references.append((base.where(stored), file))
            continue
        whole = len(parts) == counts[index] and all(part.old == part.piece.key for part in parts)
        keep_name = whole and parts[0].piece.group == "frozen" and not beside_new
        path = _free_name(stored.path, parts[0].piece.group, manifest.step, whole, keep_name, taken)
        file = _written(stored, path, base.hashes[stored.name], parts)
        how = "write" if not whole else "link" if link and base.own else "copy"
        source = os.path.join(base.where(stored).path, stored.path)
        jobs.append(Job(how, source, stored.size, base.hashes[stored.name], file))
    lineage = {new: manifest.tensors[old] for new, old in carried.items() if manifest.tensors[old].group != "optim"}
    return Carrying(
        _shared_out(jobs, world_size),
        references,
        {name: (tensor.trained_step or 0) if base.lineage else 0 for name, tensor in lineage.items()},
        {n: manifest.step_counts[carried[n]] for n in lineage if base.lineage and carried[n] in manifest.step_counts},
    )


def _by_file(manifest: Manifest, carried: Mapping[str, str]) -> dict[int, list[_Part]]:
    """The carried pieces in each file."""
    found: dict[int, list[_Part]] = {}
    for new, old in carried.items():
        tensor = manifest.tensors[old]
        partition = manifest.partitions[tensor.partition]
        group: Group = "optim" if tensor.group == "optim" else "frozen"
        ranges = manifest.ranges(old)
        for piece, numel, (file, start, _) in zip(partition.pieces, partition.numels, ranges, strict=True):
            flat = piece if isinstance(piece, FlatPiece) else None
            box = piece if isinstance(piece, BoxPiece) else None
            written = WrittenPiece(
                key=new,
                group=group,
                dtype=tensor.dtype,
                shape=partition.shape,
                offsets=box.offsets if box else [],
                sizes=box.sizes if box else [],
                start=flat.start if flat else None,
                numel=numel,
                byte=start,
            )
            found.setdefault(file, []).append(_Part(old, written))
    return found


def _pieces_per_file(manifest: Manifest) -> Counter[int]:
    """How many pieces each file holds; partition by partition, as thousands of tensors share a few of them."""
    counts: Counter[int] = Counter()
    for partition, tensors in Counter(tensor.partition for tensor in manifest.tensors.values()).items():
        for piece in manifest.partitions[partition].pieces:
            counts[piece.file] += tensors
    return counts


def _free_name(path: str, group: Group, step: int, whole: bool, keep: bool, taken: set[str]) -> str:
    """The same name, or one that tells when the file was first carried; no file of the next checkpoint has it."""
    name = path.rpartition("/")[2].removesuffix(".safetensors")
    if not keep and not (whole and _CARRIED.match(name)):
        name = f"carried-{step:08d}-{_CARRIED.sub('', name)}"
    found, number = f"{group}/{name}.safetensors", 1
    while found in taken:
        found, number = f"{group}/{name}-{number}.safetensors", number + 1
    taken.add(found)
    return found


def _written(stored: StoredFile, path: str, hashes: str, parts: Sequence[_Part]) -> WrittenFile:
    return WrittenFile(path, stored.size, stored.data, hashes, False, [part.piece for part in parts])


def _shared_out(jobs: Sequence[Job], world_size: int) -> list[list[Job]]:
    """The largest first, each to the rank that has least to do."""
    shares: list[list[Job]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for job in sorted(jobs, key=lambda job: (-job.source_size, job.file.path)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        shares[rank].append(job)
        load[rank] += job.source_size
    return shares


# ---- on each rank ---------------------------------------------------------------------------------------------------


def carry_out(folder: str, jobs: Sequence[Job]) -> list[WrittenFile]:
    """Do this rank's jobs below `folder`, durable with their names. Raises BadCheckpoint when a block that is copied is
    bad, OSError when a file cannot be read or written."""
    written = list(in_threads(partial(_do, folder), jobs, WRITING_THREADS))
    for group in GROUPS:
        if any(job.file.path.startswith(group + "/") for job in jobs):
            disk.fsync_dir(os.path.join(folder, group))
    return written


def _do(folder: str, job: Job) -> WrittenFile:
    path = os.path.join(folder, job.file.path)
    if job.how == "link" and _linked(job.source, path):
        return job.file
    reader = FileReader(job.source, job.source_size, job.source_hashes)
    try:
        if job.how == "write":
            return _write_anew(reader, path, job.file)
        _copy(reader, path)
        return replace(job.file, written=True)
    finally:
        reader.close()


def _linked(source: str, path: str) -> bool:
    """Link when the filesystem can; if it cannot, the file is copied, and the save's bytes say so."""
    try:
        disk.link(source, path)
    except OSError:
        return False
    return True


def _copy(reader: FileReader, path: str) -> None:
    file = disk.NewFile(path)
    try:
        scratch = memoryview(bytearray(min(BLOCK_BYTES, reader.size)))
        for start in range(0, reader.size, BLOCK_BYTES):
            block = scratch[: min(BLOCK_BYTES, reader.size - start)]
            reader.read(start, block)
            file.write(block)
        file.fsync()
    finally:
        file.close()


def _write_anew(reader: FileReader, path: str, file: WrittenFile) -> WrittenFile:
    """A new file with some pieces of an old one, block by block."""
    pieces = [_without_content(piece) for piece in file.pieces]
    layout = FileLayout.of(pieces)
    old_byte = {piece.label: written.byte for piece, written in zip(pieces, file.pieces, strict=True)}
    by_label = {piece.label: written for piece, written in zip(pieces, file.pieces, strict=True)}
    hashes = write_file(path, layout, _blocks(reader, [(old_byte[p.label], p.nbytes) for p in layout.pieces]))
    written = [
        by_label[piece.label]._replace(byte=len(layout.header) + start)
        for piece, start in zip(layout.pieces, layout.starts, strict=True)
    ]
    return WrittenFile(file.path, layout.size, len(layout.header), hashes, True, written)


def _without_content(written: WrittenPiece) -> Piece:
    """The piece as a layout wants it: shape and number format, no memory."""
    sizes = tuple(written.sizes) if written.start is None else (written.numel,)
    tensor = torch.empty(sizes, dtype=DTYPES[written.dtype], device="meta")
    offsets, box = tuple(written.offsets), tuple(written.sizes)
    return Piece(written.key, written.group, tensor, tuple(written.shape), offsets, box, start=written.start)


def _blocks(reader: FileReader, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
    """The bytes of each (first byte, length), a block of memory at a time. A view holds until the next is asked for."""
    scratch = memoryview(bytearray(BLOCK_BYTES))
    for start, length in ranges:
        for done in range(0, length, BLOCK_BYTES):
            block = scratch[: min(BLOCK_BYTES, length - done)]
            reader.read(start + done, block)
            yield block
