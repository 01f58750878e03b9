"""One side of `benchmarks/against.py speed`: a run of the checkout in the current folder. It trains when asked."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from typing import Any

sys.path[0] = os.getcwd()  # the checkout that is measured; this file may lie in another one


def measure(config: Any, steps: int, asked: str, told: str) -> None:
    """One rank: rank 0 reads the name of a loop, all ranks train `steps` steps of it, until the input ends."""
    from benchmarks.speed import BareLoop, open_run, seconds, train_on

    try:
        from trainer.ranks import world as worlds
    except ImportError:  # a checkout older than the rooms
        from trainer import world as worlds  # type: ignore[no-redef, attr-defined]

    world = worlds.start(config)
    run = open_run(config, world)
    loops: dict[str, Any] = {"ours": partial(train_on, run), "bare": BareLoop(run).run}
    questions = open(asked) if world.first else None  # noqa: SIM115
    answers = open(told, "w") if world.first else None  # noqa: SIM115
    while True:
        word = world.from_first(lambda: questions.readline().strip() if questions else "")
        if not word:
            break
        taken_s = seconds(loops[word], steps, world)
        if answers:
            answers.write(f"{taken_s}\n")
            answers.flush()
    run.close()
    worlds.leave()


def main() -> None:
    from configs.load import load
    from tests.distributed import run_ranks

    processes, steps, asked, told, preset, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="muster-against-") as folder:
        endless = ["train.steps=1000000", "train.validate_every_steps=0", "checkpoint.every_steps=0"]
        config = load(preset, [f"run.dir={folder}/run", *endless, "run.tensorboard=false", *overrides])
        run_ranks(int(processes), measure, config, int(steps), asked, told, timeout_s=3600)


if __name__ == "__main__":
    main()
