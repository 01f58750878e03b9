"""`python -m launch report`: what a run spent its time on, and what it got for that."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from configs.errors import UserError
from launch.look.goodput import Goodput, goodput
from launch.look.run_folder import readable
from trainer.host.arguments import Parser, typed
from trainer.host.console import duration
from trainer.host.terminal import say
from trainer.life.folder import RunFolder

_BAR = 30


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog=typed("launch report"), description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    options = parser.parse_args(arguments)
    folder = RunFolder(options.run)
    with readable(folder.root):
        if not folder.attempts.is_dir():
            raise UserError(f"{options.run} is no run folder: it has no attempts")
        found = goodput(folder)
    say("\n".join(lines(found)))
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    return 0


def lines(found: Goodput) -> list[str]:
    """The report for people, in 80 columns."""
    whole = found.allocated_s
    attempts = f"{found.attempts} attempt{'s' if found.attempts != 1 else ''}"
    told = [f"{duration(whole)} in {attempts}, {found.ranks} ranks: {found.gpu_hours:.2f} rank-hours"]
    for name, seconds in found.seconds.items():
        share = seconds / whole if whole else 0.0
        bar = "#" * round(share * _BAR)
        told.append(f"  {name.replace('_', ' '):<17} {share:>6.1%}  {duration(seconds):>9}  {bar}")
    for number, seconds in found.clock_jumps:
        told.append(f"a clock was set by {seconds:+,.0f} s in attempt {number}; the times above are by another")
    if found.share is not None:
        told.append(f"goodput {found.share:.1%}: computing and communicating for steps that counted")
    if found.first_loss is not None:
        loss = f"loss {found.first_loss:.4f} -> {found.last_loss:.4f}"
        told.append(f"bought {found.steps:,} steps, {found.samples:,} samples; {loss}")
    if found.passed_over is not None:
        told.append(found.passed_over)
    return told
