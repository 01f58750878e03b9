"""The host's readings, on machines and in containers that do not tell everything."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from launch.monitor.host import Host, Processes
from trainer.life.heartbeat import Beat, Phase

OF = {"cpu": {"cpu_pct"}, "memory": {"memory_gib"}, "network": {"network_in_mib_s", "network_out_mib_s"}}


@pytest.mark.parametrize("damage", ["", "nonsense\n" * 3])
@pytest.mark.parametrize(("name", "reading"), [("stat", "cpu"), ("meminfo", "memory"), ("net/dev", "network")])
def test_one_reading_that_fails_takes_no_other(
    name: str, reading: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net").mkdir()
    for each in ("stat", "meminfo", "vmstat", "diskstats", "net/dev"):
        shutil.copyfile(f"/proc/{each}", tmp_path / each)
    (tmp_path / name).write_text(damage) if damage else (tmp_path / name).unlink()
    told: list[dict[str, Any]] = []
    host = Host(lambda event, line, **facts: told.append({"event": event, **facts}))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    host.read()
    time.sleep(0.02)
    values = host.read()
    others = set.union(*(names for other, names in OF.items() if other != reading)) - {"cpu_pct"}
    assert values.keys() >= others
    assert not values.keys() & OF[reading]
    left_out = {"memory", "swap"} if reading == "memory" else {reading}
    assert [e["event"] for e in told] == ["reading_left_out"] * len(left_out)  # once, although it was read twice
    assert {e["reading"] for e in told} == left_out


def test_a_process_whose_kernel_counts_no_waiting_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Beat(os.getpid(), 0, 0, Phase.COMPUTING, 1, 1, 0.0, 0.0, (0.0,) * len(Phase))
    real = open

    def without_schedstat(path: Any, *rest: Any, **more: Any) -> Any:
        if str(path).endswith("schedstat"):
            raise FileNotFoundError(path)
        return real(path, *rest, **more)

    monkeypatch.setattr("builtins.open", without_schedstat)
    row = Processes().read(beat)
    assert "gone" not in row
    assert row["memory_gib"] > 0


class Times(NamedTuple):
    """Times that a real machine gave: all time less the idle time ran backwards in every eighth row."""

    idle: float
    user: float = 15386.51
    nice: float = 484.02
    system: float = 3247.8
    iowait: float = 109.29
    irq: float = 0.0
    softirq: float = 111.39
    steal: float = 13.02
    guest: float = 0.0


def test_an_idle_machine_is_at_0_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(1000))
    host = Host(lambda *words, **facts: None)
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(idle=2820.51 + 0.01 * next(moments)))
    assert "cpu_pct" not in host.read()
    assert [host.read().get("cpu_pct") for _ in range(500)] == [0.0] * 500
