"""The run's clock: the time of day when the launcher began, continued by a clock that nobody sets. No torch.

A node's time of day may jump by years while a run goes on, when its time server answers late. So every time that a run
records comes from this clock. The difference of two such times on one node is the time that passed between them. That
holds between processes of the run, and while the machine was suspended.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

from trainer.host.environment import MUSTER_CLOCK

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_s() -> float:
    """UNIX time by the run's clock."""
    return booted_s() + time.clock_gettime(_CLOCK)


def jumped_s() -> float:
    """By how many seconds the time of day has been set since the launcher began."""
    return time.time() - now_s()


@functools.cache
def booted_s() -> float:
    """UNIX time of this machine's boot by the run's clock: as the launcher found it, or without one this process."""
    told = MUSTER_CLOCK.read(os.environ)
    return time.time() - time.clock_gettime(_CLOCK) if told is None else told


def started_ticks(pid: int) -> int:
    """When a process began, in ticks since the boot. Setting a clock does not change it. Raises OSError (no such
    process, or no /proc)."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


def began_s() -> float:
    """When this process began, to a hundredth of a second."""
    return booted_s() + started_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Notes when the time of day is set."""

    LEAST_S = 5.0  # smaller corrections are usual: a time server makes them constantly

    def __init__(self) -> None:
        self._known_s = jumped_s()

    def jumped_s(self) -> float | None:
        """Seconds by which the time of day was set since the last call; None when it was not."""
        now_s = jumped_s()
        if abs(now_s - self._known_s) < self.LEAST_S:
            return None
        seconds, self._known_s = now_s - self._known_s, now_s
        return seconds
