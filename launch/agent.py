"""torchrun's agent for one node, shielded: the launcher takes the signals, and nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import sys

from trainer.parents import die_with_parent

FAILURES_VARIABLE = "MUSTER_FAILURES"  # file that names the ranks which failed, for the launcher


def main(arguments: list[str]) -> int:
    """Run torchrun with `arguments`; 1 when workers failed for good."""
    die_with_parent()
    # Slurm signals every process of a step. An agent that dies of it takes its workers along, unsaved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    known = {option for action in run.get_args_parser()._actions for option in action.option_strings}
    if "--signals-to-handle" in known:  # else torchrun would undo the shield
        arguments = ["--signals-to-handle", "SIGQUIT", *arguments]
    try:
        run.main(arguments)
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "exit_code": f.exitcode, "time_s": f.timestamp} for rank, f in error.failures.items()
        ]
        with open(os.environ[FAILURES_VARIABLE], "w", encoding="utf-8") as file:
            json.dump(sorted(failures, key=lambda f: f["time_s"]), file)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
