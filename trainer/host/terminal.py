"""How every program of ours prints, and how it ends. Imports no torch.

Standard output may be closed, full, a pipe without a reader, or of an encoding without `ä`. A command then ends with at
most one line, never with a traceback. A run goes on, since a night of training is worth more than its output.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from configs.errors import printable

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT
READER_LEFT = 128 + signal.SIGPIPE  # a shell's exit code for a program that a closed pipe ended
_LEFT = {errno.EPIPE, errno.EIO}  # the reader is gone, or its terminal is


class OutputLost(Exception):
    """Standard output accepts nothing more. It is no OSError: code that suppresses OSErrors means files."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {_why(error)}")
        self.reader_left = error.errno in _LEFT


class _Stream(io.FileIO):
    """Standard output or error. A write that fails raises OutputLost, or is dropped where `output_unheard` allows."""

    output_unheard = False  # whether output may be lost without an error

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lost = False

    def write(self, data: Any) -> int:
        """Write all of `data`. One system call may write only a part, after a signal or into a pipe with O_NONBLOCK."""
        rest = memoryview(data).cast("B")
        while rest:
            try:
                count = super().write(rest)
            except OSError as error:
                self._lose(error)
                break
            if count is None:
                select.select([], [self], [])
            rest = rest[count or 0 :]
        return memoryview(data).nbytes

    def _lose(self, error: OSError) -> None:
        first, self._lost = not self._lost, True
        if self.fileno() != 1 or not first:  # after the first time the program is ending, which must not raise again
            return
        if not self.output_unheard:
            raise OutputLost(error)
        if error.errno not in _LEFT:
            say(f"standard output: {_why(error)}; the run goes on, and its log has every line", sys.stderr)


def _why(error: OSError) -> str:
    return "it is closed" if error.errno == errno.EBADF else error.strerror or str(error)


def go_on_unheard() -> None:
    """From now on drop output that cannot be written: the work of this process is worth more than its lines."""
    _Stream.output_unheard = True


def say(text: str = "", to: TextIO | None = None) -> None:
    """Print lines for a person. Control characters are escaped: names and values come from files."""
    stream = to or sys.stdout
    stream.write(printable(text) + "\n")
    stream.flush()


def can_spell(text: str) -> bool:
    """Whether standard output can encode each character."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def say_exactly(text: str) -> None:
    """Print text that a file or a program may read: unchanged, except on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def enter(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a program with the words of its command line, and end with its exit code.

    This does not use `sys.exit`: threads of the process group or of a data loader would delay the end.
    """
    _open_streams()
    try:
        code = _code_of(main)
        sys.stdout.flush()
    except OutputLost as lost:
        code = READER_LEFT if lost.reader_left else FAILED
        if not lost.reader_left:
            say(f"error: {lost}", sys.stderr)
    sys.stderr.flush()
    os._exit(code)


def _code_of(main: Callable[[list[str]], int]) -> int:
    try:
        return main(sys.argv[1:])
    except SystemExit as end:  # `--help`
        if isinstance(end.code, str):
            say(end.code, sys.stderr)
        return end.code if isinstance(end.code, int) else FAILED if end.code else 0
    except KeyboardInterrupt:
        say("\nstopped", sys.stderr)
        return INTERRUPTED


def _open_streams() -> None:
    """Make streams that print characters their encoding lacks as `\\xe4`, and never raise for a reader that is gone."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next opened file would get this number, and our prints. Read-only, so that writing to it fails.
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  (open as long as the process)
    sys.stdout, sys.stderr = _text(1, sys.stdout), _text(2, sys.stderr)


def _text(descriptor: int, before: TextIO | None) -> TextIO:
    """A stream in place of Python's own (None where that was closed), flushed as often as that one."""
    raw = _Stream(descriptor)
    encoding = before.encoding if before is not None else "utf-8"
    at_once, by_line = getattr(before, "write_through", False), getattr(before, "line_buffering", True)
    buffer: Any = raw if at_once else io.BufferedWriter(raw)
    if before is not None:
        before.flush()
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", None, by_line, at_once)
