"""Reading gpu/<node>.jsonl from its end, while it is written and replaced. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.monitor.journal import VERSION

_BLOCK_BYTES = 2**16


class OtherVersion(Exception):
    """The file was written by a version of the monitor whose rows mean something else."""


def newest(path: Path, kind: str) -> dict[str, Any] | None:
    """The last whole row of a kind; None when the last part of the file holds none."""
    found = newest_rows(path, kind, 1)
    return found[-1] if found else None


def newest_rows(path: Path, kind: str, most: int) -> list[dict[str, Any]]:
    """The last whole rows of a kind, oldest first, from as much of the file's end as `most` rows may take. Raises
    OtherVersion."""
    try:
        with open(path, "rb") as file:
            first = _row(file.readline())
            size = file.seek(0, 2)
            blocks = 1
            while True:
                begin = max(size - blocks * _BLOCK_BYTES, 0)
                file.seek(begin)
                lines = file.read(size - begin).splitlines(keepends=True)
                rows = [row for line in lines[bool(begin) :] if (row := _row(line)) is not None and row["kind"] == kind]
                if len(rows) >= most or begin == 0 or blocks >= 64:
                    break
                blocks *= 4
    except FileNotFoundError:
        return []
    if first is not None and first["kind"] == "node" and first.get("version") != VERSION:
        raise OtherVersion(f"{path} is of version {first.get('version')}, this is version {VERSION}")
    return rows[-most:]


def head(path: Path) -> dict[str, Any] | None:
    """The row that says what the file is."""
    try:
        with open(path, "rb") as file:
            row = _row(file.readline())
    except FileNotFoundError:
        return None
    return row if row is not None and row["kind"] == "node" else None


def _row(line: bytes) -> dict[str, Any] | None:
    """None for a row that is not whole: it is still being written, or its writer died."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None
