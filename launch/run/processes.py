"""Ending processes for good."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

_PATIENCE_S = 5.0  # even a killed process takes a moment to go


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to each, and wait until they are gone. Those that are gone already are no error."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_PATIENCE_S)
