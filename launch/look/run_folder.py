"""What a run folder says about its run, read from outside while others write to it. Imports no torch.

A file that is missing, half-written or of another version tells nothing: its values are None.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.monitor.rows import phase_now
from trainer.host.node_name import node_name
from trainer.life import attempts as life
from trainer.life.attempts import Attempt, End
from trainer.life.entries import MANIFEST, checkpoint_name
from trainer.life.folder import RunFolder
from trainer.life.lease import alive_here
from trainer.life.rows import PassedOver, facts_in, last_row, moment, record_in, text, whole

JOB_FILE = Path("slurm/job.json")  # `slurm submit` writes here which job has the folder
LIVES = Path("slurm/lives")  # `slurm after` writes here how the lives of jobs ended
_ARRAY_MARK = JOB_FILE.parent
_MARKS = (Path("attempts"), JOB_FILE, Path("LEASE"))
_BUILDING = ("starting", "preparing", "compiling")


@dataclass(frozen=True)
class AttemptView:
    """One start, and its end if it has one. `last_step`: the step that it was to train to."""

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


@dataclass(frozen=True)
class Holder:
    """Who holds the folder, by its LEASE. `alive` is None when only Slurm could tell that."""

    node: str | None
    pid: int | None
    job: str | None
    attempt: int | None  # the first attempt that it was to start
    alive: bool | None


@dataclass(frozen=True)
class Outcome:
    """How a life of a job ended. The batch script writes this after srun, so it survives the launcher and its node.

    `attempt`: the newest attempt at that time, -1 without one. `exit_code`: that of the run. `again`: how the run was
    to be started again, None if not; "slurm" when Slurm itself does it.
    """

    job: str
    life: int
    attempt: int
    reason: str
    cause: str | None
    step: int
    exit_code: int
    again: str | None
    failed_nodes: list[str]
    time_s: float


@dataclass(frozen=True)
class RunView:
    """A run as its folder shows it now."""

    folder: RunFolder
    attempts: int
    restarts: int  # how many attempts followed one that failed or was to be started again
    newest: AttemptView | None
    before: AttemptView | None
    row: dict[str, Any]  # last row of metrics.jsonl with a loss; a rolled-back attempt's only if there is no other
    checkpoint_step: int | None
    checkpoint_s: float | None  # when that checkpoint was committed
    holder: Holder | None
    phase: str | None  # what most ranks are doing, while a monitor sees them
    submitted: str | None  # the job that `slurm submit` noted last
    stop_asked: bool
    outcomes: tuple[Outcome, ...]  # of the lives of jobs, the latest last
    passed_over: PassedOver  # files and rows that cannot be read

    @property
    def jobs(self) -> list[str]:
        """Slurm's jobs that may have this run now, the likeliest first."""
        held, began = self.holder.job if self.holder else None, self.newest.job if self.newest else None
        return list(dict.fromkeys(number for number in (held, self.submitted, began) if number is not None))

    def outcome_of(self, attempt: AttemptView) -> Outcome | None:
        """How the life ended in which this attempt began; None while that life lasts."""
        return next((outcome for outcome in self.outcomes if outcome.attempt >= attempt.number), None)


def is_run(folder: Path) -> bool:
    """Whether a run was begun or submitted in this folder."""
    return any((folder / mark).exists() for mark in _MARKS)


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else the run folders below it, also those in arrays. Raises UserError."""
    with readable(folder):
        return [folder] if is_run(folder) else sorted(_runs_below(folder))


def _runs_below(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir() and is_run(path):
                yield path
            elif entry.is_dir() and (path / _ARRAY_MARK).is_dir():  # runs that were submitted together, as one job
                yield from _runs_below(path)


def view(folder: Path) -> RunView:
    """Read a run: about ten small files, and the end of each attempt. Each attempt takes 0.05 ms of a processor.

    Raises UserError when the folder may not be read.
    """
    with readable(folder):
        return _view(RunFolder(folder))


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn an error into one line for a person: a file of the run that may not be read, or cannot be reached."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error


def _view(folder: RunFolder) -> RunView:
    numbers, over = life.numbers(folder), PassedOver()
    newest = attempt_view(folder, numbers[-1], over) if numbers else None
    step, committed_s = _newest_checkpoint(folder)
    return RunView(
        folder=folder,
        attempts=len(numbers),
        restarts=sum(_again(Attempt(folder, number).read_end(over)) for number in numbers[:-1]),
        newest=newest,
        before=attempt_view(folder, numbers[-2], over) if len(numbers) > 1 else None,
        row=last_row(folder.metrics, "loss", numbers[-1] if numbers else None, over),
        checkpoint_step=step,
        checkpoint_s=committed_s,
        holder=holder_of(folder, over),
        phase=phase_now(folder.gpu, newest.number) if newest is not None and newest.reason is None else None,
        submitted=text(facts_in(folder.root / JOB_FILE, over), "job"),
        stop_asked=folder.stop.exists(),
        outcomes=outcomes(folder, over),
        passed_over=over,
    )


def attempt_view(folder: RunFolder, number: int, over: PassedOver | None = None) -> AttemptView:
    """What an attempt wrote at its start and at its end."""
    attempt = Attempt(folder, number)
    start, end = facts_in(attempt.path / "start.json", over), attempt.read_end(over)
    hosts, environment = start.get("hosts"), start.get("environment")
    return AttemptView(
        number=number,
        began_s=moment(start, "time_s"),
        start_step=whole(start, "start_step"),
        last_step=whole(start, "last_step"),
        hosts=tuple(str(host) for host in hosts) if isinstance(hosts, list) else (),
        job=_job_in(environment) if isinstance(environment, dict) else None,
        reason=end.reason if end is not None else None,
        cause=end.cause if end is not None else None,
        end_step=end.step if end is not None else None,
        requeue=end is not None and end.requeue,
    )


def _job_in(environment: dict[str, Any]) -> str | None:
    array, task = text(environment, "SLURM_ARRAY_JOB_ID"), text(environment, "SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array is not None and task is not None else text(environment, "SLURM_JOB_ID")


def all_attempts(folder: RunFolder) -> list[AttemptView]:
    """Every attempt so far, in order. Raises UserError when one may not be read."""
    with readable(folder.root):
        return [attempt_view(folder, number) for number in life.numbers(folder)]


def _newest_checkpoint(folder: RunFolder) -> tuple[int | None, float | None]:
    steps = folder.committed_steps()
    if not steps:
        return None, None
    try:  # A save writes the manifest last, right before the commit.
        return steps[-1], (folder.checkpoints / checkpoint_name(steps[-1]) / MANIFEST).stat().st_mtime
    except FileNotFoundError:  # deleted just now, or broken
        return steps[-1], None


def _again(end: End | None) -> bool:
    """Whether an attempt that follows this end is a restart: the end asked for it, or the attempt died without a word.
    After a person's stop, or after the last step, a person starts the run anew."""
    return end is None or end.requeue


def running(phase: str | None, stepped: bool) -> str:
    """What a living run does, in a word or two. `stepped`: whether this attempt has written a row."""
    word = "starting" if not stepped and phase in (None, *_BUILDING) else "running"
    return word if phase in (None, word) else f"{word} ({phase})"


def holder_of(folder: RunFolder, over: PassedOver) -> Holder | None:
    lease = facts_in(folder.lease, over)
    if not folder.lease.exists():
        return None
    alive = alive_here(lease, node_name())
    return Holder(text(lease, "node"), whole(lease, "pid"), text(lease, "job"), whole(lease, "attempt"), alive)


def outcomes(folder: RunFolder, over: PassedOver | None = None) -> tuple[Outcome, ...]:
    """How the lives of jobs ended, the latest last."""
    try:
        with os.scandir(folder.root / LIVES) as entries:
            found = [record_in(Outcome, Path(entry.path) / "outcome.json", over) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted((o for o in found if o is not None), key=lambda outcome: outcome.time_s))
