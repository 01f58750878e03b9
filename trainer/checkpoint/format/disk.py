"""Every operation by which a save changes the disk, so that tests can count, kill and record each one.

One function is one system call. Only `fsync_dir` is three (open, fsync, close).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """An operation about to happen. `name`: mkdir, create, write, fsync, rename, link, unlink, rmdir or fsync_dir."""

    name: str
    path: str
    target: str = ""
    offset: int = 0
    data: memoryview | None = None


# Called with each operation, which then runs inside the context manager returned. For tests only. While an observer is
# set, the operations of all threads run one at a time, so that it sees them in their real order.
observer: Callable[[Operation], AbstractContextManager[None]] | None = None
_one_at_a_time = threading.RLock()


# After this many bytes of a file the disk is asked to write them. It then works while the rest is copied, and fsync
# waits less. This is a hint, which promises and changes nothing. It is skipped where the system does not know it.
WRITE_BACK_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def _observed(
    name: str, path: str, target: str = "", offset: int = 0, data: memoryview | None = None
) -> AbstractContextManager[None]:
    seen_by = observer
    return _alone(seen_by, Operation(name, path, target, offset, data)) if seen_by is not None else nullcontext()


@contextmanager
def _alone(seen_by: Callable[[Operation], AbstractContextManager[None]], operation: Operation) -> Iterator[None]:
    with _one_at_a_time, seen_by(operation):
        yield


class NewFile:
    """A file that did not exist before, written from front to back."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self._handed_over = 0
        with _observed("create", path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: memoryview) -> None:
        """Append all of `data` (a flat view of bytes). Raises OSError, e.g. when the disk is full."""
        while len(data):
            with _observed("write", self.path, offset=self.size, data=data):
                written = os.write(self._fd, data)
            self.size += written
            data = data[written:]
        if _sync_file_range is not None and self.size - self._handed_over >= WRITE_BACK_BYTES:
            _sync_file_range(self._fd, self._handed_over, self.size - self._handed_over, _SYNC_FILE_RANGE_WRITE)
            self._handed_over = self.size

    def fsync(self) -> None:
        """Return once the file's bytes survive a power loss (its name needs `fsync_dir`)."""
        with _observed("fsync", self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def mkdir(path: str) -> None:
    with _observed("mkdir", path):
        os.mkdir(path)


def rename(path: str, target: str) -> None:
    with _observed("rename", path, target):
        os.rename(path, target)


def link(path: str, target: str) -> None:
    """Make `target` a second name of the file `path`."""
    with _observed("link", path, target):
        os.link(path, target)


def unlink(path: str) -> None:
    with _observed("unlink", path):
        os.unlink(path)


def rmdir(path: str) -> None:
    with _observed("rmdir", path):
        os.rmdir(path)


def fsync_dir(path: str) -> None:
    """Return once the names in this folder survive a power loss."""
    with _observed("fsync_dir", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_tree(path: str) -> None:
    """Unlink a folder with all its files, in a fixed order. A part that is already gone is no error. A link is
    unlinked, not followed: its target is not ours."""
    if os.path.islink(path):
        _tolerate_missing(unlink, path)
        return
    walked = sorted(os.walk(path, topdown=False), key=lambda entry: (-entry[0].count(os.sep), entry[0]))
    for folder, folders, files in walked:
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *links]):
            _tolerate_missing(unlink, os.path.join(folder, name))
        _tolerate_missing(rmdir, folder)


def _tolerate_missing(operation: Callable[[str], None], path: str) -> None:
    try:
        operation(path)
    except FileNotFoundError:
        return
