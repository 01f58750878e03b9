"""Locks on open files. Some filesystems have none: Lustre without `-o flock`, and some NFS servers."""

from __future__ import annotations

import errno
import fcntl

_NONE_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def lock(descriptor: int, wait: bool = False) -> bool:
    """Take the exclusive lock of an open file, which lasts until the file is closed. False where there are no locks.
    Raises BlockingIOError when another process has it, unless `wait`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _NONE_HERE:
            return False
        raise
    return True
