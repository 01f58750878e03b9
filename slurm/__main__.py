"""`python -m slurm VERB ...`."""

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
    "submit": Verb("slurm.submit.command:main", "Submit a run; --dry-run prints the batch script."),
    "status": Verb("slurm.look.status:main", "How runs are: a table of all, or all lives of one."),
    "watch": Verb("slurm.look.watch:main", "The same table, live; of one run every GPU."),
    "logs": Verb("slurm.look.logs:main", "What a run printed; -f follows it."),
    "stop": Verb("slurm.look.stop:stop_main", "Let a run save and end."),
    "cancel": Verb("slurm.look.stop:cancel_main", "Take a job out of the queue, or end it now."),
    "cluster": Verb(
        "slurm.rehearsal.command:main", "A real Slurm cluster on this machine, to rehearse on: up, down, status."
    ),
    "job": Verb("slurm.job.job:main", "What runs on each node of a job, by srun, one task a node."),
    "after": Verb("slurm.job.after:main", "What follows srun: says what came of the run, and has it started again."),
}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    return run_verb("slurm", "Muster on a Slurm cluster.", VERBS, arguments)


if __name__ == "__main__":
    enter(main)
