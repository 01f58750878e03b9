"""Reading gpu/<node>.jsonl from its end, while it is written and replaced. No torch."""

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
OLD_S = 15.0  # without a row a node is not seen any more
_NODES_LOOKED_AT = 16
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


def newest_rows(path: Path, kind: str, most: int, over: PassedOver | None = None) -> list[Row]:
    """The last whole rows of a kind, oldest first; fewer than `most` when the file's last part holds no more. Raises
    OtherVersion. `over` notes rows that no monitor writes."""
    first = head(path)
    if first is not None and first.get("version") != VERSION:
        raise OtherVersion(f"{path} is of version {first.get('version')}, this is version {VERSION}")
    begins = b'{"kind": "%s"' % kind.encode()  # so that only what is asked for is parsed
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
    """What most ranks of this attempt are at, by the rows of the nodes that were written to last; None where no row is
    new."""
    files = sorted(folder.glob("*.jsonl"), key=changed_s)[-_NODES_LOOKED_AT:]
    fresh = [row for path in files if age_s(path) < OLD_S and (row := newest(path, "second")) is not None]
    phases = Counter(rank["phase"] for row in fresh if row.get("attempt") == attempt for rank in row["ranks"])
    return phases.most_common(1)[0][0].replace("_", " ") if phases else None


def changed_s(path: Path) -> float:
    """When it was written to last; 0 when it is gone meanwhile, or a link to nothing."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def age_s(path: Path) -> float:
    """Seconds since then. Not by the stamps in it: they are of the run's clock."""
    return max(time.time() - changed_s(path), 0.0)


def _is_whole(row: Row, kind: str) -> bool:
    """Whether it holds what every row of its kind does."""
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
    """The row that says what the file is."""
    try:
        with open_regular(path) as file:
            row = row_in(file.readline(_LONGEST_HEAD_BYTES))
    except (FileNotFoundError, NotAFile):
        return None
    return row if row is not None and row.get("kind") == "node" else None
