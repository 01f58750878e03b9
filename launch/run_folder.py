"""What a run folder says about its run, read from outside while others write to it. Imports no torch.

A file that is missing, half-written or of another version says nothing: what it would have told is None.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from configs.errors import UserError
from trainer import life
from trainer.entries import checkpoint_name
from trainer.folder import RunFolder
from trainer.lease import alive_here
from trainer.life import Attempt
from trainer.names import node_name

JOB_FILE = Path("slurm/job.json")  # `slurm submit` notes there which job has the folder
LIVES = Path("slurm/lives")  # and `slurm after` what the lives of jobs came to
_ARRAY_MARK = JOB_FILE.parent
_MARKS = (Path("attempts"), JOB_FILE, Path("LEASE"))
_BLOCK_BYTES = 32 * 1024
_LONGEST_ROW_BYTES = 1024 * 1024
_ROWS_LOOKED_AT = 200


@dataclass(frozen=True)
class AttemptView:
    """One start, and its end if it has one. `last_step` is the step that it was to train to."""

    number: int
    began_s: float | None
    start_step: int | None
    last_step: int | None
    hosts: tuple[str, ...]
    job: str | None
    reason: str | None  # finished, stopped, failed; None: no end yet, or it died without a word
    cause: str | None
    end_step: int | None
    requeue: bool
    ended_s: float | None


@dataclass(frozen=True)
class Holder:
    """Who has the folder, by its LEASE. `alive` is None when that cannot be known from here without asking Slurm."""

    node: str | None
    pid: int | None
    job: str | None
    attempt: int | None  # the first it was to start
    alive: bool | None


@dataclass(frozen=True)
class Outcome:
    """What a life of a job came to, said by what follows srun: it outlives the launcher and its node."""

    time_s: float
    job: str | None
    reason: str | None
    cause: str | None


@dataclass(frozen=True)
class RunView:
    """A run as its folder shows it now."""

    folder: RunFolder
    attempts: int
    newest: AttemptView | None
    before: AttemptView | None
    row: dict[str, Any]  # of metrics.jsonl, the last with a loss; of a rolled-back attempt only while there is no other
    checkpoint_step: int | None
    checkpoint_s: float | None  # when it was committed
    holder: Holder | None
    submitted: str | None  # the job that `slurm submit` noted last
    stop_asked: bool
    outcomes: tuple[Outcome, ...]  # of jobs' lives, the latest last

    @property
    def jobs(self) -> list[str]:
        """Slurm's jobs that may have this run now, the likeliest first."""
        held, began = self.holder.job if self.holder else None, self.newest.job if self.newest else None
        return list(dict.fromkeys(number for number in (held, self.submitted, began) if number is not None))

    def outcome_of(self, attempt: AttemptView) -> Outcome | None:
        """What the life came to in which this attempt began, once that is over."""
        began_s = attempt.began_s if attempt.began_s is not None else math.inf
        return next((outcome for outcome in self.outcomes if outcome.time_s >= began_s), None)


def is_run(folder: Path) -> bool:
    """Whether a run was begun or submitted there."""
    return any((folder / mark).exists() for mark in _MARKS)


def runs_in(folder: Path) -> list[Path]:
    """The folder itself when it is a run's, else those below it that are, also in arrays. Raises UserError."""
    try:
        return [folder] if is_run(folder) else sorted(_runs_below(folder))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _runs_below(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir() and is_run(path):
                yield path
            elif entry.is_dir() and (path / _ARRAY_MARK).is_dir():  # several runs that were submitted as one job
                yield from _runs_below(path)


def view(folder: Path) -> RunView:
    """Read it, in about ten small files. Raises UserError when it may not be read."""
    try:
        return _view(RunFolder(folder))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from error


def _view(folder: RunFolder) -> RunView:
    numbers = life.numbers(folder)
    step, committed_s = _newest_checkpoint(folder)
    return RunView(
        folder=folder,
        attempts=len(numbers),
        newest=attempt_view(folder, numbers[-1]) if numbers else None,
        before=attempt_view(folder, numbers[-2]) if len(numbers) > 1 else None,
        row=last_row(folder.metrics, "loss", numbers[-1] if numbers else None),
        checkpoint_step=step,
        checkpoint_s=committed_s,
        holder=_holder(folder),
        submitted=text(facts_in(folder.root / JOB_FILE), "job"),
        stop_asked=folder.stop.exists(),
        outcomes=_outcomes(folder),
    )


def attempt_view(folder: RunFolder, number: int) -> AttemptView:
    """What an attempt wrote at its start and its end."""
    path = Attempt(folder, number).path
    start, end = facts_in(path / "start.json"), facts_in(path / "end.json")
    hosts, environment = start.get("hosts"), start.get("environment")
    return AttemptView(
        number=number,
        began_s=amount(start, "time_s"),
        start_step=whole(start, "start_step"),
        last_step=whole(start, "last_step"),
        hosts=tuple(str(host) for host in hosts) if isinstance(hosts, list) else (),
        job=_job_in(environment) if isinstance(environment, dict) else None,
        reason=text(end, "reason"),
        cause=text(end, "cause"),
        end_step=whole(end, "step"),
        requeue=end.get("requeue") is True,
        ended_s=amount(end, "time_s"),
    )


def _job_in(environment: dict[str, Any]) -> str | None:
    array, task = text(environment, "SLURM_ARRAY_JOB_ID"), text(environment, "SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array is not None and task is not None else text(environment, "SLURM_JOB_ID")


def all_attempts(folder: RunFolder) -> list[AttemptView]:
    """Every attempt so far, in order."""
    return [attempt_view(folder, number) for number in life.numbers(folder)]


def _newest_checkpoint(folder: RunFolder) -> tuple[int | None, float | None]:
    steps = folder.committed_steps()
    if not steps:
        return None, None
    try:  # the manifest is what is written last, right before the commit
        return steps[-1], (folder.checkpoints / checkpoint_name(steps[-1]) / "manifest.json").stat().st_mtime
    except FileNotFoundError:  # deleted while we look, or broken
        return steps[-1], None


def _holder(folder: RunFolder) -> Holder | None:
    if not folder.lease.exists():
        return None
    lease = facts_in(folder.lease)
    pid, known = whole(lease, "pid"), amount(lease, "started_s") is not None
    alive = alive_here(lease, node_name()) if pid is not None and pid > 0 and known else None
    return Holder(text(lease, "node"), pid, text(lease, "job"), whole(lease, "attempt"), alive)


def _outcomes(folder: RunFolder) -> tuple[Outcome, ...]:
    try:
        with os.scandir(folder.root / LIVES) as entries:
            rows = [facts_in(Path(entry.path) / "outcome.json") for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    found = [Outcome(amount(r, "time_s") or 0.0, text(r, "job"), text(r, "reason"), text(r, "cause")) for r in rows]
    return tuple(sorted((o for o in found if o.time_s), key=lambda outcome: outcome.time_s))


def last_row(path: Path, key: str, attempt: int | None = None) -> dict[str, Any]:
    """The last row of a JSON-lines file in which `key` is a number or null; {} without one.

    Of this attempt if it is among the last: a rank that outlived an earlier one may have written below it.
    """
    found: dict[str, Any] = {}
    for row in islice(rows_backwards(path), _ROWS_LOOKED_AT):
        if key in row and (row[key] is None or amount(row, key) is not None):
            if attempt is None or whole(row, "attempt") == attempt:
                return row
            found = found or row
    return found


def rows_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a JSON-lines file from its end on."""
    return (row for line in lines_backwards(path) if (row := object_in(line)) is not None)


def lines_backwards(path: Path) -> Iterator[bytes]:
    """Lines of a file that is being written, from its end on; none when there is no file. The last may be half a line
    yet. One that is too long to be a row ends it."""
    try:
        with open(path, "rb") as file:
            start, rest = file.seek(0, os.SEEK_END), b""
            while start > 0 and len(rest) < _LONGEST_ROW_BYTES:
                size = min(start, _BLOCK_BYTES)
                start = file.seek(start - size)
                first, *lines = (file.read(size) + rest).split(b"\n")
                rest = first if start > 0 else b""  # the line may begin in the block before
                yield from reversed(lines if start > 0 else [first, *lines])
    except FileNotFoundError:
        return


def facts_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} when there is none, or not yet a whole one."""
    try:
        return object_in(path.read_bytes()) or {}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def object_in(data: bytes) -> dict[str, Any] | None:
    """The JSON object that these bytes are; None when they are anything else, such as half of one."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def amount(facts: dict[str, Any], key: str) -> float | None:
    """A finite number."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON's whole numbers have no end
        return None


def whole(facts: dict[str, Any], key: str) -> int | None:
    """A whole number that a counter of ours can have reached."""
    value = facts.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def text(facts: dict[str, Any], key: str) -> str | None:
    """A line of text, without what would move a terminal's cursor."""
    value = facts.get(key)
    if not isinstance(value, str) or not value.strip():
        return None
    return "".join(c if c.isprintable() else " " for c in value).strip()
