"""`python -m slurm stop` and `cancel`: end a run as a person wishes, after a save or at once."""

from __future__ import annotations

from pathlib import Path

from configs.errors import UserError
from launch.look import run_folder
from slurm.ask import ask
from slurm.look import queue
from slurm.look.find import folder_named, is_job
from slurm.look.state import is_alive, job_of, may_live, state_of
from trainer.host.arguments import Parser, typed
from trainer.host.terminal import say


def stop_main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog=typed("slurm stop"), description="Let a run save after its step and end; it is not started again."
    )
    parser.add_argument("run", metavar="RUN|JOB", help="its folder, or the number of its job")
    word = parser.parse_args(arguments).run
    folder = folder_named(word)
    view = run_folder.view(folder)
    answer = queue.of(view.jobs)
    job = job_of(view, answer)
    if not is_alive(view, answer) and not may_live(view, answer):
        state = state_of(view, answer, [])
        raise UserError(f"{folder} does not run ({state}); a STOP in it would end its next start")
    try:
        view.folder.stop.touch()
    except OSError as error:
        raise UserError(f"{view.folder.stop}: {error.strerror}") from error
    if job is not None and job.state == "PENDING":
        say(f"job {job.number} waits ({job.reason}), and ends as soon as it starts;")
        say(f"to take it out of the queue now: {typed('slurm cancel', job.number)}")
    else:
        say(f"{folder}: saves and ends within two steps; to see it: {typed('slurm logs -f', word)}")
    return 0


def cancel_main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog=typed("slurm cancel"),
        description="Take a job out of the queue, or end it now: it saves only if it can within KillWait.",
    )
    parser.add_argument("run", metavar="RUN|JOB", help="its folder, or the number of its job")
    word = parser.parse_args(arguments).run
    number = _in_queue(word) if is_job(word) else _job_in(folder_named(word))
    ask("scancel", number)
    say(f"job {number} is cancelled")
    return 0


def _in_queue(number: str) -> str:
    answer = queue.of([number])
    if answer.silent is not None:
        raise UserError(f"Slurm does not answer: {answer.silent}")
    if not answer.jobs:  # of an array: no task is in the queue
        raise UserError(f"job {number} is not in the queue")
    return number


def _job_in(folder: Path) -> str:
    view = run_folder.view(folder)
    answer = queue.of(view.jobs)
    job = job_of(view, answer)
    if job is not None:
        return job.number
    if answer.silent is not None:
        raise UserError(f"Slurm does not answer: {answer.silent}")
    if is_alive(view, answer):
        raise UserError(f"{folder} runs without a job of Slurm's; to end it: {typed('slurm stop', folder)}")
    raise UserError(f"{folder} has no job in the queue ({state_of(view, answer, [])})")
