"""Read files that somebody else made. Only regular files are opened: a pipe could wait, a device never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotAFile(OSError):
    """No regular file lies at this path. `strerror` says what lies there instead."""


def kind_of(mode: int) -> str:
    """What a thing of this mode is, in words, such as `a folder`."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def kind_fault(path: str | os.PathLike[str], folder: bool) -> str | None:
    """Why this path is not what it must be: a folder if `folder` is true, else a file. Links are followed.

    None when it is right, and when nothing has this name. Raises OSError when that cannot be found out.
    """
    gone = (errno.ENOENT, errno.ENOTDIR)
    link = f"a link to {os.readlink(path)}" if os.path.islink(path) else None
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if link is None and error.errno not in (*gone, errno.ELOOP):  # ELOOP: of a folder above, which is named
            raise
        why = "which is not there" if error.errno in gone else f"which cannot be followed: {error.strerror}"
        return link and f"it is {link}, {why}"
    if stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode):
        return None
    return f"it is {f'{link}, ' if link else ''}{kind_of(mode)}, not a {'folder' if folder else 'file'}"


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes; links are followed. Never waits for a pipe.

    Raises NotAFile for a folder, pipe, socket, device, or circle of links. Raises FileNotFoundError and other OSErrors
    as `open` does. Raises ValueError for a path that no filesystem can hold (one with a NUL).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # ENXIO: a socket
            raise NotAFile(errno.EINVAL, "it is a socket, not a file", os.fspath(path)) from None
        if error.errno == errno.ELOOP and os.path.islink(path):
            told = f"it is a link that cannot be followed: {error.strerror}"
            raise NotAFile(errno.ELOOP, told, os.fspath(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise NotAFile(number, f"it is {kind_of(mode)}, not a file", os.fspath(path))
    return open(descriptor, "rb")


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The bytes of the whole file. Raises as `open_regular`, and NotAFile when it is larger than `limit_bytes`."""
    with open_regular(path) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise NotAFile(errno.EFBIG, f"it is larger than {limit_bytes} bytes", str(path))
    return data


TEXT_BYTES = 16 << 20  # what a person writes by hand is far smaller


class NotText(OSError):
    """A file that should hold text and is not UTF-8. `line` counts from 1, `strerror` says what is wrong."""

    line = 0


def read_text(path: Path) -> str:
    """The text of a config or a list, without a byte-order mark. Raises as `read_regular`, and NotText."""
    data = read_regular(path, TEXT_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = NotText(errno.EILSEQ, "is UTF-16: save it as UTF-8" if wide else "is not UTF-8 text", str(path))
        found.line = data.count(b"\n", 0, error.start) + 1
        raise found from None
