"""Attempts, their ends, and when to give up. No torch.

An attempt is one start of a group of workers. Its `end.json` decides what happens next, never an exit code: torchrun
turns a worker's code into 1. A missing `end.json` means failed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.host.clock import now_s
from trainer.life.folder import RunFolder, write_json
from trainer.life.rows import PassedOver, facts_in, record_in, whole

FINISHED, FAILED, USER_ERROR, STOPPED, REQUEUE = 0, 1, 2, 3, 75

# Environment that explains a run. Anything else may hold secrets and is never written down.
_CLUSTER = ("SLURM_JOB_", "SLURM_ARRAY_", "SLURM_RESTART_COUNT", "SLURM_NNODES", "SLURM_NTASKS", "SLURMD_NODENAME")
_WORLD = ("MASTER_", "LOCAL_", "RANK", "WORLD_SIZE")
_LIBRARIES = ("CUDA_", "NCCL_", "GLOO_", "TORCH_", "TORCHELASTIC_", "PYTORCH_", "OMP_", "MUSTER_")
TOLD_PREFIXES = _CLUSTER + _WORLD + _LIBRARIES
_NUMBER = re.compile(r"\d{3,18}", re.ASCII)


@dataclass(frozen=True)
class End:
    """How an attempt ended. `checkpoint`: the newest committed one's name, None when there is none. `time_s`: when this
    was written down."""

    reason: Literal["finished", "stopped", "failed"]
    step: int
    checkpoint: str | None
    requeue: bool
    cause: str | None = None
    time_s: float | None = field(default=None, compare=False)

    @property
    def exit_code(self) -> int:
        if self.reason == "stopped":
            return REQUEUE if self.requeue else STOPPED
        return FINISHED if self.reason == "finished" else FAILED


class Attempt:
    """One start: a folder `attempts/NNN` with what it ran on, a log per rank, and how it ended."""

    def __init__(self, folder: RunFolder, number: int) -> None:
        self.folder, self.number = folder, number
        self.path = folder.attempts / f"{number:03d}"

    @classmethod
    def open(cls, folder: RunFolder) -> Attempt:
        """Make the next attempt's folder. mkdir decides: of two starters only one gets a number."""
        folder.attempts.mkdir(parents=True, exist_ok=True)
        while True:
            attempt = cls(folder, max(numbers(folder), default=-1) + 1)
            try:
                attempt.path.mkdir()
                return attempt
            except FileExistsError:
                continue

    def write_start(self, start_step: int, facts: dict[str, Any]) -> None:
        """What this attempt runs on, and from which step."""
        told = {k: v for k, v in sorted(os.environ.items()) if k.startswith(TOLD_PREFIXES)}
        about = {
            "time_s": now_s(),
            "start_step": start_step,
            "command": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "git": _git_state(),
            "environment": told,
        }
        write_json(self.path / "start.json", about | facts)

    def write_end(self, end: End) -> None:
        """Decide this attempt. An end that stands already is kept: the first to know was nearer to the cause."""
        path = self.path / "end.json"
        if self.end is None:
            write_json(path, asdict(end) | {"time_s": now_s()})
        if not end.requeue:
            # Only now: a crash in between must not lose the request. At whatever end, so that it stops no later start;
            # but what is started again by itself still has to hear of it.
            moved = self.folder.stop
            if moved.exists():
                moved.rename(self.path / "STOP")

    @property
    def end(self) -> End | None:
        """None without one, and where what lies there is no end: then it failed."""
        return self.read_end()

    def read_end(self, over: PassedOver | None = None) -> End | None:
        """`end`; `over` notes what lies there and is none."""
        return record_in(End, self.path / "end.json", over)

    @property
    def start_step(self) -> int | None:
        """The step it began after; None when it did not get that far."""
        return whole(facts_in(self.path / "start.json"), "start_step")

    @property
    def cpu_threads(self) -> int | None:
        """How many each of its processes computed with on the CPU."""
        return whole(facts_in(self.path / "start.json"), "cpu_threads")

    def is_newest(self) -> bool:
        return max(numbers(self.folder)) == self.number

    def discard(self) -> None:
        """Undo `open` after a user error: nothing stays touched."""
        shutil.rmtree(self.path, ignore_errors=True)
        for empty in (self.folder.attempts, self.folder.events, self.folder.root):
            with contextlib.suppress(OSError):  # it holds something and stays, or was never made
                empty.rmdir()


def numbers(folder: RunFolder) -> list[int]:
    """Numbers of the attempts so far, ascending."""
    if not folder.attempts.is_dir():
        return []
    names = [name for name in os.listdir(folder.attempts) if _NUMBER.fullmatch(name)]
    return sorted(int(name) for name in names if Attempt(folder, int(name)).path.name == name)


def newest(folder: RunFolder) -> Attempt | None:
    found = numbers(folder)
    return Attempt(folder, found[-1]) if found else None


def attempts_without_progress(folder: RunFolder) -> int:
    """How many of the latest attempts failed without a new checkpoint.

    An agreed end (finished, stopped, or given up by decision) starts the count anew: a person was there.
    """
    committed = max(folder.committed_steps(), default=0)
    count = 0
    for number in reversed(numbers(folder)):
        attempt = Attempt(folder, number)
        end = attempt.end
        if end is not None and (end.reason != "failed" or end.cause == "giving_up"):
            break
        if (attempt.start_step or 0) < committed and attempt.start_step is not None:
            break
        count += 1
    return count


def _git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *a], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        return {"commit": run("rev-parse", "HEAD"), "changed": bool(run("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
