"""`python -m slurm watch [RUN|JOB ...]`: the table of `status`, live, until none of its runs lives."""

from __future__ import annotations

import time

from launch.screen import Screen
from slurm.status import NOTHING, Look, runs_parser, table_of


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = runs_parser("watch", __doc__)
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks; default: 5")
    options = parser.parse_args(arguments)
    look, screen = Look(options.runs), Screen()
    try:
        while True:
            rows, notes = look.now()
            table = table_of(rows) if rows else [NOTHING]
            screen.show([time.strftime("%H:%M:%S"), *table, *notes])
            if not any(row.lives for row in rows):
                return 0
            time.sleep(options.every)
    except KeyboardInterrupt:
        return 0
