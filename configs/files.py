"""Reading files that somebody else made: only regular ones are opened, so nothing waits and nothing is endless."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotAFile(OSError):
    """What lies there is no regular file. `strerror` says what it is."""


_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "it is a folder, not a file"),
    (stat.S_ISFIFO, errno.EINVAL, "it is a pipe, not a file"),
    (stat.S_ISSOCK, errno.EINVAL, "it is a socket, not a file"),
    (stat.S_ISCHR, errno.EINVAL, "it is a device, not a file"),
    (stat.S_ISBLK, errno.EINVAL, "it is a device, not a file"),
)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes; links are followed.

    Raises NotAFile for a folder, pipe, socket or device, FileNotFoundError and other OSErrors as `open` does, and
    ValueError for a path that no filesystem can hold (a NUL in it). A pipe without a writer is not waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise NotAFile(errno.EINVAL, "it is a socket, not a file", os.fspath(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    for is_kind, number, words in _KINDS:
        if is_kind(mode):
            os.close(descriptor)
            raise NotAFile(number, words, os.fspath(path))
    return open(descriptor, "rb")


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The whole file. Raises as `open_regular`, and NotAFile when it is larger than `limit_bytes`."""
    with open_regular(path) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise NotAFile(errno.EFBIG, f"it is larger than {limit_bytes} bytes", str(path))
    return data


TEXT_BYTES = 16 << 20  # what a person writes by hand is far smaller


class NotText(OSError):
    """A file that a person wrote and that is no UTF-8. `line` counts from 1, `strerror` says what it is."""

    line = 0


def read_text(path: Path) -> str:
    """What a person wrote: a config, a list. A byte-order mark is dropped. Raises as `read_regular`, and NotText."""
    data = read_regular(path, TEXT_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = NotText(errno.EILSEQ, "is UTF-16: save it as UTF-8" if wide else "is not UTF-8 text", str(path))
        found.line = data.count(b"\n", 0, error.start) + 1
        raise found from None
