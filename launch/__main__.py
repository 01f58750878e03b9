"""`python -m launch VERB ...`."""

from trainer.shadow import refuse_shadow

refuse_shadow()  # before any import that a folder of the user's could answer

import sys  # noqa: E402

from launch.verbs import Verb, run_verb  # noqa: E402

VERBS = {
    "run": Verb("launch.run:main", "Run a config on this node: checks, torchrun, restarts, stopping."),
    "checkpoint": Verb("launch.checkpoint:main", "List, show, verify, diff, prune and convert checkpoints."),
    "watch": Verb("launch.watch:main", "A run while it runs: every GPU, loss and speed, the last events."),
    "report": Verb("launch.report:main", "What a run's time went into, and what it bought."),
}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    return run_verb("python -m launch", "What a person types around a run.", VERBS, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
