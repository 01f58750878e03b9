"""Lines that are shown again and again: in place on a terminal, one below the other elsewhere. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_HOME, _CLEAR_ALL, _CLEAR_REST, _CLEAR_LINE = "\x1b[H", "\x1b[2J", "\x1b[J", "\x1b[K"


class Screen:
    """One picture after another on stdout."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._begun = False

    def show(self, lines: Sequence[str]) -> None:
        """Replace the last picture. What the terminal has no room for is counted."""
        if not self._terminal:
            print("\n".join([*lines, ""]), flush=True)
            return
        size = os.get_terminal_size(sys.stdout.fileno())
        shown = list(lines)
        if len(shown) > size.lines - 1:  # the cursor stands on the last
            room = max(size.lines - 2, 1)
            shown = [*shown[:room], f"and {len(shown) - room} more lines"]
        # Overwritten line by line: a screen wiped first would flicker.
        text = "".join(f"{line[: size.columns - 1]}{_CLEAR_LINE}\n" for line in shown)
        sys.stdout.write(f"{_HOME if self._begun else _CLEAR_ALL + _HOME}{text}{_CLEAR_REST}")
        sys.stdout.flush()
        self._begun = True
