"""`python -m launch checkpoint verify`: check every block of every file, in parallel, and name every bad one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from launch.checkpoint.list import shelves
from launch.checkpoint.text import Progress
from launch.look.text import size_text
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.files import BLOCK_BYTES, FileReader
from trainer.checkpoint.format.inside import check_file
from trainer.checkpoint.format.threads import in_threads
from trainer.checkpoint.load.checkpoint import file_path, read_manifest
from trainer.checkpoint.load.kinds import open_checkpoint
from trainer.host.processors import allowed
from trainer.host.terminal import say
from trainer.life.entries import MANIFEST, Kind, entry_at

_THREADS = 8
_BLOCKS_PER_TASK = 16


@dataclass
class _File:
    """The bytes of one file under all its names, so that linked files are read once. `bad`: faults by block."""

    reader: FileReader
    bad: dict[int, BadCheckpoint] = field(default_factory=dict)


@dataclass
class _Checkpoint:
    path: Path
    faults: list[str] = field(default_factory=list)
    files: list[tuple[Path, _File]] = field(default_factory=list)
    size: int = 0


def verify(folder: Path, threads: int | None) -> int:
    """Returns the exit code."""
    files: dict[tuple[int, int, str], _File] = {}
    checkpoints = [_open(path, files) for path in _named(folder)]
    total = sum(file.reader.size for file in files.values())
    progress = Progress("verified", total)
    try:
        _read_all(list(files.values()), threads or min(_THREADS, allowed()), progress)
    finally:
        progress.close()
    found = 0
    for checkpoint in checkpoints:
        faults = [*checkpoint.faults, *(line for path, file in checkpoint.files for line in _faults(path, file))]
        faults = faults or _header_faults(checkpoint.path)
        found += bool(faults)
        for line in faults:
            say(f"bad: {line}")
        if not faults:
            say(f"{checkpoint.path}: good, {size_text(checkpoint.size)} in {len(checkpoint.files)} files")
    say(f"{size_text(total)} read in {progress.seconds:.1f} s, {total / max(progress.seconds, 1e-9) / 1e9:.2f} GB/s")
    return 1 if found else 0


def _named(folder: Path) -> list[Path]:
    """The checkpoints that were named. Raises UserError when there are none."""
    if folder.name.startswith("step-") or (folder / MANIFEST).exists():
        return [folder]
    meant = (Kind.COMMITTED, Kind.UNUSABLE)
    found = [entry.path for inside in shelves(folder).values() for entry in inside if entry.kind in meant]
    if not found:
        raise UserError(f"{folder} is no checkpoint and holds no committed one")
    return found


def _open(path: Path, files: dict[tuple[int, int, str], _File]) -> _Checkpoint:
    """A checkpoint's files, and its faults so far. Without a good manifest its files are unknown."""
    opened, entry = _Checkpoint(path), entry_at(path)
    if entry is not None and entry.fault is not None:
        opened.faults.append(f"{path}: {entry.fault}")
        return opened
    try:
        manifest, _, hashes = read_manifest(path)
    except BadCheckpoint as error:
        opened.faults.append(str(error))
        return opened
    opened.size = manifest.size_bytes
    for stored in manifest.files:
        place, wanted = file_path(path, manifest, stored), hashes[stored.name]
        try:
            check_file(place, stored.size)
            status = os.stat(place, follow_symlinks=False)
            reader = FileReader(str(place), stored.size, wanted)
        except BadCheckpoint as error:
            opened.faults.append(str(error))
            continue
        file = files.setdefault((status.st_dev, status.st_ino, wanted), _File(reader))
        opened.files.append((place, file))
    return opened


def _read_all(files: list[_File], threads: int, progress: Progress) -> None:
    """Check all files, each with all threads. Ctrl-C ends this within a few blocks per thread."""
    tasks = [
        (file, first)
        for file in sorted(files, key=lambda f: -f.reader.size)
        for first in range(0, file.reader.blocks, _BLOCKS_PER_TASK)
    ]
    with closing(in_threads(_check, tasks, threads)) as counts:
        for count in counts:
            progress(count)
    for file in files:
        file.reader.close()


def _check(task: tuple[_File, int]) -> int:
    """Check a few blocks, and record the bad ones. Returns the number of bytes checked."""
    file, first = task
    buffer, count = memoryview(bytearray(BLOCK_BYTES)), 0
    for index in range(first, min(first + _BLOCKS_PER_TASK, file.reader.blocks)):
        low, high = file.reader.block_range(index)
        try:
            file.reader.read_block(index, [buffer[: high - low]])
        except BadCheckpoint as error:
            file.bad[index] = error
        count += high - low
    return count


def _faults(path: Path, file: _File) -> Iterator[str]:
    """The faults as lines. Neighbouring bad blocks with the same reason make one range."""
    bad = sorted(file.bad.items())
    begin = 0
    for i, (index, error) in enumerate(bad):
        if i + 1 < len(bad) and bad[i + 1][0] == index + 1 and bad[i + 1][1].reason == error.reason:
            continue
        low, high = file.reader.block_range(bad[begin][0])[0], file.reader.block_range(index)[1]
        count = i - begin + 1
        reason = error.reason if count == 1 else f"in each of {count} blocks: {error.reason}"
        yield f"{path} (bytes {low} to {high}): {reason}"
        begin = i + 1


def _header_faults(path: Path) -> list[str]:
    """Faults of the headers. The bytes are right already; this checks that headers and manifest agree."""
    try:
        open_checkpoint(path).verify_headers()
    except BadCheckpoint as error:
        return [str(error)]
    return []
