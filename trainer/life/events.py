"""What happened when: one JSON line per event, one file per writer. No torch."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.host.clock import now_s
from trainer.life.folder import RunFolder
from trainer.life.rows import PassedOver, read_rows

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line in one system call, on a line of its own even after a writer that died in mid-line.

    On a full or read-only disk the row is lost: a run that cannot note its loss can train until it can save again.
    """
    data = (json.dumps(row) + "\n").encode()
    with tolerate_unwritable():
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


@contextmanager
def tolerate_unwritable() -> Iterator[None]:
    """For writing what a run can go on without, while the disk is full or read-only: saves say so by themselves."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise


class Events:
    """Appends to `events/<node>-<role>.jsonl`. One writer per file, so that no two processes share a line."""

    def __init__(self, folder: RunFolder, node: str, role: str) -> None:
        self.path = folder.events / f"{node}-{role}.jsonl"
        self.attempt: int | None = None

    def write(self, event: str, **facts: Any) -> None:
        """Append an event. Nothing is written where the run folder was moved away: it must not appear a second time."""
        if not self.path.parents[1].is_dir():
            return
        with tolerate_unwritable():
            self.path.parent.mkdir(exist_ok=True)
        append_row(self.path, {"time_s": round(now_s(), 6), "attempt": self.attempt, "event": event, **facts})


def read_events(folder: RunFolder, over: PassedOver | None = None) -> list[dict[str, Any]]:
    """Every event of a run in the order of time. Each has a time and a name; `over` notes what is none."""
    found = []
    for path in sorted(folder.events.glob("*.jsonl")):
        for row in read_rows(path, over):
            if row.get("time_s") is not None and row.get("event") is not None:
                found.append(row)
            elif over is not None:
                over.rows[path] += 1
    return sorted(found, key=lambda row: row["time_s"])
