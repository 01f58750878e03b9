"""What preparing documents and preparing records share: progress, stopping, and a cache that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError

_POLL_S = 0.05
_SAY_S = 1.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


class Interrupted(Exception):
    """A stop was requested while data was prepared. Finished sources stay, and the next start goes on after them."""


@contextlib.contextmanager
def cache_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"data.cache: cannot write to {cache}: {e.strerror}\nmake room there, or set data.cache to another folder"
        ) from e


def key_of(value: Any) -> str:
    """A short hash of plain data, for names of folders and files."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


class Progress:
    """Reports how far a source is and asks whether to stop. Cheap enough for a call per document or record."""

    def __init__(
        self, source: str, say: Callable[[str], None], should_stop: Callable[[], bool], what: str = "documents"
    ) -> None:
        self.count = self.bytes = 0
        self._what = what
        self._source, self._say, self._should_stop = source, say, should_stop
        self._started_s = self._said_s = time.monotonic()
        self._polled_s = 0.0

    def poll(self, read_bytes: int = 0) -> None:
        self.bytes += read_bytes
        now_s = time.monotonic()
        if now_s - self._polled_s < _POLL_S:
            return
        self._polled_s = now_s
        if self._should_stop():
            raise Interrupted
        if now_s - self._said_s >= _SAY_S:
            self._said_s = now_s
            self.say(self.summary())

    def say(self, line: str) -> None:
        self._say(f"data {self._source}: {line}")

    def summary(self) -> str:
        mb, seconds = self.bytes / 1e6, max(time.monotonic() - self._started_s, 1e-3)
        return f"{self.count:,} {self._what}, {mb:,.1f} MB, {mb / seconds:,.1f} MB/s"
