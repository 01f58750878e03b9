"""How fast and how busy this machine is now, so that a limit in seconds means the same on a slower or a busier one."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

REFERENCE_S = 0.010  # processor time of `_work` on the machine that limits in seconds are stated for
_ROW = {"step": 17, "loss": 2.5, "phase": "computing", "gpus": [{"index": n, "power_w": 1.5 * n} for n in range(8)]}
_WORD = re.compile(r"(\w+)=(\w*)")


def takes_at_most(limit_s: float, call: Callable[[], object], tries: int = 3) -> None:
    """One of a few calls takes no more processor time than that, its ended processes included.

    The limit is one of the reference machine. What is slow here is slow for a fixed piece of work right before and
    after a call, too, and makes the limit longer. So other work on the machine fails no test; code twice as slow does.
    """
    told = []
    slow = slowness()
    for _ in range(tries):
        began_s = _processor_s()
        call()
        spent_s = _processor_s() - began_s
        before, slow = slow, slowness()
        allowed_s = limit_s * max(1.0, min(before, slow))
        if spent_s <= allowed_s:
            return
        told.append(f"{spent_s:.3g} s of {allowed_s:.3g} s")
    raise AssertionError(f"processor time, and what is allowed on this machine: {', '.join(told)}")


def slowness() -> float:
    """1 on the reference machine, 2 where everything takes twice the processor time."""
    spent_s = []
    for _ in range(5):
        began_s = _processor_s()
        _work()
        spent_s.append(_processor_s() - began_s)
    return min(spent_s) / REFERENCE_S


def _processor_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _work() -> int:
    """Of the nature of what is timed: text is parsed, objects are made and sorted, a small file is read."""
    lines = [json.dumps({**_ROW, "number": number}) for number in range(400)]
    found = [json.loads(line) for line in lines]
    found.sort(key=lambda row: -row["number"])
    text = " ".join(f"key{row['number']}={row['phase']}" for row in found)
    words = {match[1]: match[2] for _ in range(20) for match in _WORD.finditer(text)}
    here = Path(__file__)
    return len(words) + sum(len(here.with_name(here.name).read_bytes()) for _ in range(300))


def patience(seconds: float) -> float:
    """How long to wait for what takes seconds on a free machine, by the clock: longer where more wants to run than
    there are processors. MUSTER_TEST_PATIENCE=3 makes it three times as long again."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return seconds * max(1.0, busy) * float(os.environ.get("MUSTER_TEST_PATIENCE", "1"))
