"""`python -m slurm status [RUN|JOB ...]`: the state of runs, from their folders and from Slurm."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from launch.look import run_folder
from launch.look.run_folder import AttemptView, RunView
from launch.look.text import age_text, table
from slurm.look import queue
from slurm.look.find import folders_named
from slurm.look.logs import mistake_in
from slurm.look.queue import Job, Life, Queue
from slurm.look.state import is_alive, job_of, state_of, unexplained
from trainer.host.arguments import Parser, typed
from trainer.host.console import duration, si
from trainer.host.terminal import say
from trainer.life.rows import amount, speed_of, whole

NOTHING = "no run below runs/, and no job of yours in the queue"
_READERS = 16  # a shared filesystem answers in milliseconds, and many questions at once are just as fast
_HEADER = ("run", "job", "state", "nodes", "step", "loss", "tokens/s", "left", "job left", "restarts", "checkpoint")
_RIGHT = "nodes,step,loss,tokens/s,left,job left"
_ATTEMPT_HEADER = ("attempt", "began", "job", "hosts", "steps", "end", "cause")
_HOSTS_SHOWN = 4
_MISTAKES = ("failed (mistake)", "failed (exit code 2)")  # the second where only Slurm knows
_SKEW_S = 5.0  # the difference of clocks that is not reported


@dataclass(frozen=True)
class Row:
    """One run. `lives`: whether it is in the queue, or one of its processes is known to run."""

    folder: Path
    view: RunView | None  # None: it could not be read, and `state` tells why
    job: Job | None
    number: str | None  # of its job, in the queue or not
    state: str
    alive: bool


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = runs_parser("status", __doc__).parse_args(arguments)
    rows, notes = Look(options.runs).now()
    say("\n".join([*table_of(rows), *notes] if rows else [NOTHING]))
    if options.runs and len(rows) == 1 and rows[0].view is not None:
        say("\n".join(history(rows[0].view, rows[0].number)))
    return 0


def runs_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of the verbs that look at several runs."""
    parser = Parser(prog=typed(f"slurm {verb}"), description=description)
    told = "run folders, folders of runs, or jobs; default: all below runs/, and those of your jobs"
    parser.add_argument("runs", nargs="*", metavar="RUN|JOB", help=told)
    return parser


class Look:
    """The runs that a person asks about. Each look asks Slurm once, and asks accounting only about new ends."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self._past: dict[str, list[Life]] = {}
        self._no_accounting: str | None = None

    def now(self) -> tuple[list[Row], list[str]]:
        """(a row for each run, the living first and then the latest; what a reader of them must know).

        Raises UserError for a word that names no run.
        """
        folders, views, answer = self._read()
        gone = {n for view in views if isinstance(view, RunView) and (n := unexplained(view, answer)) is not None}
        if new := gone - self._past.keys() if answer.silent is None else set():
            if not self.words:  # in a folder that people share, others may have these
                answer = queue.both(answer, queue.of(new))
            found, self._no_accounting = queue.lives_of_jobs(new)
            self._past |= {number: found.get(number, []) for number in new}
        self._past = {number: past for number, past in self._past.items() if number in gone}
        rows = [_row(folder, view, answer, self._past) for folder, view in zip(folders, views, strict=True)]
        rows.sort(key=lambda row: (not row.alive, -_latest_s(row)))
        return rows, _notes(rows, answer, self._no_accounting)

    def _read(self) -> tuple[list[Path], list[RunView | UserError], Queue]:
        if self.words:
            folders = folders_named(self.words)
            views = _read_all(folders)
            return folders, views, queue.of(n for view in views if isinstance(view, RunView) for n in view.jobs)
        answer = queue.mine()
        below = run_folder.runs_in(Path("runs")) if Path("runs").is_dir() else []
        submitted = {job.folder for job in answer.jobs.values() if job.folder is not None and job.folder.is_dir()}
        further = [run for folder in sorted(submitted) for run in run_folder.runs_in(folder)]
        folders = list({folder.resolve(): folder for folder in [*below, *further]}.values())
        return folders, _read_all(folders), answer


def _read_all(folders: Sequence[Path]) -> list[RunView | UserError]:
    def one(folder: Path) -> RunView | UserError:
        try:
            return run_folder.view(folder)
        except UserError as error:
            return error

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(one, folders))


def _row(folder: Path, view: RunView | UserError, answer: Queue, past: dict[str, list[Life]]) -> Row:
    if isinstance(view, UserError):
        return Row(folder, None, None, None, str(view), False)
    job, gone = job_of(view, answer), unexplained(view, answer)
    number = job.number if job is not None else gone or next(iter(view.jobs), None)
    state = state_of(view, answer, past.get(gone or "", []))
    return Row(folder, view, job, number, state, is_alive(view, answer))


# ---- what is printed -------------------------------------------------------------------------------------------------


def table_of(rows: Sequence[Row]) -> list[str]:
    """Lines, with a header."""
    return table(_HEADER, [_cells(row) for row in rows], _RIGHT)


def _cells(row: Row) -> tuple[str, ...]:
    name, view, job = _short(row.folder), row.view, row.job
    if view is None:
        return (name, "-", row.state, *("-" for _ in _HEADER[3:]))
    newest, facts = view.newest, view.row
    step, last = _step(row), newest.last_step if newest else None
    loss, speed = amount(facts, "loss"), speed_of(facts) if row.alive else None
    nodes = job.nodes if job is not None else len(newest.hosts) if newest else 0
    return (
        name,
        row.number or "-",
        row.state,
        str(nodes) if nodes else "-",
        "-" if step is None else f"{step}/{last}" if last is not None else str(step),
        f"{loss:.4f}" if loss is not None else "nan" if facts else "-",
        "-" if speed is None else si(speed[0]) if speed[1] == "tokens" else f"{si(speed[0])} samples",
        _left(facts, last) if row.state.startswith("running") else "-",
        duration(job.left_s) if job is not None and job.left_s is not None else "-",
        _restarts(view),
        _checkpoint(view),
    )


def _step(row: Row) -> int | None:
    assert row.view is not None
    newest, facts = row.view.newest, row.view.row
    if newest is not None and newest.end_step is not None:
        return newest.end_step
    if newest is not None and newest.start_step is not None and whole(facts, "attempt") != newest.number:
        return newest.start_step  # it has gone back to its checkpoint
    return whole(facts, "step")


def _short(folder: Path) -> str:
    path, here = str(folder), os.getcwd()
    return os.path.relpath(path) if os.path.abspath(path).startswith(here + os.sep) else path


def _left(facts: dict[str, object], last: int | None) -> str:
    step, step_s = whole(facts, "step"), amount(facts, "step_s")
    if step is None or step_s is None or last is None:
        return "-"
    return duration(max(last - step, 0) * step_s)


def _restarts(view: RunView) -> str:
    before = view.before
    if before is None or not (before.reason is None or before.requeue):
        return str(view.restarts)  # a person began the newest attempt
    return f"{view.restarts}: {_cause(view, before) or before.reason or 'died'}"


def _cause(view: RunView, attempt: AttemptView) -> str | None:
    """Why it ended; where it could not say so itself, what its job's life came to."""
    outcome = view.outcome_of(attempt) if attempt.reason is None else None
    return outcome.cause if outcome is not None else attempt.cause


def _checkpoint(view: RunView) -> str:
    if view.checkpoint_step is None:
        return "none"
    age_s = time.time() - view.checkpoint_s if view.checkpoint_s is not None else None
    return f"{view.checkpoint_step}, {age_text(age_s)} ago" if age_s is not None else str(view.checkpoint_step)


def _latest_s(row: Row) -> float:
    if row.view is None:
        return 0.0
    newest = row.view.newest
    began_s = newest.began_s if newest is not None else None
    return max(amount(row.view.row, "time_s") or 0.0, began_s or 0.0)


def _notes(rows: Sequence[Row], answer: Queue, no_accounting: str | None) -> list[str]:
    notes = []
    if answer.silent is not None and any(row.number for row in rows):
        notes.append(f"Slurm was not heard ({answer.silent}): this is what the run folders say")
    if no_accounting is not None:
        notes.append(f"no accounting ({no_accounting}): jobs that are over are known for minutes only")
    for row in rows:
        mistake = mistake_in(row.folder, row.number) if row.state in _MISTAKES and row.number is not None else None
        if mistake is not None:
            notes.append(f"{_short(row.folder)}: {mistake}")
        if row.view is not None and row.view.passed_over:
            notes.append(f"{_short(row.folder)}: {row.view.passed_over.told(row.folder)}")
    ahead_s = max((_latest_s(row) for row in rows), default=0.0) - time.time()
    if ahead_s > _SKEW_S:
        notes.append(f"a node's clock is {age_text(ahead_s)} ahead of the one here: ages are off by that")
    return notes


# ---- one run, all its lives ------------------------------------------------------------------------------------------


def history(view: RunView, number: str | None) -> list[str]:
    """Every attempt of a run, and every life of its job."""
    attempts = run_folder.all_attempts(view.folder)
    lines = ["", *table(_ATTEMPT_HEADER, [_attempt_cells(view, a) for a in attempts], "attempt")]
    lives, no_accounting = queue.lives_of_jobs([number]) if number is not None else ({}, None)
    found = lives.get(number or "", [])
    if found:
        rows = [
            (life.job, life.state.lower(), _when(life.began_s), _when(life.ended_s), life.node_list, life.exit_code)
            for life in found
        ]
        lines += ["", *table(("job", "Slurm says", "began", "ended", "nodes", "exit code"), rows)]
    if no_accounting is not None:
        lines.append(f"earlier lives of the job are not known ({no_accounting})")
    return lines


def _attempt_cells(view: RunView, attempt: AttemptView) -> tuple[str, ...]:
    first, last = ("?" if step is None else str(step) for step in (attempt.start_step, attempt.end_step))
    more = len(attempt.hosts) - _HOSTS_SHOWN
    return (
        str(attempt.number),
        _when(attempt.began_s),
        attempt.job or "-",
        (", ".join(attempt.hosts[:_HOSTS_SHOWN]) or "-") + (f" and {more} more" if more > 0 else ""),
        f"{first} to {last}",
        attempt.reason or ("-" if view.newest is not None and attempt.number == view.newest.number else "died"),
        _cause(view, attempt) or "-",
    )


def _when(moment_s: float | None) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(moment_s)) if moment_s is not None else "-"
