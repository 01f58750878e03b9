"""torchrun's agent for one node, shielded: the launcher takes the signals, and no process outlives the launcher."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.host.environment import FromLauncher
from trainer.host.parents import die_with_parent
from trainer.host.terminal import enter, go_on_unheard
from trainer.life.events import append_row


def main(arguments: list[str]) -> int:
    """Run torchrun with `arguments`. Returns 1 when the workers failed for good."""
    launcher = FromLauncher.read(os.environ)
    assert launcher is not None, "only the launcher starts this"
    if not die_with_parent(launcher.parent):
        return 1
    os.environ.update(replace(launcher, parent=os.getpid()).environment())
    go_on_unheard()
    # Slurm signals every process of a step. An agent that dies of the signal kills its workers before they have saved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    known = {option for action in run.get_args_parser()._actions for option in action.option_strings}
    if "--signals-to-handle" in known:  # else torchrun would undo the shield
        arguments = ["--signals-to-handle", "SIGQUIT", *arguments]
    _tell_failures(launcher.failures)
    try:
        run.main(arguments)
    except ChildFailedError:
        return 1
    return 0


def _tell_failures(path: Path) -> None:
    """Make torchrun record each rank that failed. When torchrun restarts the ranks, it reports no failures."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    class TellingAgent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.is_failed():
                for rank, failure in result.failures.items():  # as found: those that torchrun killed come last
                    append_row(path, {"rank": rank, "exit_code": failure.exitcode})
            return result

    api.LocalElasticAgent = TellingAgent  # type: ignore[attr-defined]


if __name__ == "__main__":
    enter(main)
