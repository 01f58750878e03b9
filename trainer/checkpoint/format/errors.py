"""The errors of checkpoints."""

from __future__ import annotations

import errno
from pathlib import Path


class BadCheckpoint(Exception):
    """A checkpoint that must not be loaded. The message tells which file, where in it, and why."""

    def __init__(self, path: str | Path, reason: str, bytes_range: tuple[int, int] | None = None) -> None:
        self.path = Path(path)
        self.reason = reason
        self.bytes_range = bytes_range
        where = f" (bytes {bytes_range[0]} to {bytes_range[1]})" if bytes_range else ""
        super().__init__(f"{path}{where}: {reason}")


class Superseded(Exception):
    """A newer attempt owns the run folder. This attempt must end and write nothing more."""


class SaveError(Exception):
    """A save that failed: another rank failed or did not answer, or the pieces do not make whole tensors."""


def has_no_room(error: Exception) -> bool:
    """Whether the disk is full, or what this user may take of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
