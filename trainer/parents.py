"""No process outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "MUSTER_PARENT"  # pid of the launcher or agent that started this process


def die_with_parent() -> None:
    """Under torchrun: be killed when the agent dies, however it dies (the kernel sees to it; Linux only).

    A process started by hand is left alone: it may well be meant to outlive its shell. A parent that died while this
    process was starting shows by its pid; bare torchrun names none, but takes the ranks' store along when it dies.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and PARENT_VARIABLE not in os.environ:
        return
    parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != parent:
        os._exit(1)
