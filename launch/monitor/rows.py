"""Read gpu/<node>.jsonl from its end, while it is written and replaced. No torch."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice
from pathlib import Path

from configs.files import NotAFile, open_regular
from launch.monitor.journal import VERSION
from trainer.life.heartbeat import Phase
from trainer.life.rows import PassedOver, Row, amount, lines_backwards, row_in, whole

_PHASES = {phase.word for phase in Phase}
_LONGEST_HEAD_BYTES = 1 << 20
OLD_S = 15.0  # a node without a row for this long counts as unseen
_NODES_LOOKED_AT = 16
_LINES_LOOKED_AT = 2000  # half an hour, at one row per second


class OtherVersion(Exception):
    """Another version of the monitor wrote the file, and its rows mean something else."""


def newest(path: Path, kind: str) -> Row | None:
    """The last whole row of a kind. None when the end of the file holds none, or when the file has another version."""
    try:
        found = newest_rows(path, kind, 1)
    except OtherVersion:  # those who show the file report it; to a monitor the node is unknown
        return None
    return found[-1] if found else None


def newest_rows(path: Path, kind: str, most: int, over: PassedOver | None = None) -> list[Row]:
    """The last whole rows of a kind, oldest first; fewer than `most` when the end of the file holds no more. Raises
    OtherVersion. `over` collects rows that no monitor writes."""
    first = head(path)
    if first is not None and first.get("version") != VERSION:
        raise OtherVersion(f"{path} is of version {first.get('version')}, this is version {VERSION}")
    begins = b'{"kind": "%s"' % kind.encode()  # parse only lines of this kind
    lines = (line for line in islice(lines_backwards(path), _LINES_LOOKED_AT) if line.startswith(begins))
    found: list[Row] = []
    for line in lines:
        row = row_in(line)
        if row is not None and _is_whole(row, kind):
            found.append(row)
        elif over is not None:
            over.rows[path] += 1
        if len(found) == most:
            break
    return found[::-1]


def phase_now(folder: Path, attempt: int) -> str | None:
    """What most ranks of this attempt are doing, by the rows of the nodes that wrote last; None where no row is new."""
    files = sorted(folder.glob("*.jsonl"), key=changed_s)[-_NODES_LOOKED_AT:]
    fresh = [row for path in files if age_s(path) < OLD_S and (row := newest(path, "second")) is not None]
    phases = Counter(rank["phase"] for row in fresh if row.get("attempt") == attempt for rank in row["ranks"])
    return phases.most_common(1)[0][0].replace("_", " ") if phases else None


def changed_s(path: Path) -> float:
    """When the file was last written; 0 when it is gone, or a link to nothing."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def age_s(path: Path) -> float:
    """Seconds since the file was last written. Its rows' own times are of the run's clock, which may differ."""
    return max(time.time() - changed_s(path), 0.0)


def _is_whole(row: Row, kind: str) -> bool:
    """Whether the row holds what every row of its kind does."""
    if row.get("time_s") is None or not _are_objects(row.get("ranks")):
        return False
    if kind != "second":
        return True
    return isinstance(row.get("host"), dict) and _are_objects(row.get("gpus")) and all(map(_is_rank, row["ranks"]))


def _are_objects(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def _is_rank(rank: Row) -> bool:
    numbers = (whole(rank, "rank"), whole(rank, "step"), amount(rank, "still_s"))
    return None not in numbers and rank.get("phase") in _PHASES


def head(path: Path) -> Row | None:
    """The first row, which tells what the file is."""
    try:
        with open_regular(path) as file:
            row = row_in(file.readline(_LONGEST_HEAD_BYTES))
    except (FileNotFoundError, NotAFile):
        return None
    return row if row is not None and row.get("kind") == "node" else None
