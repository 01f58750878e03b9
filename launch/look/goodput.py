"""Where the time of a run went, from its folder alone: every second that the run had its GPUs belongs to one class.

A launcher's life lasts from its start to its last sign, and its attempts divide that time without gaps. Within an
attempt, the phases that rank 0 counted fill the time. The time before rank 0's process counted is `starting`. The time
after the last row of a failed attempt is lost work (`redone`), or `stalled` when the attempt hung.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.look.run_folder import JOB_FILE
from trainer.host.environment import MUSTER_CLOCK, MUSTER_LAUNCHED
from trainer.life import attempts as life
from trainer.life.attempts import Attempt, End
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Phase
from trainer.life.rows import PassedOver, amount, facts_in, moment, parsed, read_rows, text, whole

Row = dict[str, Any]
CLASSES = (
    "queued",
    "starting",
    "compiling",
    "waiting_for_data",
    "computing",
    "communicating",
    "saving",
    "validating",
    "stalled",
    "redone",
)
_CLASS = {phase.word: phase.word for phase in Phase} | dict.fromkeys(("preparing", "leaving"), "starting")


@dataclass
class Goodput:
    """`seconds` by class; their sum is `allocated_s`. `ranks`: the world size of the last attempt."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    gpu_hours: float = 0.0
    attempts: int = 0
    ranks: int = 0
    steps: int = 0
    samples: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    passed_over: str | None = None  # the files that cannot be read, in one line
    clock_jumps: list[tuple[int, float]] = field(default_factory=list)  # (attempt, seconds) by which a clock was set

    @property
    def allocated_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float | None:
        """The share of the allocated time that made the steps which counted."""
        useful = self.seconds["computing"] + self.seconds["communicating"]
        return useful / self.allocated_s if self.allocated_s else None


@dataclass
class _Attempt:
    """What the folder holds about one attempt. Rows and events have a time; `start` may be empty."""

    number: int
    start: Row
    end: End | None
    rows: list[Row]  # of metrics.jsonl
    events: list[Row]
    last_sign_s: float

    @property
    def launched_s(self) -> float | None:
        """When the launcher of the attempt began; None under bare torchrun."""
        told = self._environment(MUSTER_LAUNCHED.name)
        return moment({"s": parsed(told.encode())}, "s") if told is not None and "." in told else None

    @property
    def job(self) -> str | None:
        return self._environment("SLURM_JOB_ID")

    def _environment(self, name: str) -> str | None:
        told = self.start.get("environment")
        return text(told, name) if isinstance(told, dict) else None

    @property
    def began_s(self) -> float:
        """The first sign of its rank 0: the start of its process, if its rows tell that."""
        counted = self.counted()
        if counted:
            return counted[0][0] - sum(counted[0][1].values())
        started_s = moment(self.start, "time_s")
        return self.last_sign_s if started_s is None else started_s

    @property
    def failed(self) -> bool:
        return self.end is None or self.end.reason == "failed"

    @property
    def clock_jumps(self) -> list[float]:
        """Seconds by which a node's clock was set during the attempt."""
        jumps = (amount(event, "seconds") for event in self.events if event["event"] == "clock_jumped")
        return [seconds for seconds in jumps if seconds is not None]

    def counted(self) -> list[tuple[float, dict[str, float], int | None]]:
        """(time, seconds by phase until then, step) of every row that counts phases, oldest first."""
        found = [(r["time_s"], r["phases_s"], r.get("step")) for r in self.rows if r.get("phases_s")]
        found += [(e["time_s"], e["phases_s"], None) for e in self.events if e.get("phases_s")]
        return sorted(found, key=lambda one: sum(one[1].values()))  # not by the clock, which may jump


def goodput(folder: RunFolder) -> Goodput:
    """Count the time of a run. An attempt that still runs counts up to its last sign."""
    over = PassedOver()
    attempts = _attempts(folder, over)
    jumps = [(attempt.number, seconds) for attempt in attempts for seconds in attempt.clock_jumps]
    total = Goodput(attempts=len(attempts), clock_jumps=jumps)
    submitted_s = moment(facts_in(folder.root / JOB_FILE, over), "time_s")
    before: _Attempt | None = None
    for attempt, after in zip(attempts, [*attempts[1:], None], strict=False):
        began_s = _begin(attempt, before, submitted_s, total)
        seconds = _divide(attempt, began_s, after)
        for name, value in seconds.items():
            total.seconds[name] += value
        total.ranks = whole(attempt.start, "world_size") or total.ranks
        total.gpu_hours += sum(seconds.values()) * total.ranks / 3600
        before = attempt
    _bought(total, attempts)
    total.passed_over = over.told(folder.root) if over else None
    return total


def _attempts(folder: RunFolder, over: PassedOver) -> list[_Attempt]:
    rows, events, watched = (
        read_rows(folder.metrics, over),
        read_events(folder, over),
        _last_watched_s(folder.gpu, over),
    )
    found = []
    for number in life.numbers(folder):
        attempt = Attempt(folder, number)
        start, end = facts_in(attempt.path / "start.json", over), attempt.read_end(over)
        ended_s = end.time_s if end is not None else None
        mine = [row for row in rows if row.get("attempt") == number and row.get("time_s") is not None]
        told = [event for event in events if event.get("attempt") == number]
        signs = [
            moment(start, "time_s"),
            ended_s,
            watched.get(number),
            *(r["time_s"] for r in mine[-1:] + told[-1:]),
        ]
        if any(event["event"] == "clock_jumped" for event in told) and not _by_the_runs_clock(start):
            # Such rows hold the time of day, from before there was the run's clock. So the order of the rows decides
            # what came last.
            signs = [ended_s] if ended_s is not None else [row["time_s"] for row in mine[-1:]]
        last = max((sign for sign in signs if sign is not None), default=os.lstat(attempt.path).st_mtime)
        found.append(_Attempt(number, start, end, mine, told, last))
    return found


def _by_the_runs_clock(start: Row) -> bool:
    environment = start.get("environment")
    return isinstance(environment, dict) and MUSTER_CLOCK.name in environment


def _last_watched_s(folder: Path, over: PassedOver) -> dict[int, float]:
    """Attempt -> the last time that a monitor saw it."""
    last: dict[int, float] = {}
    for path in folder.glob("*.jsonl"):
        for row in read_rows(path, over):
            attempt, time_s = row.get("attempt"), row.get("time_s")
            if attempt is not None and time_s is not None:
                last[attempt] = max(last.get(attempt, 0.0), time_s)
    return last


def _begin(attempt: _Attempt, before: _Attempt | None, submitted_s: float | None, total: Goodput) -> float:
    """Where an attempt's time begins. Adds time in Slurm's queue to `total`. While no job exists, no time counts."""
    launched = attempt.launched_s
    if before is not None and launched is not None and launched == before.launched_s:
        return before.last_sign_s  # the same launcher restarted it
    began = launched if launched is not None else attempt.began_s
    if before is None:
        waited_since = submitted_s if attempt.job is not None else None
    else:
        waited_since = before.last_sign_s if attempt.job is not None and attempt.job == before.job else None
    if waited_since is not None and not (before is not None and before.clock_jumps):  # else the wait cannot be known
        total.seconds["queued"] += max(began - waited_since, 0.0)
    return began


def _divide(attempt: _Attempt, began_s: float, after: _Attempt | None) -> dict[str, float]:
    """An attempt's seconds by class, from where its time begins to its last sign."""
    seconds = dict.fromkeys(CLASSES, 0.0)
    whole = max(attempt.last_sign_s - began_s, 0.0)
    counted = attempt.counted()
    if not counted:
        seconds["starting"] = whole
        return seconds
    last_s, phases, _ = counted[-1]
    for phase, value in phases.items():
        seconds[_CLASS.get(phase, "starting")] += value
    tail = max(attempt.last_sign_s - last_s, 0.0)
    # The time before the first row that counts. The rest that the rows leave would be wrong: in an older folder the
    # time of day may have jumped between two rows.
    seconds["starting"] += max(attempt.began_s - began_s, 0.0)
    _lost(seconds, attempt, after)
    if not attempt.failed:
        seconds["starting"] += tail  # leaving
        return seconds
    still = min(max((_still_s(event) for event in attempt.events), default=0.0), tail)
    seconds["stalled"] += still
    seconds["redone"] += tail - still
    return seconds


def _still_s(event: Row) -> float:
    ranks = event.get("ranks") if event["event"] == "hang" else None
    still = [amount(rank, "still_s") for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []
    return max((seconds for seconds in still if seconds is not None), default=0.0)


def _lost(seconds: dict[str, float], attempt: _Attempt, after: _Attempt | None) -> None:
    """Move the time of steps that the next attempt made again to `redone`."""
    resumed = whole(after.start, "start_step") if after is not None else None
    if resumed is None:
        return
    rows = [(step, phases) for _, phases, step in attempt.counted() if step is not None]
    if not rows or rows[-1][0] <= resumed:
        return
    kept = _at_step(rows, resumed, whole(attempt.start, "start_step") or 0)
    for phase, value in rows[-1][1].items():
        name = _CLASS.get(phase, "starting")
        if name != "starting":
            lost = max(value - kept.get(phase, 0.0), 0.0)
            seconds[name] -= lost
            seconds["redone"] += lost


def _at_step(rows: list[tuple[int, dict[str, float]]], step: int, first: int) -> dict[str, float]:
    """Seconds by phase when `step` was done, interpolated between two rows."""
    before: tuple[int, dict[str, float]] = (first, {})
    for number, phases in rows:
        if number > step:
            share = (step - before[0]) / max(number - before[0], 1)
            return {n: before[1].get(n, 0.0) + share * (v - before[1].get(n, 0.0)) for n, v in phases.items()}
        before = (number, phases)
    return before[1]


def _bought(total: Goodput, attempts: Iterable[_Attempt]) -> None:
    """Fill in steps, samples and loss. The rows of a later attempt win."""
    losses: dict[int, Row] = {}
    for attempt in attempts:
        resumed = whole(attempt.start, "start_step") or 0
        losses = {step: row for step, row in losses.items() if step <= resumed}
        told = [row for row in attempt.rows if None not in (row.get("loss"), row.get("step"))]
        losses |= {row["step"]: row for row in told}
    if losses:
        first, last = losses[min(losses)], losses[max(losses)]
        total.steps, total.samples = last["step"], last.get("consumed_samples") or 0
        total.first_loss, total.last_loss = first["loss"], last["loss"]
