"""A bad or missing file of a checkpoint made whole again, block by block, from other copies of the same bytes.

Copies are what other checkpoints of the run (those set aside too) and the checkpoints in `manifest.sources` hold.
What a block must be is said by the checkpoint's own checksums.json; where it is taken from does not matter then. Rank 0
alone does this, for checkpoints of its own run.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from pydantic import ValidationError

from configs.errors import UserError
from trainer.checkpoint import disk
from trainer.checkpoint.errors import BadCheckpoint
from trainer.checkpoint.files import BLOCK_BYTES, HASH_DIGITS, blocks_in
from trainer.checkpoint.inside import check_file, read_small
from trainer.checkpoint.manifest import (
    CHECKSUMS,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Checksums,
    Manifest,
    StoredFile,
    decode,
    decode_checksums,
)

_OF_A_RUN = re.compile(r"^step-\d{8,}(\.bad-\d+)?$")
_FILE = re.compile(r"^(model|frozen|optim)/[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$")
_BAD_BLOCK = "a block's checksum is wrong"
UNFINISHED = re.compile(r"^\..*\.mending$")  # the temporary name of a file that is being made whole


@dataclass(frozen=True)
class Wanted:
    """What a file must be."""

    path: Path
    size: int
    hashes: str

    def hash_of(self, index: int) -> str:
        return self.hashes[index * HASH_DIGITS : (index + 1) * HASH_DIGITS]

    def length_of(self, index: int) -> int:
        return min(BLOCK_BYTES, self.size - index * BLOCK_BYTES)


@dataclass
class _File:
    """A file to take blocks from, opened when first asked. What cannot be read has no good block."""

    path: Path
    _fd: int | None = field(default=None, repr=False)

    def identity(self) -> tuple[int, int] | None:
        found = os.fstat(self._fd) if self._opened() and self._fd is not None else None
        return (found.st_dev, found.st_ino) if found else None

    def block(self, wanted: Wanted, index: int) -> bytes | None:
        """The block of this number, or None unless it is what is wanted."""
        if not self._opened() or self._fd is None:
            return None
        try:
            content = os.pread(self._fd, wanted.length_of(index), index * BLOCK_BYTES)
        except OSError:
            return None
        return content if xxhash.xxh3_64_hexdigest(content) == wanted.hash_of(index) else None

    def _opened(self) -> bool:
        if self._fd is None:
            self._fd = -1
            with suppress(OSError):
                if stat.S_ISREG(os.stat(self.path, follow_symlinks=False).st_mode):
                    self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._fd >= 0

    def close(self) -> None:
        if self._fd is not None and self._fd >= 0:
            os.close(self._fd)
        self._fd = None


def recover(folder: Path, root: Path, found_bad: Collection[Path], say: Callable[[str], None]) -> list[str]:
    """Make the files of the checkpoint `folder` whole that are missing, have a wrong size, or were `found_bad` when
    they were read; returns their names, each said in one line.

    `root` is the folder of the run's checkpoints. Nothing outside it is changed. Raises BadCheckpoint when a file
    cannot be made whole, or when the manifest or the checksums are themselves bad, and UserError when a good copy is
    there but cannot be written.
    """
    manifest = decode(folder / MANIFEST, read_small(folder / MANIFEST, MANIFEST_LIMIT_BYTES))
    table = folder / CHECKSUMS
    hashes = decode_checksums(table, read_small(table, MANIFEST_LIMIT_BYTES), manifest, BLOCK_BYTES)
    mended = []
    for file in manifest.files:
        wanted = Wanted(_place(folder, manifest, file), file.size, hashes[file.name])
        reason = _suspicion(wanted, found_bad)
        if reason and _mend(wanted, reason, _folders(folder, root, manifest), root, say):
            mended.append(file.name)
    return mended


def _place(folder: Path, manifest: Manifest, file: StoredFile) -> Path:
    return (folder if file.source is None else Path(manifest.sources[file.source].path)) / file.path


def _suspicion(wanted: Wanted, found_bad: Collection[Path]) -> str | None:
    """Why a file should be looked at, or None."""
    try:
        check_file(wanted.path, wanted.size)
    except BadCheckpoint as error:
        return error.reason
    return _BAD_BLOCK if _real(wanted.path) in {_real(path) for path in found_bad} else None


def _real(path: Path) -> Path:
    """The file by whatever way to its folder; what the name itself is does not matter."""
    return Path(os.path.realpath(path.parent)) / path.name


def _folders(folder: Path, root: Path, manifest: Manifest) -> list[Path]:
    """Checkpoints that may hold copies: those of the run, newest first, then the sources."""
    own = sorted((entry.name for entry in os.scandir(root) if _OF_A_RUN.match(entry.name)), reverse=True)
    found = [root / name for name in own] + [Path(source.path) for source in manifest.sources]
    return [other for other in found if other != folder]


def _mend(wanted: Wanted, reason: str, folders: Sequence[Path], root: Path, say: Callable[[str], None]) -> bool:
    """Write the file anew from its good blocks and those of copies. False when all of it turns out to be good."""
    own = _File(wanted.path)
    try:
        bad = [index for index in range(blocks_in(wanted.size)) if own.block(wanted, index) is None]
        if not bad and reason == _BAD_BLOCK:
            return False
        taken = _find(wanted, bad, own, folders)
        if root not in wanted.path.parents:
            raise BadCheckpoint(wanted.path, f"{reason}; the folder is not this run's, so it is left as it is")
        _rewrite(wanted, [taken.get(index, own) for index in range(blocks_in(wanted.size))])
    finally:
        own.close()
    sources = sorted({str(_of(file.path)) for file in taken.values()})
    say(
        f"{wanted.path.relative_to(root)} was bad ({reason}) and is whole again: "
        + (
            f"{len(bad)} of {blocks_in(wanted.size)} blocks from {', '.join(sources)}"
            if bad
            else "all its blocks were good"
        )
    )
    return True


def _of(path: Path) -> str:
    return path.parent.parent.name


def _find(wanted: Wanted, bad: Sequence[int], own: _File, folders: Sequence[Path]) -> dict[int, _File]:
    """For each bad block a file that has it good. Raises BadCheckpoint when one has none."""
    found: dict[int, _File] = {}
    for path in _copies(wanted, bad, folders):
        other = _File(path)
        if other.identity() is None or other.identity() == own.identity():
            continue  # another name of the same bytes is no copy
        for index in bad:
            if index not in found and other.block(wanted, index) is not None:
                found[index] = other
        other.close()
        if len(found) == len(bad):
            return found
    missing = next((index for index in bad if index not in found), None)
    if missing is not None:
        low = missing * BLOCK_BYTES
        raise BadCheckpoint(
            wanted.path, "the block is bad, and no other copy of it is good", (low, low + wanted.length_of(missing))
        )
    return found


def _copies(wanted: Wanted, bad: Sequence[int], folders: Sequence[Path]) -> Iterator[Path]:
    """Files that may hold a bad block: by the checksums of their folder, or, when these cannot be read, by size."""
    for folder in folders:
        try:
            table = read_small(folder / CHECKSUMS, MANIFEST_LIMIT_BYTES)
            known = Checksums.model_validate_json(table).xxh3_64
        except (BadCheckpoint, UserError, ValidationError):
            yield from sorted(p for p in folder.glob("*/*.safetensors") if _size_of(p) == wanted.size)
            continue
        for name, hashes in known.items():
            same = len(hashes) == len(wanted.hashes) and any(
                hashes[i * HASH_DIGITS : (i + 1) * HASH_DIGITS] == wanted.hash_of(i) for i in bad
            )
            if same and _FILE.match(name):
                yield folder / name


def _size_of(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return -1


def _rewrite(wanted: Wanted, blocks: Sequence[_File]) -> None:
    """The file under a temporary name, each block from where it is good, then renamed over what is there."""
    path = wanted.path
    temporary = str(path.with_name(f".{path.name}.mending"))
    try:
        if not path.parent.exists():
            disk.mkdir(str(path.parent))
            disk.fsync_dir(str(path.parent.parent))
        with suppress(FileNotFoundError):
            os.stat(temporary)
            disk.unlink(temporary)
        try:
            _write(temporary, wanted, blocks)
            disk.rename(temporary, str(path))
        except BaseException:
            with suppress(OSError):
                disk.unlink(temporary)
            raise
        disk.fsync_dir(str(path.parent))
    except OSError as error:
        raise UserError(
            f"{path} is bad; its blocks are there in other files, but it cannot be written: {error.strerror}\n"
            "make that possible (room, permission) and start again"
        ) from error


def _write(temporary: str, wanted: Wanted, blocks: Sequence[_File]) -> None:
    file = disk.NewFile(temporary)
    try:
        for index, source in enumerate(blocks):
            content = source.block(wanted, index)
            if content is None:
                raise BadCheckpoint(source.path, "the block changed while it was copied")
            file.write(memoryview(content))
        file.fsync()
    finally:
        file.close()
        for source in blocks:
            source.close()
