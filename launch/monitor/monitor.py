"""The monitor's loop: read everything, write a row, and once a minute a rollup."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.schema.monitor import MonitorSection
from launch.hooks import Hooks
from launch.monitor.ask import STOPPED, ask, stacks_of, wake
from launch.monitor.gpus import Gpus
from launch.monitor.hang import HangWatch, culprits, describe, share
from launch.monitor.host import Host, Processes
from launch.monitor.journal import Journal
from launch.monitor.keeper import Orders
from launch.monitor.others import Others
from launch.monitor.prometheus import Endpoint
from launch.monitor.rollup import Minute
from launch.monitor.windows import Windows
from trainer.host import clock
from trainer.host.node_name import node_name
from trainer.host.terminal import say
from trainer.life.attempts import Attempt, End
from trainer.life.events import Events, tolerate_unwritable
from trainer.life.folder import RunFolder, write_json
from trainer.life.heartbeat import Beat, Heartbeat, Heartbeats, Phase
from trainer.life.rows import facts_in

ROLLUP_S = 60.0
ALERTS = {"hang", "slow_rank", "idle", "gpu_lost", "driver_gone"}  # the events that the user's hooks get
_OTHERS_S = 30.0  # the highest age of another node's newest row that still counts
_FIRST_NODE_S = 20.0  # time for the first node to collect all findings, and to call the user's hooks
_WAKE_S = 5.0  # time for ranks that had been stopped to tell where they were
_PAUSE_S = 10.0  # between two rows, before the pause is reported


class Monitor:
    """Watches one node of a run until its standard input ends: its launcher closed it, or is gone."""

    def __init__(self, orders: Orders, heartbeats: Heartbeats) -> None:
        self.folder, self.heartbeats = RunFolder(Path(orders.run)), heartbeats
        self.settings = settings = MonitorSection.model_validate(orders.settings)
        self._verdict = Path(orders.verdict)
        self.hang = HangWatch(orders.hang_s, orders.patient_s, settings.interval_s)
        self.own = Heartbeat.at(heartbeats.path, heartbeats.places - 1, rank=-1)
        self.events = Events(self.folder, node_name(), "monitor")
        self.hooks = Hooks(settings.hook, settings.webhook, self._print)
        self.journal: Journal | None = None
        self._untold: list[tuple[str, str | None, dict[str, Any]]] = []
        self.host, self.processes = Host(self.tell), Processes()
        self.gpus = Gpus(self.tell, settings.gpm)
        self.minute = Minute()
        self.others = Others(self.folder.gpu, node_name(), self.tell)
        self.windows = Windows(settings, node_name(), self.folder.gpu, self.others, self.tell)
        self.endpoint = self._endpoint(settings.prometheus_port)

    def _endpoint(self, port: int | None) -> Endpoint | None:
        if port is None:
            return None
        host = self.settings.prometheus_host
        try:
            return Endpoint(host, port, self.folder, node_name())
        except OSError as error:
            line = f"no endpoint for Prometheus at {host}:{port}: {error.strerror or error}; the run goes on without"
            self.tell("no_prometheus", line, address=f"{host}:{port}", error=error.strerror or str(error))
            return None

    def tell(self, event: str, line: str | None, **facts: Any) -> None:
        """Record an event, and print a line for people. Both wait until the run folder holds a run."""
        if self.journal is None:
            self._untold.append((event, line, facts))
            return
        self.events.write(event, **facts)
        if line is not None:
            self._print(line)
        if event in ALERTS:
            run = {"run": self.folder.root.name, "folder": str(self.folder.root), "node": node_name()}
            self.hooks.tell({"event": event, "text": f"{self.folder.root.name}: {line}", **run, **facts})

    def _print(self, line: str) -> None:
        say(f"{node_name()}: {line}")

    def _begin(self) -> None:
        """Begin to write rows. Before this, a mistake in the config must leave the folder unchanged."""
        head = {
            "time_s": round(clock.now_s(), 3),
            "node": node_name(),
            "interval_s": self.settings.interval_s,
            "cpus": self.host.cpus,
            "driver": self.gpus.driver,
            "gpus": self.gpus.names(),
        }
        self.journal = Journal(self.folder.gpu / f"{node_name()}.jsonl", head, self.settings.most_mib * 2**20)
        for event, line, facts in self._untold:
            self.tell(event, line, **facts)
        self._untold = []

    def run(self) -> None:
        began = last = time.monotonic()
        watch = clock.Watch()
        rolled = began
        due = began
        while True:
            now = time.monotonic()
            if now - last > max(_PAUSE_S, 3 * self.settings.interval_s):
                seconds = round(now - last, 1)
                self.tell("monitor_paused", f"the monitor stood still for {seconds} s", seconds=seconds)
            if (jumped_s := watch.jumped_s()) is not None:
                line = f"the clock of this node jumped by {jumped_s:+,.1f} s; the run's times go on without this jump"
                self.tell("clock_jumped", line, seconds=round(jumped_s, 1), node=node_name())
            last = now
            if self.tick():
                break
            if now - rolled >= ROLLUP_S:
                self._roll_up()
                rolled = now
            due = max(due + self.settings.interval_s, now)  # missed rows are not made up for
            if _ended(max(due - time.monotonic(), 0.0)):
                break
        self._roll_up()

    def tick(self) -> bool:
        """Write one row. Returns whether the attempt hung and was ended."""
        self.own.beat()
        beats = [beat for beat in self.heartbeats.ranks() if beat is not None]
        self.events.attempt = max((beat.attempt for beat in beats if beat.attempt >= 0), default=None)
        values = {
            "host": self.host.read(),
            "gpus": self.gpus.read(),
            "ranks": [self._rank(beat) for beat in beats],
        }
        if self.journal is None and self.folder.config.exists():
            self._begin()
        self.minute.add(values)
        self._write("second", values)
        if self.endpoint is not None:
            self.endpoint.show({"time_s": round(clock.now_s(), 3), "attempt": self.events.attempt, **values})
        beats = [beat for beat in beats if beat.attempt >= 0]
        if self.journal is not None:  # not before there is a folder to write to
            window = self.windows.add(beats, values, self.events.attempt)
            if window is not None:
                self._write("window", window)
        hangs = self.hang.look(beats, time.monotonic()) and not self._others_take_time()
        return hangs and self._end_hang(beats)

    def _rank(self, beat: Beat) -> dict[str, Any]:
        still_s = round(time.monotonic() - beat.time_s, 2)
        row = {"rank": beat.rank, "step": beat.step, "phase": beat.phase.word, "still_s": still_s}
        return row | self.processes.read(beat)

    def _others_take_time(self) -> bool:
        """Whether a rank of another node is in a phase that may take long: the ranks here then wait for it rightly."""

        def takes_time(row: dict[str, Any]) -> bool:
            return any(not self.hang.may_hang(Phase[r["phase"].upper()], float(r["still_s"])) for r in row["ranks"])

        return any(found for _, found in self.others.newest("second", self.events.attempt, _OTHERS_S, takes_time))

    def _end_hang(self, beats: list[Beat]) -> bool:
        """Ask every rank where it is, name the culprit, and make the launcher end the attempt. Returns whether it is a
        hang.

        The first node writes how the attempt ended, and the others wait for that. Ranks that lose their peers fail
        within milliseconds, and would otherwise write that as the cause."""
        if self.journal is None:
            self._begin()
        attempt = Attempt(self.folder, max(beat.attempt for beat in beats))
        found = ask(beats, node_name(), attempt.path)
        if all(standstill.gone for standstill in found):
            return False  # the launcher sees this itself; it just has not ended yet
        hosts = facts_in(attempt.path / "start.json").get("hosts")
        nodes = [str(host) for host in hosts] if isinstance(hosts, list) else [node_name()]
        known = share(found, attempt.path, node_name(), nodes)
        wake(found, attempt.path)
        line, facts = describe(*culprits(known))
        if node_name() == min(standstill.node for standstill in known):
            self.tell("hang", f"{line}; stacks of all ranks: {attempt.path}", **facts)
            woken = [stacks_of(standstill.rank, attempt.path) for standstill in known if standstill.state == STOPPED]
            _wait_for(lambda: all(path.exists() for path in woken), _WAKE_S)
            self.hooks.wait()  # after this the launchers end everything
            with tolerate_unwritable():
                attempt.write_end(End("failed", *self.folder.newest_checkpoint(), requeue=True, cause="hang"))
        else:
            _wait_for(lambda: attempt.end is not None, _FIRST_NODE_S)
        write_json(self._verdict, facts)
        return True

    def _roll_up(self) -> None:
        if self.minute.rows:
            self._write("minute", self.minute.row())
            self.minute = Minute()

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if self.journal is not None:
            head = {"kind": kind, "time_s": round(clock.now_s(), 3), "attempt": self.events.attempt}
            self.journal.write(head | values)


def _wait_for(condition: Callable[[], bool], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _ended(wait_s: float) -> bool:
    """Whether standard input has ended. Waits up to `wait_s` for that."""
    ready, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)
