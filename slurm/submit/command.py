"""`python -m slurm submit CONFIG --nodes N`: check, submit a job or an array of jobs, and print what to type next."""

from __future__ import annotations

import os
import sys

from configs.load import load
from slurm.ask import ask
from slurm.submit import limits
from slurm.submit.array import ArraySubmission, configs_of
from slurm.submit.request import add_flags, not_heard, request_of
from slurm.submit.submit import Submission
from trainer.host.arguments import config_parser, take, typed
from trainer.host.terminal import say, say_exactly
from trainer.preflight import refuse

_ELSEWHERE = "where only the nodes see such a path: --no-check-data, and the job looks"


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = config_parser("slurm submit", "Submit a run to a Slurm cluster.")
    add_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="check, print the exact batch script, and end")
    several = (
        "one job for several runs: KEY=[A,B], more than once for each combination, or a file of overrides, a run a line"
    )
    parser.add_argument("--array", action="append", default=[], metavar="LIST", help=several)
    parser.add_argument("--wait", action="store_true", help="follow the job; the exit code is the run's outcome")
    unseen = "do not look for data, tokenizer, cache and start.from: only the nodes see them, and the job looks"
    parser.add_argument("--no-check-data", action="store_true", help=unseen)
    options = take(parser, arguments)
    config = load(options.config, options.overrides)
    request = request_of(config, options.overrides, options)
    if line := not_heard(os.environ):
        say(line, sys.stderr)
    job: Submission = Submission(config, request)
    if options.array:
        job = ArraySubmission(config, request, configs_of(config, options.array, options.config, options.overrides))
    problems = job.problems(paths=not options.no_check_data)
    refuse(problems, _ELSEWHERE if any(problem.elsewhere for problem in problems) else "")
    try:
        limits.check(job.request, limits.partitions())
        ask("sbatch", "--test-only", script=job.script())  # Slurm's own objections: account, features
    except limits.NoSlurm as error:
        if not options.dry_run:
            raise
        say(f"not held against a cluster: {error}", sys.stderr)
    if options.dry_run:
        say_exactly(job.script())
        return 0
    number = job.submit()
    _say_next(number, job)
    return job.follow(number) if options.wait else 0


def _say_next(number: str, job: Submission) -> None:
    say(f"job      {number}")
    say(f"folder   {job.folder.root}")
    say(f"look     {typed('slurm status', number)}    (or watch, or logs -f)")
    say(f"stop     {typed('slurm stop', number)}    (saves and ends)")
