"""A profile on request: a trace of a few steps of chosen ranks, asked for by the config or by a file PROFILE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from configs.config import Config
from trainer.host.console import Console
from trainer.life.attempts import Attempt
from trainer.life.events import Events
from trainer.life.heartbeat import Phase
from trainer.ranks.world import World

ASKED_STEPS = 3  # that a file PROFILE gets
_SNAPSHOT_ENTRIES = 100_000
_TABLE_ROWS = 40


class Profiling:
    """All ranks follow the same steps; those of `monitor.profile_ranks` write what they see to the attempt's folder."""

    def __init__(self, config: Config, world: World, attempt: Attempt, events: Events, console: Console) -> None:
        self._config, self._world, self._attempt = config.monitor, world, attempt
        self._events, self._console = events, console
        self._file = attempt.folder.profile
        self._last: int | None = None  # step that ends the profile that runs now
        self._first = 0
        self._profile: profile | None = None
        self._file_seen = False

    def look(self) -> None:
        """Look for the file PROFILE. Rank 0 alone does, from a thread: the folder may be slow to answer."""
        self._file_seen = self._world.first and self._file.is_file()

    def asked(self) -> bool:
        """Whether a person asks now, as rank 0 saw it last; a reduction tells the others."""
        return self._file_seen and self._last is None

    def after_step(self, step: int, asked: bool) -> None:
        """Begin or end a profile between two steps. `asked` is the same on all ranks."""
        if self._last is not None and step >= self._last:
            self._end()
        if self._last is None and asked:
            if self._world.first:
                self._file.unlink(missing_ok=True)
                self._file_seen = False
            self._begin(step + 1, step + ASKED_STEPS)
        elif self._last is None and self._config.profile_steps is not None:
            first, last = self._config.profile_steps
            if first <= step + 1 <= last:
                self._begin(step + 1, last)

    def _begin(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        if self._world.rank not in self._config.profile_ranks:
            return
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        last, self._last = self._last, None
        done, self._profile = self._profile, None
        if done is None:
            return
        with self._world.heartbeat.during(Phase.SAVING):  # a trace may be large
            done.stop()
            name = f"profile-{self._first:08d}-{last:08d}-rank-{self._world.rank:05d}"
            trace = self._attempt.path / f"{name}.json.gz"
            try:
                self._write(done, name, trace)
            except OSError as error:  # a full disk: the run can go on without its profile
                self._events.write("profile_lost", first=self._first, last=last, error=str(error))
                self._console.say(f"the profile of steps {self._first} to {last} is lost: {error}")
                return
        self._events.write("profiled", first=self._first, last=last, trace=trace.name)
        self._console.say(f"profiled steps {self._first} to {last}: {trace}")

    def _write(self, done: profile, name: str, trace: Path) -> None:
        kind = "cuda" if self._world.device.type == "cuda" else "cpu"
        try:
            done.export_chrome_trace(str(trace))
            table = done.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=_TABLE_ROWS)
            (self._attempt.path / f"{name}.txt").write_text(table)
            if kind == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._attempt.path / f"{name}-memory.pickle"))
        finally:
            if kind == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def close(self) -> None:
        """At the end of a run, also in the middle of a profile."""
        if self._last is not None:
            self._last = self._world.heartbeat.step
            self._end()
