"""End processes for good."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

_PATIENCE_S = 5.0  # even a killed process takes a moment to end


def kill(processes: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to each process, and wait until all are gone. A process that is already gone is no error."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_PATIENCE_S)
