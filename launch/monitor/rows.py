"""Reading gpu/<node>.jsonl from its end, while it is written and replaced. No torch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from launch.monitor.journal import VERSION
from launch.run_folder import lines_backwards, object_in

Row = dict[str, Any]
_LINES_LOOKED_AT = 2000  # half an hour of seconds


class OtherVersion(Exception):
    """The file was written by a version of the monitor whose rows mean something else."""


def newest(path: Path, kind: str) -> Row | None:
    """The last whole row of a kind; None when the last part of the file holds none, or it is of another version."""
    try:
        found = newest_rows(path, kind, 1)
    except OtherVersion:  # said by those who show it; to a monitor it is a node of which it knows nothing
        return None
    return found[-1] if found else None


def newest_rows(path: Path, kind: str, most: int) -> list[Row]:
    """The last whole rows of a kind, oldest first; fewer than `most` when the file's last part holds no more. Raises
    OtherVersion."""
    first = head(path)
    if first is not None and first.get("version") != VERSION:
        raise OtherVersion(f"{path} is of version {first.get('version')}, this is version {VERSION}")
    begins = b'{"kind": "%s"' % kind.encode()  # so that only what is asked for is parsed
    lines = (line for line in islice(lines_backwards(path), _LINES_LOOKED_AT) if line.startswith(begins))
    rows = (row for line in lines if (row := object_in(line)) is not None)
    return list(islice(rows, most))[::-1]


def head(path: Path) -> Row | None:
    """The row that says what the file is."""
    try:
        with open(path, "rb") as file:
            row = object_in(file.readline())
    except FileNotFoundError:
        return None
    return row if row is not None and row.get("kind") == "node" else None
