"""What a rank that hangs can still tell: where each of its threads is, and which collectives it made.

The monitor asks by signals, as a hung process answers nothing else. The answers lie in memory of this process that the
monitor finds by its name: a hang may well be that of the shared filesystem.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from typing import Any

# Python's handler in C writes the stacks even while no Python code can run; the record needs a thread of its own.
STACKS_SIGNAL = signal.SIGRTMIN + 7
FLIGHT_SIGNAL = signal.SIGRTMIN + 8
STACKS, FLIGHT = "muster-stacks", "muster-flight"


def answer_monitor() -> None:
    """From here on the two signals are answered. As early as can be: unheard, they would end the process."""
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
    """The collectives that this process made: NCCL's record, or that of the other backends where NCCL made none.

    A torch built for CUDA has both records; on the CPU that of NCCL is empty.
    """
    dumps = [getattr(c10d, name)() for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json") if hasattr(c10d, name)]
    texts = [dump if isinstance(dump, bytes) else dump.encode() for dump in dumps]
    return next((text for text in texts if b'"entries"' in text), texts[-1])
