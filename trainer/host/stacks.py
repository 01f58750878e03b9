"""What a hung rank can still tell: where each of its threads is, and which collectives it made.

The monitor asks by signals, since a hung process answers nothing else. The answers go into memory of this process that
the monitor finds by its name. Files could not do: the hang may be that of the shared filesystem.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from typing import Any

# Python's C handler writes the stacks even while no Python code can run. The record of collectives needs a thread.
STACKS_SIGNAL = signal.SIGRTMIN + 7
FLIGHT_SIGNAL = signal.SIGRTMIN + 8
STACKS, FLIGHT = "muster-stacks", "muster-flight"


def answer_monitor() -> None:
    """Answer the two signals from now on. Call this as early as possible: an unanswered signal ends the process."""
    faulthandler.register(STACKS_SIGNAL, file=os.memfd_create(STACKS), all_threads=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {FLIGHT_SIGNAL})  # so that only the thread below takes it
    threading.Thread(target=_answer, args=(os.memfd_create(FLIGHT),), name=FLIGHT, daemon=True).start()


def _answer(file: int) -> None:
    while True:
        signal.sigwait({FLIGHT_SIGNAL})
        if "torch" in sys.modules:
            from torch._C import _distributed_c10d as c10d

            os.pwrite(file, _flight(c10d), 0)


def _flight(c10d: Any) -> bytes:
    """The collectives that this process made: NCCL's record, or that of the other backends where NCCL has none.

    A torch built for CUDA has both records. On the CPU the record of NCCL is empty.
    """
    dumps = [getattr(c10d, name)() for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json") if hasattr(c10d, name)]
    texts = [dump if isinstance(dump, bytes) else dump.encode() for dump in dumps]
    return next((text for text in texts if b'"entries"' in text), texts[-1])
