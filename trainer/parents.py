"""No process outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Under torchrun: be killed when the agent dies, however it dies (the kernel sees to it; Linux only).

    A process started by hand is left alone: it may well be meant to outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "MUSTER_LAUNCHED" not in os.environ:
        return
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != parent:
        os._exit(1)  # it died before the call
