"""How many processors this process may use, and how many are idle: of its allocation, not of the machine."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.host.cgroups import groups_above, lines_of

_LOOK_S = 0.2  # the kernel counts in hundredths of a second
_TICKS = re.compile(r"cpu([0-9]{1,9})((?: +[0-9]{1,18}){5,8})")  # the fields that follow are part of the first two
_NEARLY = 0.3  # a core counts as idle while it is busy for less than this share


def allowed() -> int:
    """Whole processors that this process may use: by its affinity (taskset, Slurm, cpusets), and by the quotas of its
    control groups (containers, Kubernetes)."""
    return max(1, min([len(os.sched_getaffinity(0)), *(int(quota) for quota in _quotas())]))


@dataclass(frozen=True)
class Threads:
    """How many threads each process of a node computes with, and why."""

    each: int
    processors: int
    idle: float | None  # None where nobody looked

    def __str__(self) -> str:
        per = f"{self.each} CPU thread{'s' if self.each > 1 else ''} a process"
        idle = f", {self.idle:.1f} idle" if self.idle is not None else ""
        return f"threads   {per}: {self.processors} processors may be used{idle}"


def threads(processes: int, deterministic: bool = False) -> Threads:
    """How many threads each of `processes` on this node should use. Looks for a moment which processors are idle.

    Threads of one process wait for each other at every operation. On a processor that others use, one thread is always
    late: two threads then make a tenth of the steps that one makes. The number of threads also decides the order of
    sums: a `deterministic` run gets the same number whatever else runs.
    """
    if deterministic:
        usable = allowed()
        return Threads(max(1, usable // processes), usable, None)
    usable, unused = allowed(), _idle()
    return Threads(max(1, min(usable, int(unused + _NEARLY)) // processes), usable, min(unused, usable))


def _quotas() -> Iterator[float]:
    """The processors that each control group above this process allows, where it has a limit."""
    return (quota for group in groups_above("cpu") if (quota := _quota(group)))


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():  # version 2
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ArithmeticError):  # no such group, no limit ("max"), or no numbers
        return None


def _idle() -> float:
    """How many processors of this process's affinity nobody used just now."""
    before = _times()
    time.sleep(_LOOK_S)
    after = _times()
    unused = 0.0
    for processor in os.sched_getaffinity(0):
        if processor in before and processor in after:
            total, idle = (now - then for now, then in zip(after[processor], before[processor], strict=True))
            unused += idle / total if total > 0 else 0.0
    return unused


def _times() -> dict[int, tuple[int, int]]:
    """Processor -> (all time, idle time), in the kernel's ticks."""
    found = {}
    for line in lines_of("proc/stat"):
        if match := _TICKS.match(line):
            ticks = [int(count) for count in match[2].split()]
            found[int(match[1])] = (sum(ticks), ticks[3] + ticks[4])  # idle, and idle while waiting for a disk
    return found
