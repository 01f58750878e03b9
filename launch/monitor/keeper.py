"""The launcher's side of the monitor: starts it, restarts it when it is lost, ends it, and never waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.config import Config
from launch.monitor.hang import read_verdict
from trainer.host.clock import booted_s
from trainer.host.console import Console
from trainer.host.environment import MUSTER_CLOCK
from trainer.host.shadow import python
from trainer.life.events import Events
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Heartbeats

TAKEN = 4  # exit code: another monitor of this node writes the same file
_SILENT_S = 60.0  # without a beat, in addition to its interval
_END_S = 2.0  # time to write its last row
_LONGEST_WAIT_S = 60.0  # before the monitor is restarted


@dataclass(frozen=True)
class Orders:
    """The arguments that a monitor is started with."""

    run: str
    verdict: str
    heartbeats: str  # path of the node's records
    launcher: int  # pid of the launcher; the monitor ends when the launcher does
    settings: dict[str, Any]
    hang_s: float
    patient_s: float

    @classmethod
    def of(cls, config: Config, folder: RunFolder, verdict: Path, heartbeats: Heartbeats) -> Orders:
        # Shorter than the ranks' own time-out: after that there would be no stacks to look at.
        hang_s = config.monitor.hang_s or 0.8 * config.parallel.step_timeout_s
        settings = config.monitor.model_dump(mode="json")
        patient_s = config.parallel.load_timeout_s
        return cls(str(folder.root), str(verdict), heartbeats.path, os.getpid(), settings, hang_s, patient_s)

    def text(self) -> str:
        return json.dumps(asdict(self))


class Keeper:
    """Keeps one monitor alive between `start` and `stop`."""

    def __init__(
        self, config: Config, folder: RunFolder, heartbeats: Heartbeats, local: Path, console: Console, events: Events
    ) -> None:
        self.settings, self.heartbeats = config.monitor, heartbeats
        self.hang: dict[str, Any] | None = None  # what the monitor found, if it found a hang
        self._verdict = local / "hang"
        self._orders = Orders.of(config, folder, self._verdict, heartbeats)
        self.console, self.events = console, events
        self.process: subprocess.Popen[bytes] | None = None
        self._silent_s = _SILENT_S + self.settings.interval_s
        self._losses = 0
        self._started_s = self._next_s = self._beat_s = 0.0
        self._beats = -1
        self._taken = False

    def start(self) -> None:
        """Begin to watch. Clears the ranks' heartbeat records."""
        self.heartbeats.clear()
        self._verdict.unlink(missing_ok=True)
        self.hang = None
        if self.settings.enabled and not self._taken:
            self._start()

    def _start(self) -> None:
        command = [*python(), "-m", "launch.monitor", self._orders.text()]
        # Pass on the launcher's clock. The monitor's own could be years off, after the time of day was set.
        environment = {**os.environ, MUSTER_CLOCK.name: f"{booted_s():.6f}"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        self._started_s = self._beat_s = time.monotonic()
        self._beats = -1

    def poll(self) -> bool:
        """Whether the attempt hangs and must be ended. Cheap enough for every turn of the launcher's loop."""
        self.hang = self.hang or read_verdict(self._verdict)
        if self.hang is None:
            self._look_after()
        return self.hang is not None

    def _look_after(self) -> None:
        now = time.monotonic()
        if self.process is None:
            if self._losses and not self._taken and now >= self._next_s:
                self._start()
            return
        status = self.process.poll()
        if status is not None:
            self._lost(f"signal {-status}" if status < 0 else f"exit code {status}", status)
            return
        beat = self.heartbeats.monitor()
        if beat is not None and beat.beats != self._beats:
            self._beats, self._beat_s = beat.beats, now
        elif now - self._beat_s > self._silent_s:
            self._lost(f"silent for {self._silent_s:g} s", None)

    def _lost(self, cause: str, status: int | None) -> None:
        self.stop()
        if status == TAKEN:  # the monitor has reported it
            self._taken = True
            return
        lived_s = time.monotonic() - self._started_s
        self._losses = self._losses + 1 if lived_s < _LONGEST_WAIT_S else 1
        wait_s = min(2.0 ** (self._losses - 1) - 1, _LONGEST_WAIT_S)  # at once the first time
        self._next_s = time.monotonic() + wait_s
        self.events.write("monitor_lost", cause=cause, again_in_s=wait_s)
        self.console.say(f"the monitor was lost ({cause}); started again" + (f" in {wait_s:g} s" if wait_s else ""))

    def stop(self) -> None:
        """End the monitor: close its input, and kill it when it does not react."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
