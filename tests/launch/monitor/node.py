"""A node of a run as its launcher sees it, with one rank that is the test's own process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.config import Config
from launch.monitor.keeper import Keeper
from tests.distributed import tiny
from tests.machine import patience
from trainer.host.console import Console
from trainer.host.node_name import node_name
from trainer.life.events import Events
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Heartbeat, Heartbeats, Phase
from trainer.life.rows import read_rows


class Node:
    """A node of a run, with a launcher's side and one rank that is this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, begun: bool = True, **settings: Any) -> None:
        self.folder = RunFolder(folder / "run")
        self.folder.root.mkdir()
        if begun:
            self.begin()
        self.heartbeats = Heartbeats.make(2)
        self.events = Events(self.folder, node_name(), "launcher")
        config = Config.model_validate({**tiny(folder), "monitor": {"interval_s": 0.05, **settings}})
        local = folder / "local"
        local.mkdir()
        self.keeper = Keeper(config, self.folder, self.heartbeats, local, Console(rank=0), self.events)
        self.keeper.start()
        self.rank = Heartbeat.at(self.heartbeats.path, 0, rank=0)
        self.rank.attempt = 3
        self.rank.enter(Phase.COMPUTING, 17)

    def begin(self) -> None:
        """From now on the folder holds a run."""
        self.folder.config.write_text("run: {}\n")

    def rows(self, kind: str = "second") -> list[dict[str, Any]]:
        return [row for row in read_rows(self.folder.gpu / f"{node_name()}.jsonl") if row["kind"] == kind]

    def told(self, event: str) -> list[dict[str, Any]]:
        rows = read_rows(self.events.path) + read_rows(self.folder.events / f"{node_name()}-monitor.jsonl")
        return [row for row in rows if row["event"] == event]

    def wait_for(self, what: str, condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + patience(timeout_s)
        while not condition():
            assert time.monotonic() < deadline, f"no {what}"
            self.keeper.poll()
            time.sleep(0.01)

    def pid(self) -> int:
        assert self.keeper.process is not None
        return self.keeper.process.pid
