"""From a config to an exit code: joins the ranks, runs one attempt, and translates how it ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from configs.config import Config
from configs.errors import UserError
from trainer.host.environment import FromLauncher, Ranks
from trainer.host.memory import check_memory
from trainer.host.stacks import answer_monitor
from trainer.host.terminal import say
from trainer.life import attempts as life
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Heartbeat
from trainer.life.stop import Kind, StopRequested, StopWish, write_request
from trainer.preflight import check, check_numbers, problems_of, refuse

if TYPE_CHECKING:
    from trainer.run import Run


def start(config: Config, wish: StopWish, kind: type[Run] | None = None) -> int:
    """Run one attempt on this process's share of the ranks; returns the exit code. UserError goes to the caller.

    `kind` is the class that puts the run together, for those who check or measure one.
    """
    ranks, launcher = Ranks.read(os.environ), FromLauncher.read(os.environ)
    numbers = check_numbers(config, ranks.size)
    problems = numbers
    if ranks.rank == 0 and launcher is None:  # a launcher has looked already: files are not listed twice at each start
        problems = check(config, ranks.size, RunFolder(Path(config.run_dir)))
        problems += problems_of(lambda: check_memory(config, ranks.local_size, ranks.size))
    if numbers or ranks.size == 1:  # all ranks know it; what rank 0 alone looked for is told below
        refuse(problems)
    if launcher is not None:
        answer_monitor()
    heartbeat = Heartbeat.of(ranks, launcher)

    from trainer.attempt import Recorded, run_attempt
    from trainer.ranks import world as worlds  # imports torch: only now that the config is known to be good
    from trainer.run import Run

    if config.precision.deterministic:
        worlds.be_deterministic()
    try:
        world = worlds.start(config, heartbeat, wish)
        world.from_first(lambda: refuse(problems))
        end = run_attempt(config, wish, world, kind or Run)
    except UserError as error:
        error.alone = not error.agreed
        if error.agreed:
            worlds.leave()
        raise
    except StopRequested as request:  # while the ranks waited for each other: there is no attempt yet
        if ranks.local_rank == 0 or not ranks.by_torchrun:  # by hand each rank has a terminal of its own
            say(f"stopped ({request.cause.word}) while rank {ranks.rank} waited for others")
        if launcher is not None:
            write_request(launcher.stop_request, request.cause)  # perhaps only rank 0's launcher has heard of it
        end = life.End("stopped", 0, None, request.cause.kind is Kind.REQUEUE, request.cause.word)
        return exit_code(end, ranks, launcher)
    except Recorded:
        return life.FAILED  # other ranks may be gone: nothing is closed in order
    worlds.leave()
    return exit_code(end, ranks, launcher)


def exit_code(end: life.End, ranks: Ranks, launcher: FromLauncher | None) -> int:
    """Under torchrun an agreed end is 0: the agent would start again what exits otherwise. `end.json` says the rest."""
    if launcher is not None:
        return life.FINISHED
    if ranks.by_torchrun:
        return life.FAILED if end.reason == "failed" else life.FINISHED
    return end.exit_code
