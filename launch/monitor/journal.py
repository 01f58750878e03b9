"""`gpu/<node>.jsonl`: a row per second and a rollup per minute, in one file that never grows past its bound.

The first row tells what the file is (`kind: node`, with the version). At the bound, a new file gets all rollups and the
newest seconds, and replaces the old one by a rename. There is one writer: it holds a lock.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer.host.locks import lock
from trainer.life.events import tolerate_unwritable

VERSION = 1
Row = dict[str, Any]


class Taken(Exception):
    """Another monitor of this node writes this file."""


class Journal:
    """Appends rows. `most_bytes` bounds the file. When it is rewritten, seconds get at most a quarter of that."""

    def __init__(self, path: Path, head: Row, most_bytes: int) -> None:
        self.path, self._head, self._most_bytes = path, {"kind": "node", "version": VERSION, **head}, most_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(path)
        size = os.fstat(self._file).st_size
        # Start on a new line, even after a writer that died in the middle of one.
        self._cut = bool(size) and os.pread(self._file, 1, size - 1) != b"\n"
        self.write(self._head)

    def write(self, row: Row) -> None:
        """Write one row in one system call. On a full disk the row is lost, and the monitor goes on."""
        data = _line(row)
        with tolerate_unwritable():
            if os.fstat(self._file).st_size + len(data) > self._most_bytes:
                self._shrink()
            os.write(self._file, b"\n" + data if self._cut else data)
            self._cut = False

    def _shrink(self) -> None:
        minutes: list[bytes] = []
        seconds: list[bytes] = []
        with open(self.path, "rb") as old:
            for line in old:
                if line.startswith(b'{"kind": "minute"') and line.endswith(b"\n"):
                    minutes.append(line)
                elif line.startswith(b'{"kind": "second"') and line.endswith(b"\n"):
                    seconds.append(line)
        head = _line(self._head)
        kept = _newest(minutes, self._most_bytes // 2) + _newest(seconds, self._most_bytes // 4)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            lock(new, wait=True)
            os.write(new, head + b"".join(kept))
            os.replace(temporary, self.path)
        except OSError:
            os.close(new)
            temporary.unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file, self._cut = new, False


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _newest(lines: list[bytes], most_bytes: int) -> list[bytes]:
    """The last lines that fit into `most_bytes`, in their order."""
    size = 0
    for number in range(len(lines) - 1, -1, -1):
        size += len(lines[number])
        if size > most_bytes:
            return lines[number + 1 :]
    return lines


def _open_locked(path: Path) -> int:
    """The file, open under an exclusive lock. If the file was just replaced, open the new one. Raises Taken."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            lock(file)
        except BlockingIOError as error:
            os.close(file)
            raise Taken(str(path)) from error
        if path.exists() and os.stat(path).st_ino == os.fstat(file).st_ino:
            return file
        os.close(file)
