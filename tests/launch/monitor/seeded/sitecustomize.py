"""Seeds a fault in one rank of a real run. With this folder on PYTHONPATH, every Python process imports this file
first.

SEEDED is `fault:rank:step`. From that step on, the rank is slow, or hangs, and so on.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

SLOW_S = 0.15
READ_S = 1.0


def _busy(seconds: float) -> None:
    deadline = time.process_time() + seconds
    while time.process_time() < deadline:
        pass


def _hang() -> None:
    while True:
        time.sleep(0.05)  # the line that a stack must show


def _seed(cause: str, step: int) -> None:
    from trainer.data.loader import Loader
    from trainer.engines.fsdp import FsdpEngine

    made = 0
    forward_backward: Any = FsdpEngine.forward_backward
    next_batch: Any = Loader.__next__

    def slowed(self: Any, *arguments: Any) -> Any:
        if made >= step and cause == "slow_rank":
            _busy(SLOW_S)
        if made >= step and cause == "hang":
            _hang()
        return forward_backward(self, *arguments)

    def next_slowly(self: Any) -> Any:
        nonlocal made
        made += 1
        if made >= step and cause == "slow_reader":
            began = time.perf_counter()
            time.sleep(READ_S)
            batch = next_batch(self)
            self.wait_s = time.perf_counter() - began
            return batch
        if made >= step and cause == "hang_reader":
            _hang()
        return next_batch(self)

    FsdpEngine.forward_backward = slowed  # type: ignore[method-assign]
    Loader.__next__ = next_slowly  # type: ignore[method-assign]


def _is_trainer() -> bool:
    words = sys.orig_argv
    return "-m" in words and words[words.index("-m") + 1] == "trainer"


if "SEEDED" in os.environ and _is_trainer():
    cause, rank, step = os.environ["SEEDED"].split(":")
    if os.environ.get("RANK", "0") in rank.split(","):
        sys.path.insert(0, os.getcwd())
        _seed(cause, int(step))
        sys.path.pop(0)
