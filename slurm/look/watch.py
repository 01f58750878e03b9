"""`python -m slurm watch [RUN|JOB ...]`: for one run the view of `launch watch`, for several the table of `status`.
Ends when none of them lives."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from launch.look.screen import Picture, show, show_once
from launch.look.watch import Watcher
from slurm.look.status import NOTHING, Look, Row, runs_parser, table_of
from trainer.host.console import duration


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = runs_parser("watch", __doc__)
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks; default: 5")
    parser.add_argument("--once", action="store_true", help="print how it is now, and end")
    options = parser.parse_args(arguments)
    look = Look(options.runs)
    watchers: dict[str, Watcher] = {}  # kept, since a watcher remembers the rows for its sparklines

    def picture(height: int | None) -> Picture:
        rows, notes = look.now()
        last = not any(row.alive for row in rows)
        view = rows[0].view if options.runs and len(rows) == 1 else None
        if view is None:
            return Picture(_table(rows, notes, height), last)
        watcher = watchers.setdefault(str(view.folder.root), Watcher(view.folder))
        room = height - len(notes) if height is not None else None
        return Picture(Group(watcher.look(room, _state(rows[0])), *(Text(note) for note in notes)), last)

    if options.once:
        show_once(picture(None).content)
    else:
        show(picture, options.every)
    return 0


def _state(row: Row) -> str:
    told = [row.state] if row.number is None else [f"job {row.number}", row.state]
    left_s = row.job.left_s if row.job is not None else None
    return "  ".join([*told, *([f"{duration(left_s)} left"] if left_s is not None else [])])


def _table(rows: Sequence[Row], notes: Sequence[str], height: int | None) -> Group:
    lines = [time.strftime("%H:%M:%S"), *(table_of(rows) if rows else [NOTHING]), *notes]
    if height is not None and len(lines) > height:
        room = max(height - 1, 1)
        lines = [*lines[:room], f"and {len(lines) - room} more lines"]
    return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
