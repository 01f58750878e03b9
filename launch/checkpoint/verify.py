"""`python -m launch checkpoint verify`: every block of every file, in parallel; every bad one is named."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from configs.errors import UserError
from launch.checkpoint.list import shelves
from launch.checkpoint.text import Progress, size_text
from trainer.checkpoint.errors import BadCheckpoint
from trainer.checkpoint.files import BLOCK_BYTES, HASH_DIGITS, blocks_in
from trainer.checkpoint.inside import check_file, read_small
from trainer.checkpoint.manifest import CHECKSUMS, MANIFEST, MANIFEST_LIMIT_BYTES, decode, decode_checksums
from trainer.convert.convert import open_checkpoint
from trainer.folder import checkpoint_name, committed_steps

_THREADS = 8
_BLOCKS_PER_TASK = 16


@dataclass
class _File:
    """One file's bytes, whatever its names: linked files are read once. `bad` are blocks."""

    path: Path
    size: int
    hashes: str
    bad: list[int] = field(default_factory=list)
    error: str | None = None


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
    total = sum(file.size for file in files.values())
    progress = Progress("verified", total)
    try:
        _read_all(list(files.values()), threads or min(_THREADS, os.cpu_count() or 1), progress)
    finally:
        progress.close()
    found = 0
    for checkpoint in checkpoints:
        faults = [*checkpoint.faults, *(line for path, file in checkpoint.files for line in _faults(path, file))]
        faults = faults or _header_faults(checkpoint.path)
        found += bool(faults)
        for line in faults:
            print(f"bad: {line}")
        if not faults:
            print(f"{checkpoint.path}: good, {size_text(checkpoint.size)} in {len(checkpoint.files)} files")
    print(f"{size_text(total)} read in {progress.seconds:.1f} s, {total / max(progress.seconds, 1e-9) / 1e9:.2f} GB/s")
    return 1 if found else 0


def _named(folder: Path) -> list[Path]:
    """The checkpoints that were named. Raises UserError when there is none."""
    if folder.name.startswith("step-") or (folder / MANIFEST).exists():
        return [folder]
    found = [shelf / checkpoint_name(step) for shelf in shelves(folder) for step in committed_steps(shelf)]
    if not found:
        raise UserError(f"{folder} is no checkpoint and holds no committed one")
    return found


def _open(path: Path, files: dict[tuple[int, int, str], _File]) -> _Checkpoint:
    """What must be read of a checkpoint; its faults so far. Without a good manifest nothing more can be said."""
    opened = _Checkpoint(path)
    try:
        manifest = decode(path / MANIFEST, read_small(path / MANIFEST, MANIFEST_LIMIT_BYTES))
        sums = path / CHECKSUMS
        hashes = decode_checksums(sums, read_small(sums, MANIFEST_LIMIT_BYTES), manifest, BLOCK_BYTES)
    except BadCheckpoint as error:
        opened.faults.append(str(error))
        return opened
    opened.size = manifest.size_bytes
    for stored in manifest.files:
        folder = path if stored.source is None else Path(manifest.sources[stored.source].path)
        place, wanted = folder / stored.path, hashes[stored.name]
        try:
            check_file(place, stored.size)
            status = os.stat(place, follow_symlinks=False)
        except BadCheckpoint as error:
            opened.faults.append(str(error))
            continue
        if len(wanted) != HASH_DIGITS * blocks_in(stored.size):
            opened.faults.append(f"{sums}: {len(wanted) // HASH_DIGITS} block hashes for {stored.path}")
            continue
        file = files.setdefault((status.st_dev, status.st_ino, wanted), _File(place, stored.size, wanted))
        opened.files.append((place, file))
    return opened


def _read_all(files: list[_File], threads: int, progress: Progress) -> None:
    """Check all files, each by as many threads as there are. Ctrl-C ends it within a block per thread."""
    stop = threading.Event()
    tasks = [
        (file, first)
        for file in sorted(files, key=lambda f: -f.size)
        for first in range(0, blocks_in(file.size), _BLOCKS_PER_TASK)
    ]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(_read, file, first, stop, progress) for file, first in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read(file: _File, first: int, stop: threading.Event, progress: Progress) -> None:
    """Check a few blocks. A file that cannot be read is remembered as such."""
    buffer = bytearray(BLOCK_BYTES)
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            for index in range(first, min(first + _BLOCKS_PER_TASK, blocks_in(file.size))):
                if stop.is_set():
                    return
                length = min(BLOCK_BYTES, file.size - index * BLOCK_BYTES)
                view = memoryview(buffer)[:length]
                done = 0
                while done < length and (got := os.preadv(descriptor, [view[done:]], index * BLOCK_BYTES + done)):
                    done += got
                if (
                    xxhash.xxh3_64_hexdigest(view[:done])
                    != file.hashes[index * HASH_DIGITS : (index + 1) * HASH_DIGITS]
                ):
                    file.bad.append(index)
                progress(length)
        finally:
            os.close(descriptor)
    except OSError as error:
        file.error = error.strerror or str(error)


def _faults(path: Path, file: _File) -> Iterator[str]:
    """Bad blocks that follow each other are one range."""
    if file.error:
        yield f"{path}: cannot be read: {file.error}"
    bad = sorted(file.bad)
    begin = 0
    for i, index in enumerate(bad):
        if i + 1 == len(bad) or bad[i + 1] != index + 1:
            low, high = bad[begin] * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, file.size)
            count = i - begin + 1
            blocks = "a block's checksum is" if count == 1 else f"the checksums of {count} blocks are"
            yield f"{path} (bytes {low} to {high}): {blocks} wrong"
            begin = i + 1


def _header_faults(path: Path) -> list[str]:
    """All bytes are those that were written; whether the headers say what the manifest says remains."""
    try:
        open_checkpoint(path).verify_headers()
    except BadCheckpoint as error:
        return [str(error)]
    return []
