"""Rows of JSON lines and small JSON files that somebody else wrote: another process, a crash, a hand. No torch.

Others write while we read, so half a row at the end is usual. What nobody of ours can have written is passed over and
counted: no JSON, no object, a number that is none, a time that no calendar has. It never raises, and never waits.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from configs.errors import printable
from configs.files import NotAFile, open_regular, read_regular

Row = dict[str, Any]
T = TypeVar("T")
_BLOCK_BYTES = 32 * 1024
_LONGEST_ROW_BYTES = 1 << 20
_LARGEST_FILE_BYTES = 64 << 20  # of a file that is read whole
_END_OF_TIME_S = 2.0**33  # the year 2242: no clock of a run shows more, and every calendar can print it
_SHOWN = 3
_FOREIGN = "not what we write there"


_ROWS_LOOKED_AT = 200  # from the end, for one that has a key


class PassedOver:
    """What was passed over: how many rows of which file, and which files as a whole, with the reason."""

    def __init__(self) -> None:
        self.rows: Counter[Path] = Counter()
        self.files: dict[Path, str] = {}

    def __bool__(self) -> bool:
        return bool(self.rows or self.files)

    def told(self, root: Path) -> str:
        """All of it in one line. Paths are relative to `root`."""
        name = lambda path: str(path.relative_to(root) if path.is_relative_to(root) else path)  # noqa: E731
        told = [f"{name(path)} ({reason})" for path, reason in sorted(self.files.items())]
        told += [f"{count} row{'s' * (count != 1)} of {name(path)}" for path, count in sorted(self.rows.items())]
        more = f" and of {len(told) - _SHOWN} more files" if len(told) > _SHOWN else ""
        return printable(f"passed over, as it cannot be read: {', '.join(told[:_SHOWN])}{more}")


# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _passing_over(path: Path, over: PassedOver | None) -> Iterator[None]:
    """A file that is not there says nothing; one that is no file, or too large, is noted."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        return
    except NotAFile as error:
        if over is not None:
            over.files[path] = error.strerror or str(error)


def read_json(path: Path, over: PassedOver | None = None) -> Any | None:
    """The JSON in a file; None when there is none, or not a whole one."""
    data = b""
    with _passing_over(path, over):
        data = read_regular(path, _LARGEST_FILE_BYTES)
    found = parsed(data)
    if found is None and data.strip() and over is not None:
        over.files[path] = "no whole JSON"
    return found


def facts_in(path: Path, over: PassedOver | None = None) -> Row:
    """The JSON object in a file; {} when there is none, or not yet a whole one."""
    found = read_json(path, over)
    if isinstance(found, dict):
        return found
    if found is not None and over is not None:
        over.files[path] = _FOREIGN
    return {}


def read_rows(path: Path, over: PassedOver | None = None) -> list[Row]:
    """All rows of a file that may still be written to."""
    rows: list[Row] = []
    with _passing_over(path, over), open_regular(path) as file:
        for line in _lines(file):
            row = row_in(line)
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n") and line.strip() and over is not None:  # else it is being written
                over.rows[path] += 1
    return rows


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends. Of one that is too long to be a row, the beginning."""
    while line := file.readline(_LONGEST_ROW_BYTES):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(_LONGEST_ROW_BYTES)
        yield line if rest is line or not rest else line + b"\n"


def rows_backwards(path: Path, over: PassedOver | None = None) -> Iterator[Row]:
    """Rows of a file that may still be written to, from its end on."""
    for place, line in enumerate(lines_backwards(path, over)):
        row = row_in(line)
        if row is not None:
            yield row
        elif place > 0 and line.strip() and over is not None:  # the first may be half a line yet
            over.rows[path] += 1


def lines_backwards(path: Path, over: PassedOver | None = None) -> Iterator[bytes]:
    """Lines of a file that may still be written to, from its end on. The first may be half a line yet, or empty. One
    that is too long to be a row ends it."""
    with _passing_over(path, over), open_regular(path) as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start > 0 and len(rest) < _LONGEST_ROW_BYTES:
            size = min(start, _BLOCK_BYTES)
            start = file.seek(start - size)
            first, *lines = (file.read(size) + rest).split(b"\n")
            rest = first if start > 0 else b""  # the line may begin in the block before
            yield from reversed(lines if start > 0 else [first, *lines])


# ---- rows ------------------------------------------------------------------------------------------------------------


def row_in(line: bytes) -> Row | None:
    """The row that these bytes are; None when they are anything else, such as half of one."""
    found = parsed(line)
    return found if isinstance(found, dict) and is_row(found) else None


def parsed(data: bytes) -> Any | None:
    """The JSON that these bytes are; None when they are none."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def is_row(row: Row) -> bool:
    """Whether each value is what its name says, for names that mean the same in all files. None is allowed."""
    return all(row.get(name) is None or fits(row, name) for name, fits in _MEANINGS.items())


def amount(facts: Row, key: str) -> float | None:
    """A finite number."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON's whole numbers have no end
        return None


def moment(facts: Row, key: str) -> float | None:
    """A UNIX time that a clock can have shown."""
    value = amount(facts, key)
    return value if value is not None and 0 <= value < _END_OF_TIME_S else None


def whole(facts: Row, key: str) -> int | None:
    """A whole number that a counter of ours can have reached."""
    value = facts.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def text(facts: Row, key: str) -> str | None:
    """A line of text, without what would move a terminal's cursor."""
    value = facts.get(key)
    if not isinstance(value, str) or not value.strip():
        return None
    return "".join(c if c.isprintable() else " " for c in value).strip()


def durations(facts: Row, key: str) -> dict[str, float] | None:
    """Seconds by name."""
    value = facts.get(key)
    if not isinstance(value, dict):
        return None
    found = {name: moment(value, name) for name in value}  # no phase lasts longer than all time
    return cast("dict[str, float]", found) if None not in found.values() else None


_MEANINGS: dict[str, Callable[[Row, str], Any | None]] = {
    **dict.fromkeys(("time_s", "began_s", "started_s", "saved_s"), lambda row, key: moment(row, key) is not None),
    **dict.fromkeys(
        ("attempt", "step", "start_step", "last_step", "rank", "world_size", "consumed_samples", "pid", "exit_code"),
        lambda row, key: whole(row, key) is not None,
    ),
    **dict.fromkeys(
        ("loss", "validation_loss", "tokens_per_s", "step_s", "data_wait_s", "mfu", "lr", "grad_norm", "still_s"),
        lambda row, key: amount(row, key) is not None,
    ),
    **dict.fromkeys(("event", "kind", "phase", "node"), lambda row, key: isinstance(row[key], str)),
    "phases_s": lambda row, key: durations(row, key) is not None,
}


def record_in(kind: type[T], path: Path, over: PassedOver | None = None) -> T | None:
    """The dataclass in a file; None when there is none, or something else."""
    facts = facts_in(path, over)
    found = record(kind, facts)
    if found is None and facts and over is not None:
        over.files[path] = _FOREIGN
    return found


@cache
def _checked(kind: Any) -> Any:
    from pydantic import TypeAdapter  # late: most readers need none

    return TypeAdapter(kind)


def record(kind: type[T], facts: Any) -> T | None:
    """The dataclass that these facts are; None unless each of its fields is there, of its type."""
    if not isinstance(facts, dict) or not is_row(facts):
        return None
    try:
        # As text: of values that are given it pydantic takes no dict for a dataclass where types are strict.
        return cast("T", _checked(cast("Any", kind)).validate_json(json.dumps(facts), strict=True))
    except (ValueError, RecursionError):
        return None


def last_row(path: Path, key: str, attempt: int | None = None, over: PassedOver | None = None) -> dict[str, Any]:
    """The last row of a JSON-lines file in which `key` is a number or null; {} without one.

    Of this attempt if it is among the last: a rank that outlived an earlier one may have written below it.
    """
    found: dict[str, Any] = {}
    for row in islice(rows_backwards(path, over), _ROWS_LOOKED_AT):
        if key in row and (row[key] is None or amount(row, key) is not None):
            if attempt is None or whole(row, "attempt") == attempt:
                return row
            found = found or row
    return found


def speed_of(row: Row) -> tuple[float, str] | None:
    """How fast a row of metrics.jsonl says that a run is: a number, and tokens or samples (a second)."""
    for unit in ("tokens", "samples"):
        speed = amount(row, f"{unit}_per_s")
        if speed is not None:
            return speed, unit
    return None
