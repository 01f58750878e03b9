"""Reading gpu/<node>.jsonl from its end, while it is written and replaced. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.monitor.journal import VERSION

Row = dict[str, Any]
_BLOCK_BYTES = 2**16
_MOST_BLOCKS = 64


class OtherVersion(Exception):
    """The file was written by a version of the monitor whose rows mean something else."""


def newest(path: Path, kind: str) -> Row | None:
    """The last whole row of a kind; None when the last part of the file holds none."""
    found = newest_rows(path, kind, 1)
    return found[-1] if found else None


def newest_rows(path: Path, kind: str, most: int) -> list[Row]:
    """The last whole rows of a kind, oldest first; fewer than `most` when the file's last part holds no more. Raises
    OtherVersion."""
    first = head(path)
    if first is not None and first.get("version") != VERSION:
        raise OtherVersion(f"{path} is of version {first.get('version')}, this is version {VERSION}")
    return tail(path, most, b'{"kind": "%s"' % kind.encode())


def tail(path: Path, most: int, begins: bytes = b"{") -> list[Row]:
    """The last whole rows of a file of JSON lines that begin so, oldest first."""
    try:
        with open(path, "rb") as file:
            size, blocks = file.seek(0, 2), 1
            while True:
                begin = max(size - blocks * _BLOCK_BYTES, 0)
                file.seek(begin)
                lines = file.read(size - begin).splitlines(keepends=True)[bool(begin) :]
                lines = [line for line in lines if line.startswith(begins) and line.endswith(b"\n")]
                if len(lines) >= most or begin == 0 or blocks >= _MOST_BLOCKS:
                    break
                blocks *= 4
    except FileNotFoundError:
        return []
    return [row for line in lines[-most:] if (row := _row(line)) is not None]


def head(path: Path) -> Row | None:
    """The row that says what the file is."""
    try:
        with open(path, "rb") as file:
            row = _row(file.readline())
    except FileNotFoundError:
        return None
    return row if row is not None and row.get("kind") == "node" else None


def _row(line: bytes) -> Row | None:
    """None for a row that is not whole: its writer died in the middle."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
