"""`python -m slurm logs RUN|JOB`: what a run printed: the output of its job, or the log of one rank."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from configs.errors import UserError
from configs.files import kind_fault, open_regular
from launch.look import run_folder
from slurm.look import queue
from slurm.look.find import folder_named, is_job
from slurm.look.state import is_alive
from trainer.host.arguments import Parser, typed
from trainer.host.terminal import say
from trainer.life import attempts as life
from trainer.life.attempts import Attempt
from trainer.life.folder import RunFolder

_POLL_S = 0.5
_ASK_EVERY_S, _ASK_SOON_S = 15.0, 2.0  # the time between two questions to Slurm whether the job still lives
_LAST_LINES = 20  # how many old lines a follower prints first
_CHUNK_BYTES = 1 << 20


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog=typed("slurm logs"), description=__doc__)
    parser.add_argument("run", metavar="RUN|JOB", help="its folder, or the number of its job")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it is written, until the run ends")
    parser.add_argument("--rank", type=int, metavar="N", help="the log of this rank")
    parser.add_argument("--attempt", type=int, metavar="N", help="of this attempt; default: the newest")
    options = parser.parse_args(arguments)
    log = Log(options.run, options.rank, options.attempt)
    try:
        return log.follow() if options.follow else log.print_all()
    except KeyboardInterrupt:
        return 0


class Log:
    """The file that a person means: one job's output, or a rank's log, which is a new file in each attempt."""

    def __init__(self, word: str, rank: int | None, attempt: int | None) -> None:
        self.folder = folder_named(word)
        self.jobs = [word] if is_job(word) else run_folder.view(self.folder).jobs
        self.rank, self.attempt = rank, attempt
        self._output = self._find_output() if rank is None and attempt is None else None

    def path(self) -> Path:
        """The file's path now. Raises UserError when there is none."""
        path = self._output or self._of_rank(self.rank or 0)
        fault = kind_fault(path, folder=False)
        if fault is not None:
            raise UserError(f"{path}: {fault}")
        return path

    def _find_output(self) -> Path | None:
        """The output of the job, which holds the lines of all its nodes and lives."""
        for number in self.jobs:
            if (submitted := output_in(self.folder, number)) is not None:
                return submitted
            told = queue.output_of(number)
            if told is not None and told.exists():
                return told
        return None

    def _of_rank(self, rank: int) -> Path:
        folder = RunFolder(self.folder)
        known = life.numbers(folder)
        if not known:
            raise UserError(f"{self.folder}: no attempt has begun yet")
        if self.attempt is not None and self.attempt not in known:
            raise UserError(f"{self.folder}: there is no attempt {self.attempt} (there are {known[0]} to {known[-1]})")
        place = Attempt(folder, known[-1] if self.attempt is None else self.attempt).path
        path = place / f"rank-{rank:05d}.log"
        if not path.exists():
            ranks = len(list(place.glob("rank-*.log")))
            raise UserError(f"{place}: no log of rank {rank} (there are {ranks})")
        return path

    def print_all(self) -> int:
        with open(self.path(), "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                _write(chunk)
        return 0

    def follow(self) -> int:
        """Print the end of the log and every new line, until the run is over. Goes on with the log of a new attempt."""
        path, asked_s, over = self.path(), time.monotonic(), False
        shown = _some_lines_before_end(path)
        while True:
            shown = _print_from(path, shown)
            newer = self._newer(path)
            if newer != path:
                say(f"==> {newer} <==")
                path, shown = newer, 0
            elif over:
                return 0
            else:
                if time.monotonic() - asked_s > self._patience_s():
                    asked_s, over = time.monotonic(), not self._lives()  # if over, read once more for the last words
                time.sleep(_POLL_S)

    def _newer(self, path: Path) -> Path:
        try:
            return self.path() if self.attempt is None else path
        except UserError:  # the newest attempt has no log yet
            return path

    def _patience_s(self) -> float:
        """Seconds until Slurm is asked again whether the job lives. The folder shows most ends sooner."""
        holder = run_folder.view(self.folder).holder
        return _ASK_SOON_S if holder is None or holder.alive is False else _ASK_EVERY_S

    def _lives(self) -> bool:
        view = run_folder.view(self.folder)
        answer = queue.of(self.jobs)
        return (answer.silent is not None and bool(self.jobs)) or is_alive(view, answer)


def output_in(folder: Path, number: str) -> Path | None:
    """The output of a job of this run that `slurm submit` submitted."""
    places = (folder, folder.parent)  # outputs of an array are in the folder above its runs
    return next((path for place in places if (path := place / "slurm" / f"{number}_0_log.out").exists()), None)


def mistake_in(folder: Path, number: str) -> str | None:
    """The first line of the mistake that ended the last life of a job; None when its output holds none."""
    path = output_in(folder, number)
    if path is None:
        return None
    try:
        with open_regular(path) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _CHUNK_BYTES // 16, 0))
            lines = file.read(_CHUNK_BYTES // 16).decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if line.startswith("error: ")), None)


def _some_lines_before_end(path: Path) -> int:
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(end - _CHUNK_BYTES // 16, 0)
        file.seek(start)
        text = file.read(end - start)
    lines = text.splitlines(keepends=True)
    return end - sum(len(line) for line in lines[-_LAST_LINES:])


def _print_from(path: Path, shown: int) -> int:
    with open(path, "rb") as file:
        file.seek(shown)
        while chunk := file.read(_CHUNK_BYTES):
            _write(chunk)
            shown += len(chunk)
    return shown


def _write(chunk: bytes) -> None:
    sys.stdout.buffer.write(chunk)
    sys.stdout.flush()
