"""The one exception for mistakes that a person can make, and the one way to report them."""

from __future__ import annotations

import sys
from contextlib import suppress


class UserError(Exception):
    """One or two lines: what is wrong, where, and what to do. Ends the program with exit code 2, without a traceback.

    Rank 0 reports the error for all ranks. `alone` marks an error that one rank meets while the others wait for it:
    that rank reports it. `agreed` marks an error that all ranks were told of.
    """

    agreed = False
    alone = False


def printable(text: str) -> str:
    """The text with every control character but the newline escaped: a terminal obeys such bytes.

    A byte of a file name that is not UTF-8 (a lone surrogate in Python) becomes `\\xNN`.
    """
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python represents a byte that it could not decode
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def tell(error: UserError) -> None:
    """Print a person's mistake on stderr, as `error: ...`. Never raises: the caller is about to end with code 2."""
    with suppress(OSError, ValueError):  # stderr is closed or full: only the exit code is left
        sys.stderr.write(printable(f"error: {error}\n"))
        sys.stderr.flush()
