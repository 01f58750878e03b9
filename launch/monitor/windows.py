"""Looks at each window of a node. Names slow ranks and idle ones, once until that changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.schema.monitor import MonitorSection
from launch.monitor.others import Others
from launch.monitor.rollup import Minute
from launch.monitor.slow import RankWindow, idle, is_training, rank_window, stragglers
from trainer.life.events import tolerate_unwritable
from trainer.life.folder import write_json
from trainer.life.heartbeat import Beat

Tell = Callable[..., None]
_READINGS = ("sm_pct", "tensor_pct", "dram_pct", "gpu_pct", "memory_gib", "power_w", "temperature_c", "sm_clock_mhz")


class Windows:
    """Call `add` for each row. Other nodes' windows come from their files, since the median is that of all ranks."""

    def __init__(self, settings: MonitorSection, node: str, folder: Path, others: Others, tell: Tell) -> None:
        self._settings, self._node, self._folder, self._tell = settings, node, folder, tell
        self._others = others
        self._slow: set[int] = set()  # ranks that were reported and are still slow
        self._suspected: set[int] = set()  # slow in one window, which may be chance
        self._idle_windows = 0
        self._start()

    def _start(self) -> None:
        self._minute = Minute()
        self._first: dict[int, tuple[Beat, float]] = {}
        self._last: dict[int, tuple[Beat, float]] = {}
        self._began_s: float | None = None

    def add(self, beats: list[Beat], row: dict[str, Any], attempt: int | None) -> dict[str, Any] | None:
        """The window's row, when this row ends the window."""
        now = time.monotonic()
        if self._began_s is None or any(b.rank in self._first and self._first[b.rank][0].pid != b.pid for b in beats):
            self._start()  # new processes: a window holds one life of its ranks
            self._began_s = now
        self._minute.add(row)
        for beat in beats:
            self._first.setdefault(beat.rank, (beat, now))
            self._last[beat.rank] = (beat, now)
        if now - self._began_s < self._settings.window_s:
            return None
        rolled = self._minute.row()
        ranks = self._ranks(row, rolled)
        others = dict(self._others.newest("window", attempt, 2 * self._settings.window_s, _window))
        self._start()
        if ranks and all(is_training(rank) and rank.steps > 0 for rank in ranks):
            self._name_slow(ranks, [rank for other_ranks, _ in others.values() for rank in other_ranks])
            self._name_idle(ranks)
        window = {"ranks": [asdict(rank) for rank in ranks], "readings": readings(ranks, rolled["gpus"])}
        if any(rank.rank == 0 for rank in ranks):  # rank 0's node writes the readings of all nodes
            with tolerate_unwritable():
                nodes = {self._node: window["readings"], **{node: told for node, (_, told) in others.items()}}
                write_json(self._folder / "readings.json", dict(sorted(nodes.items())))
        return window

    def _ranks(self, row: dict[str, Any], rolled: dict[str, Any]) -> list[RankWindow]:
        by_rank = {values["rank"]: values for values in rolled["ranks"]}
        gpus = {values["uuid"]: values for values in rolled["gpus"]}
        found = []
        for place, values in enumerate(row["ranks"]):
            rank = values["rank"]
            # Local rank i computes on the job's i-th GPU of the node.
            gpu = gpus.get(row["gpus"][place]["uuid"]) if place < len(row["gpus"]) else None
            if rank in self._first and self._last[rank][1] > self._first[rank][1]:
                both = {"rank": by_rank[rank], "gpu": gpu}
                found.append(rank_window(self._first[rank], self._last[rank], self._node, both))
        return found

    def _name_slow(self, ranks: list[RankWindow], others: list[RankWindow]) -> None:
        mine = {rank.rank for rank in ranks}
        everywhere = ranks + [rank for rank in others if is_training(rank)]
        found = [one for one in stragglers(everywhere, self._settings.slow_share) if one[0].rank in mine]
        for rank, times, why in found:
            if rank.rank in self._suspected and rank.rank not in self._slow:
                self._slow.add(rank.rank)
                where = f"rank {rank.rank} on {rank.node}" + (f" ({rank.gpu})" if rank.gpu else "")
                line = f"slow: {where} needs {times:.1f} times what the others need: {why or 'no reason is known'}"
                facts = {"rank": rank.rank, "node": rank.node, "gpu": rank.gpu, "times": round(times, 2), "why": why}
                self._tell("slow_rank", line, **facts)
        self._suspected = {rank.rank for rank, _, _ in found}
        self._slow &= self._suspected

    def _name_idle(self, ranks: list[RankWindow]) -> None:
        found = idle(ranks, self._settings.idle_pct)
        self._idle_windows = self._idle_windows + 1 if found else 0
        if found is not None and self._idle_windows == self._settings.idle_windows:
            activity, why = found
            seconds = self._settings.window_s * self._settings.idle_windows
            names = sorted({name for rank in ranks for name in rank.phases_pct})
            shares = {n: round(sum(r.phases_pct.get(n, 0.0) for r in ranks) / len(ranks), 1) for n in names}
            line = f"idle: {activity:.0f} % active over {seconds:g} s: {why}"
            self._tell("idle", line, activity_pct=round(activity, 1), seconds=seconds, why=why, phases_pct=shares)


def readings(ranks: list[RankWindow], gpus: list[dict[str, Any]]) -> dict[str, list[float]]:
    """(mean, lowest) over the node's ranks and GPUs of the values that show how hard they work. `gpus` are rollups."""
    found = {"activity_pct": [rank.activity_pct for rank in ranks if rank.activity_pct is not None]}
    found |= {name: [gpu[name][0] for gpu in gpus if name in gpu] for name in _READINGS}
    return {name: [round(sum(each) / len(each), 3), round(min(each), 3)] for name, each in found.items() if each}


def _window(row: dict[str, Any]) -> tuple[list[RankWindow], dict[str, list[float]]]:
    """The ranks and readings of another node's window."""
    told = {str(name): [float(mean), float(lowest)] for name, (mean, lowest) in row["readings"].items()}
    return [RankWindow(**values) for values in row["ranks"]], told
