"""Make a bad or missing file of a checkpoint whole again, block by block, from other copies of the same bytes.

Other checkpoints of the run hold copies (those set aside too), and the checkpoints in `manifest.sources`. The
checkpoint's own checksums.json decides whether a block is right, so its origin does not matter. Only rank 0 does this,
for checkpoints of its own run.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import xxhash

from configs.errors import UserError
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import GROUPS
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.files import BLOCK_BYTES, HASH_DIGITS, blocks_in
from trainer.checkpoint.format.inside import check_file, read_small
from trainer.checkpoint.format.manifest import CHECKSUMS, MANIFEST_LIMIT_BYTES, Manifest, parse_checksums
from trainer.checkpoint.load.checkpoint import file_path, read_manifest
from trainer.life.entries import Kind, entries

_FILE = re.compile(r"(model|frozen|optim)/[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
_BAD_BLOCK = "a block's checksum is wrong"
UNFINISHED = re.compile(r"^\..*\.mending$")  # the temporary name of a file under repair


@dataclass(frozen=True)
class Expected:
    """What a file must be: its path, size and block hashes."""

    path: Path
    size: int
    hashes: str

    def hash_of(self, index: int) -> str:
        return self.hashes[index * HASH_DIGITS : (index + 1) * HASH_DIGITS]

    def length_of(self, index: int) -> int:
        return min(BLOCK_BYTES, self.size - index * BLOCK_BYTES)


@dataclass
class _File:
    """A file to take blocks from, opened at the first use. A file that cannot be read has no good block."""

    path: Path
    _fd: int | None = field(default=None, repr=False)

    def identity(self) -> tuple[int, int] | None:
        found = os.fstat(self._fd) if self._opened() and self._fd is not None else None
        return (found.st_dev, found.st_ino) if found else None

    def block(self, expected: Expected, index: int) -> bytes | None:
        """The block of this number, or None unless its hash is the expected one."""
        if not self._opened() or self._fd is None:
            return None
        try:
            content = os.pread(self._fd, expected.length_of(index), index * BLOCK_BYTES)
        except OSError:
            return None
        return content if xxhash.xxh3_64_hexdigest(content) == expected.hash_of(index) else None

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
    """Repair the files of the checkpoint `folder` that are missing, have a wrong size, or were `found_bad` when they
    were read. Returns their names, and reports each in one line.

    `root` is the folder of the run's checkpoints. Nothing outside it is changed. Raises BadCheckpoint when a file
    cannot be repaired, or when the manifest or the checksums are bad. Raises UserError when a good copy exists but
    cannot be written.
    """
    manifest, _, hashes = read_manifest(folder)
    mended = []
    for file in manifest.files:
        expected = Expected(file_path(folder, manifest, file), file.size, hashes[file.name])
        reason = _suspicion(expected, found_bad)
        if reason and _mend(expected, reason, _folders(folder, root, manifest), root, say):
            mended.append(file.name)
    return mended


def _suspicion(expected: Expected, found_bad: Collection[Path]) -> str | None:
    """Why a file must be checked, or None."""
    try:
        check_file(expected.path, expected.size)
    except BadCheckpoint as error:
        return error.reason
    return _BAD_BLOCK if _real(expected.path) in {_real(path) for path in found_bad} else None


def _real(path: Path) -> Path:
    """The path with links in its folder resolved, but not a link at the file's own name."""
    return Path(os.path.realpath(path.parent)) / path.name


def _folders(folder: Path, root: Path, manifest: Manifest) -> list[Path]:
    """Checkpoints that may hold copies: those of the run, newest first, then the sources."""
    own = [entry.path for entry in entries(root) if entry.kind in (Kind.COMMITTED, Kind.ASIDE)]
    found = sorted(own, reverse=True) + [Path(source.path) for source in manifest.sources]
    return [other for other in found if other != folder]


def _mend(expected: Expected, reason: str, folders: Sequence[Path], root: Path, say: Callable[[str], None]) -> bool:
    """Write the file anew from its good blocks and those of copies. False when all its blocks turn out to be good."""
    own = _File(expected.path)
    try:
        bad = [index for index in range(blocks_in(expected.size)) if own.block(expected, index) is None]
        if not bad and reason == _BAD_BLOCK:
            return False
        taken = _find(expected, bad, own, folders)
        if _real(root) not in _real(expected.path).parents:  # behind a link, or in a source
            raise BadCheckpoint(expected.path, f"{reason}; the folder is not this run's, so it is left as it is")
        _rewrite(expected, [taken.get(index, own) for index in range(blocks_in(expected.size))])
    finally:
        own.close()
    sources = sorted({str(_of(file.path)) for file in taken.values()})
    say(
        f"{expected.path.relative_to(root)} was bad ({reason}) and is whole again: "
        + (
            f"{len(bad)} of {blocks_in(expected.size)} blocks from {', '.join(sources)}"
            if bad
            else "all its blocks were good"
        )
    )
    return True


def _of(path: Path) -> str:
    return path.parent.parent.name


def _find(expected: Expected, bad: Sequence[int], own: _File, folders: Sequence[Path]) -> dict[int, _File]:
    """Number of a bad block -> a file that has the block good. Raises BadCheckpoint when no file has it."""
    found: dict[int, _File] = {}
    for path in _copies(expected, bad, folders):
        other = _File(path)
        if other.identity() is None or other.identity() == own.identity():
            continue  # another name of the same bytes is no copy
        for index in bad:
            if index not in found and other.block(expected, index) is not None:
                found[index] = other
        other.close()
        if len(found) == len(bad):
            return found
    missing = next((index for index in bad if index not in found), None)
    if missing is not None:
        low = missing * BLOCK_BYTES
        raise BadCheckpoint(
            expected.path, "the block is bad, and no other copy of it is good", (low, low + expected.length_of(missing))
        )
    return found


def _copies(expected: Expected, bad: Sequence[int], folders: Sequence[Path]) -> Iterator[Path]:
    """Files that may hold a bad block: by the checksums of their folder, or by size when these cannot be read."""
    for folder in folders:
        try:
            table = folder / CHECKSUMS
            known = parse_checksums(table, read_small(table, MANIFEST_LIMIT_BYTES)).xxh3_64
        except (BadCheckpoint, UserError):
            # Look only into a checkpoint's own folders: a link may lead to a folder with a whole disk below it.
            places = (folder / group for group in GROUPS)  # pathlib's glob would raise for an unreadable one
            files = (place / name for place in places for name in glob("*.safetensors", root_dir=place))
            yield from sorted(path for path in files if _size_of(path) == expected.size)
            continue
        for name, hashes in known.items():
            same = len(hashes) == len(expected.hashes) and any(
                hashes[i * HASH_DIGITS : (i + 1) * HASH_DIGITS] == expected.hash_of(i) for i in bad
            )
            if same and _FILE.fullmatch(name):
                yield folder / name


def _size_of(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return -1


def _rewrite(expected: Expected, blocks: Sequence[_File]) -> None:
    """Write the file under a temporary name, each block from a file that has it good. Then rename it over the old."""
    path = expected.path
    temporary = str(path.with_name(f".{path.name}.mending"))
    try:
        if not path.parent.exists():
            disk.mkdir(str(path.parent))
            disk.fsync_dir(str(path.parent.parent))
        with suppress(FileNotFoundError):
            os.stat(temporary)
            disk.unlink(temporary)
        try:
            _write(temporary, expected, blocks)
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


def _write(temporary: str, expected: Expected, blocks: Sequence[_File]) -> None:
    file = disk.NewFile(temporary)
    try:
        for index, source in enumerate(blocks):
            content = source.block(expected, index)
            if content is None:
                raise BadCheckpoint(source.path, "the block changed while it was copied")
            file.write(memoryview(content))
        file.fsync()
    finally:
        file.close()
        for source in blocks:
            source.close()
