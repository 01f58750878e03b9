"""A picture that is drawn repeatedly: in place on a terminal, else one below the other. Imports no torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment

from configs.errors import printable


class Picture(NamedTuple):
    """What to show, and whether it is the last picture."""

    content: RenderableType
    last: bool


def show_once(content: RenderableType) -> None:
    """Print one picture with all its lines, also if the terminal has fewer."""
    plain_console().print(_Shown(content))


def plain_console() -> Console:
    """A console that prints `[red]` and `:tada:` unchanged: they may stand in the name of a file or node."""
    return Console(highlight=False, markup=False, emoji=False)


class _Shown:
    """A picture with its control characters escaped: a name from a file could otherwise control the terminal."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._content, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def show(look: Callable[[int | None], Picture], every_s: float) -> None:
    """Draw until the last picture, or Ctrl-C. `look` gets the number of lines, None where they are not limited. The
    last picture stays on the screen."""
    console = plain_console()
    in_place = console.is_terminal and not console.is_dumb_terminal
    # The alternate screen: on the usual one, lines that scroll up would stay.
    live = Live(console=console, auto_refresh=False, screen=True) if in_place else None
    picture: Picture | None = None
    with live or contextlib.nullcontext(), contextlib.suppress(KeyboardInterrupt):
        while True:
            picture = look(console.height if in_place else None)
            if live is not None:
                live.update(_Shown(picture.content), refresh=True)
            else:
                console.print(_Shown(picture.content), soft_wrap=True)
                console.print()
            if picture.last:
                break
            time.sleep(every_s)
    if in_place and picture is not None:
        console.print(_Shown(picture.content))
