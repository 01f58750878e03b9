"""`python -m launch VERB ...`."""

import os
import sys

if __name__ == "__main__":  # before all other imports: the current folder may hold a `trainer.py`
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from trainer.host.shadow import stand_apart

    del sys.path[0]
    stand_apart()

from launch.verbs import Verb, run_verb
from trainer.host.terminal import enter

VERBS = {
    "run": Verb("launch.run.command:main", "Run a config on this node: checks, torchrun, restarts, stopping."),
    "checkpoint": Verb("launch.checkpoint:main", "List, show, verify, diff, prune and convert checkpoints."),
    "watch": Verb("launch.look.watch:main", "A run while it runs: every GPU, loss and speed, the last events."),
    "report": Verb("launch.look.report:main", "What a run's time went into, and what it bought."),
}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    return run_verb("launch", "What a person types around a run.", VERBS, arguments)


if __name__ == "__main__":
    enter(main)
