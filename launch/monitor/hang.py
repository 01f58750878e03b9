"""The hang watch: which rank has stood still for too long, and which one caused it.

When one rank hangs, all others soon wait for it. Then every rank stands still, and only one of them is the culprit.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.monitor.ask import STOPPED, Standstill
from trainer.life.events import tolerate_unwritable
from trainer.life.folder import write_json
from trainer.life.heartbeat import Beat, Phase
from trainer.life.rows import facts_in, read_json, record

_NODES_S = 10.0  # how long the other nodes' findings may take to arrive


class HangWatch:
    """Call `look` for each row. Only time when the monitor was awake counts: a suspended node has not hung."""

    def __init__(self, hang_s: float, patient_s: float, interval_s: float) -> None:
        patient = dict.fromkeys((Phase.STARTING, Phase.COMPILING, Phase.SAVING, Phase.LEAVING), max(patient_s, hang_s))
        self._limits: dict[Phase, float] = {phase: patient.get(phase, hang_s) for phase in Phase}
        self._limits[Phase.PREPARING] = float("inf")
        self._longest_s = max(3 * interval_s, 2.0)
        self._beats: dict[int, tuple[int, int]] = {}
        self._still: dict[int, float] = {}
        self._looked_s: float | None = None

    def look(self, beats: list[Beat], now: float) -> bool:
        """Whether a rank has stood still longer than its phase allows, and no rank is in a phase that may take long."""
        passed = min(now - self._looked_s, self._longest_s) if self._looked_s is not None else 0.0
        self._looked_s = now
        for beat in beats:
            if self._beats.get(beat.rank) == (beat.pid, beat.beats):
                self._still[beat.rank] += passed
            else:
                self._still[beat.rank] = 0.0
            self._beats[beat.rank] = (beat.pid, beat.beats)
        over = [beat for beat in beats if self._still[beat.rank] > self._limits[beat.phase]]
        return bool(over) and all(self.may_hang(b.phase, self._still[b.rank]) for b in beats)

    def may_hang(self, phase: Phase, still_s: float) -> bool:
        """Whether a rank may hang: not while it is within the limit of a phase that may take long."""
        return self._limits[phase] <= self._limits[Phase.COMPUTING] or still_s > self._limits[phase]


def culprits(found: list[Standstill]) -> tuple[list[Standstill], str]:
    """(the ranks that the others wait for, the reason). All ranks when nothing tells them apart."""
    for why, guilty in (
        ("its process is gone", [s for s in found if s.gone]),
        ("its process was stopped", [s for s in found if s.state in (STOPPED, "t")]),
        ("it waits for a device", [s for s in found if s.state == "D"]),
        ("it is at an earlier step", [s for s in found if s.step < max(o.step for o in found)]),
        ("the others wait in a collective", [s for s in found if s.waits is False]),
        ("it made fewer collectives", _fewest(found)),
    ):
        if 0 < len(guilty) < len(found) or (guilty and len(found) == 1):
            return guilty, why
    return found, "nothing tells the ranks apart"


def _fewest(found: list[Standstill]) -> list[Standstill]:
    known = [s.collectives for s in found if s.collectives is not None]
    return [s for s in found if s.collectives == min(known)] if len(known) == len(found) and known else []


def share(found: list[Standstill], attempt: Path, node: str, nodes: list[str]) -> list[Standstill]:
    """Write down this node's findings, and wait a while for those of the other nodes. Returns all that the folder then
    holds: the findings of a node whose monitor died are missing."""
    with tolerate_unwritable():  # on a full disk the hang must still be ended
        write_json(attempt / f"hang-{node}.json", [asdict(standstill) for standstill in found])
    deadline = time.monotonic() + _NODES_S
    while True:
        known = [read_json(attempt / f"hang-{other}.json") for other in nodes if other != node]
        if all(rows is not None for rows in known) or time.monotonic() > deadline:
            return found + [standstill for rows in known for standstill in _standstills(rows)]
        time.sleep(0.2)


def _standstills(rows: Any) -> list[Standstill]:
    """What another node found; empty when its file is missing or holds something else."""
    return [one for row in (rows if isinstance(rows, list) else []) if (one := record(Standstill, row)) is not None]


def describe(guilty: list[Standstill], why: str) -> tuple[str, dict[str, Any]]:
    """(a line for people, facts for the event)."""
    facts = {"why": why, "ranks": [asdict(s) for s in guilty]}
    if len(guilty) > 3:
        return f"hang: all {len(guilty)} ranks stand still: {why}", facts
    each = "; ".join(
        f"rank {s.rank} on {s.node} ({s.phase}, step {s.step}, still for {s.still_s:g} s"
        + (f", at {s.place})" if s.place else ")")
        for s in guilty
    )
    return f"hang: {each}: {why}", facts


def read_verdict(path: Path) -> dict[str, Any] | None:
    """What the monitor left for the launcher when it must end the attempt."""
    return facts_in(path) or None
