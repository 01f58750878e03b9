"""The one exception for what a person can cause, and the one way to say it."""

from __future__ import annotations

import sys
from contextlib import suppress


class UserError(Exception):
    """One or two lines: what is wrong, where, and what to do. Ends the program with exit code 2, without a traceback.

    Rank 0 says it for all. Only an error that one rank meets `alone`, while others wait for it, is said by that rank;
    `agreed` marks one that all ranks were told of.
    """

    agreed = False
    alone = False


def printable(text: str) -> str:
    """The text with every control character but the newline shown escaped: a terminal takes orders from such bytes.

    A byte of a file name that is no UTF-8 (a lone surrogate in Python) is shown as `\\xNN`.
    """
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python spells a byte that it could not decode
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def tell(error: UserError) -> None:
    """Print a person's mistake on stderr, as `error: ...`. Never raises: whoever calls it is about to end with 2."""
    with suppress(OSError, ValueError):  # stderr is closed, or full: the exit code is all that is left
        sys.stderr.write(printable(f"error: {error}\n"))
        sys.stderr.flush()
