"""The output for a person: plain lines, and on a terminal one live line below them. No torch."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from configs.errors import printable
from trainer.host.environment import TERM


class Console:
    """Rank 0 prints on the terminal and in its log. All output of the other ranks goes to their logs."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._log: int | None = None
        self.log_path: Path | None = None
        self._terminal = sys.stdout.isatty() and TERM.read(os.environ) != "dumb"
        self._live = ""
        self._lock = threading.Lock()  # saver threads print too

    def open_log(self, path: Path) -> None:
        """From now on print to `path` too. Ranks other than 0 lose the terminal: even a crash in C is in their log."""
        self.log_path = path
        # Not a Python file: after a full disk it keeps the text it could not write, and fails again when it is closed.
        self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self.rank != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(self._log, 1)
            os.dup2(self._log, 2)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.note(text)
        with self._lock:
            if self.rank == 0:
                self._write(f"{self._wipe()}{printable(text)}\n{self._live}")

    def note(self, text: str) -> bool:
        """Write a line to the log alone. Returns whether the log now holds it."""
        stamp = time.strftime("%H:%M:%S")
        data = "".join(f"{stamp} {line}\n" for line in printable(text).splitlines()).encode(errors="replace")
        with self._lock:
            if self._log is None or self.log_path is None:
                return False
            try:
                written = os.write(self._log, data)
            except OSError:  # full, read-only, or the server is gone: the run can go on without its log
                return False
            return written == len(data) and self.log_path.exists()

    def live(self, text: str) -> None:
        """Print the live line. On a terminal the next one replaces it; elsewhere it is a plain line."""
        if not self._terminal:
            self.say(text)
            return
        with self._lock:
            width = os.get_terminal_size().columns if sys.stdout.isatty() else 80
            wipe = self._wipe()
            self._live = printable(text)[: width - 1]
            self._write(wipe + self._live)

    def end_live(self) -> None:
        """Leave the live line as it is, and go on below it."""
        with self._lock:
            if self._live:
                self._write("\n")
            self._live = ""

    def _wipe(self) -> str:
        return "\r\033[K" if self._live else ""

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def si(number: float) -> str:
    """1234567 -> 1.23 M."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} P"


def gib(count: float) -> str:
    """A number of bytes for people."""
    if count < 2**10:
        return f"{count:.0f} bytes"
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
