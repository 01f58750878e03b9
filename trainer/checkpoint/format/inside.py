"""A file that a manifest names must be a regular file inside the checkpoint's own folder, else the checkpoint is bad.

No link is followed, so nothing outside the folder is read. No pipe or device is opened, so nothing hangs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from configs.errors import UserError
from trainer.checkpoint.format.errors import BadCheckpoint


def check_files(files: Iterable[tuple[Path, int]]) -> None:
    """Raise BadCheckpoint unless each (path, size) is such a file in a real folder, UserError when one may not be
    read."""
    checked: set[Path] = set()
    for path, size in files:
        if path.parent not in checked:
            if not stat.S_ISDIR(_status(path.parent).st_mode):
                raise BadCheckpoint(path.parent, "it is not a folder")
            checked.add(path.parent)
        check_file(path, size)


def check_file(path: Path, size: int) -> None:
    """Raise BadCheckpoint unless `path` is a regular file of this size, UserError when it may not be read."""
    found = _regular(path)
    if found.st_size != size:
        raise BadCheckpoint(path, f"it has {found.st_size} bytes instead of {size}")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise _forbidden(path)


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a whole file. Raises BadCheckpoint when it is missing, too large or no regular file."""
    _regular(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if os.fstat(file.fileno()).st_size > limit_bytes:
                raise BadCheckpoint(path, "it is too large to be true")
            return file.read(limit_bytes + 1)
    except PermissionError:
        raise _forbidden(path) from None
    except OSError as error:
        raise BadCheckpoint(path, f"cannot be read: {error.strerror}") from error


def _regular(path: Path) -> os.stat_result:
    found = _status(path)
    if stat.S_ISLNK(found.st_mode):
        raise BadCheckpoint(path, "it is a symbolic link, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise BadCheckpoint(path, "it is not a regular file")
    return found


def _status(path: Path) -> os.stat_result:
    try:
        return os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        raise BadCheckpoint(path, "the file is missing") from None
    except PermissionError:
        raise _forbidden(path) from None
    except OSError as error:
        raise BadCheckpoint(path, f"cannot be read: {error.strerror}") from error


def _forbidden(path: Path) -> UserError:
    return UserError(f"{path}: no permission to read this file of a checkpoint")
