"""What the other nodes of an attempt wrote last, and whether they still write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from launch.monitor.rows import newest
from trainer.life.rows import Row

T = TypeVar("T")


class Others:
    """The age of a row counts from when this node first saw it, by this node's clock. Clocks of two nodes may differ,
    and one may be set while the run goes on. A file that cannot be read is reported once; the other files are still
    read."""

    def __init__(self, folder: Path, node: str, tell: Callable[..., None]) -> None:
        self._folder, self._node, self._tell = folder, node, tell
        self._first_seen: dict[tuple[str, str], tuple[Any, float]] = {}
        self._said: set[str] = set()

    def newest(
        self, kind: str, attempt: int | None, within_s: float, read: Callable[[Row], T]
    ) -> Iterator[tuple[str, T]]:
        """(node, what `read` makes of its newest row), for each node with a row of this attempt that is at most
        `within_s` old. A row that is seen for the first time counts as new."""
        now = time.monotonic()
        for path in sorted(self._folder.glob("*.jsonl")):
            row = newest(path, kind) if path.stem != self._node else None
            if row is None or row.get("attempt") != attempt:
                continue
            stamp = row.get("time_s")
            known = self._first_seen.get((path.stem, kind))
            if known is None or known[0] != stamp:
                known = self._first_seen[path.stem, kind] = stamp, now
            if now - known[1] > within_s:
                continue
            try:
                yield path.stem, read(row)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                if path.stem not in self._said:
                    self._said.add(path.stem)
                    line = f"{path} holds a row that is none ({type(error).__name__}: {error}); it is passed over"
                    self._tell("bad_row", line, file=str(path), error=f"{type(error).__name__}: {error}")
