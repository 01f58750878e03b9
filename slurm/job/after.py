"""What follows srun in a job's batch script: `python -m slurm after --code $? CONFIG [key=value ...]`.

Once every node has left, this records how this life of the job ended. If the run wants another life, this asks Slurm
for it. Nothing else asks: a requeue kills every process that still runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from configs.config import Config
from configs.errors import UserError
from configs.load import load
from launch.look.run_folder import Outcome
from slurm.job import again, hooks
from slurm.job.hooks import Happened
from slurm.job.lives import Life, end_of_life, failures_without_progress
from trainer.host.arguments import config_parser, take
from trainer.host.environment import SLURM_JOB_NODELIST
from trainer.host.node_name import node_name
from trainer.host.terminal import go_on_unheard, say
from trainer.life import attempts
from trainer.life.attempts import End
from trainer.life.events import Events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

_PATIENCE_S = 10.0  # for the last words of nodes after srun has ended, on a filesystem that caches
_TAKEN_DOWN_PATIENCE_S = 120.0  # Slurm ends the job: srun at once, the tasks and this process after KillWait


def main(arguments: list[str]) -> int:
    """Returns the exit code of the run, which becomes the job's."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Slurm also sends these to a job's batch script
    go_on_unheard()  # a job whose output nobody reads is started again all the same
    parser = config_parser("slurm after", __doc__)
    parser.add_argument("--code", type=int, required=True, metavar="N", help="exit code of srun")
    options = take(parser, arguments)
    config = load(options.config, options.overrides)
    return After(config, options.code).run()


class After:
    """One life of a job, after it has ended."""

    def __init__(self, config: Config, code: int) -> None:
        self.config, self.code = config, code
        self.folder = RunFolder(Path(config.run_dir))
        self.life = Life.here(self.folder, os.environ)
        self.events = Events(self.folder, node_name(), "batch")
        self.job = again.ask_job(self.life.job)
        self.nodes = again.names(SLURM_JOB_NODELIST.need(os.environ))

    def run(self) -> int:
        if not self.job.runs:
            down = again.down(self.nodes)
            if down:
                return self._without(down)
        self._wait_for_nodes()
        end, code = self._end()
        failed = self._failed_nodes()
        if failed and end.requeue and end.cause != "giving_up":
            end = End("failed", end.step, end.checkpoint, requeue=True, cause="node_lost")
            self._say(f"lost {', '.join(failed)}: gone without a word, or without its agent")
        wanted = end.requeue and self._may_live_again()
        if wanted and end.reason == "failed":
            count = failures_without_progress(self.folder, end.step) + 1
            if count >= self.config.run.give_up_after:
                end, wanted, code = End("failed", end.step, end.checkpoint, False, "giving_up"), False, attempts.FAILED
                self._say(f"giving up after {count} lives without a new checkpoint")
        by_slurm = end.requeue and self.job.requeued
        method = self.config.slurm.requeue if wanted else "slurm" if by_slurm else None
        self._record(end, code, method, failed)
        if wanted:
            return self._again(end, failed, code)
        self._tell(end, requeued=by_slurm)
        return code

    def _without(self, down: list[str]) -> int:
        """Slurm itself starts the job again, as a node is down. Within KillWait, keep the job away from that node."""
        step, name = self.folder.newest_checkpoint()
        again.exclude(self.job, again.to_exclude(self.job, down, self._say), self._say)
        self._say(f"lost {', '.join(down)}: Slurm has it down")
        end = End("failed", step, name, requeue=True, cause="node_lost")
        self._record(end, attempts.FAILED, "slurm", down)
        self._tell(end, requeued=True)
        return attempts.FAILED

    def _wait_for_nodes(self) -> None:
        """Wait until each node has left its last word, or until it is too late for that."""
        patience_s = _PATIENCE_S if self.job.runs else _TAKEN_DOWN_PATIENCE_S
        deadline = time.monotonic() + patience_s
        while self.folder.root.exists() and time.monotonic() < deadline:
            if set(self.nodes) <= self.life.left().keys():
                return
            time.sleep(0.1)

    def _end(self) -> tuple[End, int]:
        """How the run ended in this life, and its exit code."""
        left = self.life.left()
        step, name = self.folder.newest_checkpoint()
        end = end_of_life(self.folder, left)
        if end is not None and (end.reason != "failed" or not end.requeue):
            return end, end.exit_code
        codes = {word.code for word in left.values()}
        mistake = self.code == attempts.USER_ERROR and not left
        if mistake or attempts.USER_ERROR in codes:
            return End("failed", step, name, requeue=False, cause="mistake"), attempts.USER_ERROR
        # A stop counts more than a preemption.
        if end is None and codes & {attempts.REQUEUE, attempts.STOPPED}:
            end = End("stopped", step, name, requeue=attempts.STOPPED not in codes, cause="before_an_attempt")
        if end is None:
            began = self.folder.root.exists()  # else no checkpoint to go on from, and no folder to count lives in
            end = End("failed", step, name, requeue=began, cause="start_failed")
        return end, end.exit_code

    def _failed_nodes(self) -> list[str]:
        """Nodes that lost their supervisor or agent. A node that was told to stop in this life does not count."""
        if not self.job.runs:
            return []
        told, died = set(), set()
        for path in self.folder.events.glob("*-launcher.jsonl"):
            node = path.name.removesuffix("-launcher.jsonl")
            # Chosen by the life in a row. The row's time is of the run's clock, which no other clock can be compared
            # with.
            rows = [row["event"] for row in read_rows(path) if "event" in row and self.life.wrote(row)]
            told |= {node} if "stop_passed_on" in rows else set()
            died |= {node} if "agent_died" in rows else set()
        silent = set(self.nodes) - self.life.left().keys() - told
        if silent == set(self.nodes):
            silent = set()  # no node began, so the failed one is unknown
        return sorted(silent | (died if len(self.nodes) > 1 else set()))

    def _may_live_again(self) -> bool:
        """Whether this process may ask for another life: not if the job is cancelled, or requeued by Slurm."""
        if self.job.runs or self.job.timed_out:
            return True
        self._say("Slurm starts this job again" if self.job.requeued else "this job was cancelled")
        return False

    def _record(self, end: End, code: int, method: str | None, failed: list[str]) -> None:
        job, number = self.life.job, self.life.number
        attempt = max(attempts.numbers(self.folder), default=-1)
        outcome = Outcome(
            job, number, attempt, end.reason, end.cause, end.step, code, method, failed, time_s=time.time()
        )
        with contextlib.suppress(OSError):  # a read-only folder must not keep the run from going on
            self.life.end(outcome)
        told = f"{end.reason} at step {end.step}" + (f" ({end.cause})" if end.cause else "")
        self._write("life_ended", reason=end.reason, cause=end.cause, step=end.step, again=method)
        self._say(f"life {number} of job {job}: {told}" + (f"; again by {method}" if method else ""))

    def _again(self, end: End, failed: list[str], code: int) -> int:
        method = self.config.slurm.requeue
        excluded = again.to_exclude(self.job, failed, self._say) if failed else []
        self._write("requeue_asked", method=method, excluded=excluded)
        try:
            again.METHODS[method](self.job, excluded, self.folder, self._say)
        except UserError as refused:
            self._write("requeue_refused", why=str(refused))
            self._say(f"not started again: {refused}\nstart it by hand, or try another slurm.requeue than {method}")
            self._tell(end, requeued=False)
            return attempts.FAILED if end.reason == "failed" else code
        self._tell(end, requeued=True)
        return attempts.FINISHED if method == "chain" else attempts.REQUEUE  # with 75, Slurm could start a second job

    def _tell(self, end: End, requeued: bool) -> None:
        """Call the user's hooks. They come last, as they may hang. They ignore SIGTERM as this process does, so after a
        requeue they have KillWait."""
        happened = Happened.of(end, requeued, self.config.run.name, str(self.folder.root), self.life.job)
        hooks.tell(self.config.slurm, happened, self._say)

    def _write(self, event: str, **facts: object) -> None:
        if self.folder.root.exists():
            with contextlib.suppress(OSError):
                self.events.write(event, job=self.life.job, life=self.life.number, **facts)

    @staticmethod
    def _say(text: str) -> None:
        say(text, sys.stderr)
