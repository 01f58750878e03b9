"""From a config to an exit code: joins the ranks, runs one attempt, and translates how it ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UserError
from configs.schema import Config
from trainer import life
from trainer.folder import RunFolder
from trainer.heartbeat import HEARTBEATS_VARIABLE, Heartbeat
from trainer.preflight import check, check_numbers, refuse
from trainer.stacks import answer_monitor
from trainer.stop import StopWish

if TYPE_CHECKING:
    from trainer.run import Run

LAUNCHED_VARIABLE = "MUSTER_LAUNCHED"  # when the launcher began, UNIX time


def start(config: Config, wish: StopWish, kind: type[Run] | None = None) -> int:
    """Run one attempt on this process's share of the ranks; returns the exit code. UserError goes to the caller.

    `kind` is the class that puts the run together, for those who check or measure one.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    numbers = check_numbers(config, world_size)
    problems = numbers if rank else check(config, world_size, RunFolder(Path(config.run_dir)))
    if numbers or world_size == 1:  # all ranks know it; what rank 0 alone looked for is told below
        refuse(problems)
    if HEARTBEATS_VARIABLE in os.environ:
        answer_monitor()
    heartbeat = Heartbeat.of_this_rank()

    from trainer import world as worlds  # imports torch: only now that the config is known to be good
    from trainer.attempt import Recorded, run_attempt
    from trainer.run import Run

    if config.precision.deterministic:
        worlds.be_deterministic()
    try:
        world = worlds.start(config, heartbeat)
        world.from_first(lambda: refuse(problems))
        end = run_attempt(config, wish, world, kind or Run)
    except UserError as error:
        error.alone = not error.agreed
        if error.agreed:
            worlds.leave()
        raise
    except Recorded:
        return life.FAILED  # other ranks may be gone: nothing is closed in order
    worlds.leave()
    return exit_code(end)


def exit_code(end: life.End) -> int:
    """Under torchrun an agreed end is 0: the agent would start again what exits otherwise. `end.json` says the rest."""
    if LAUNCHED_VARIABLE in os.environ:
        return life.FINISHED
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return life.FAILED if end.reason == "failed" else life.FINISHED
    return end.exit_code
