"""The monitor under its launcher: a process beside the ranks, restarted when it is lost, never waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from configs.config import Config
from launch.monitor import monitor as module
from launch.monitor.keeper import Keeper
from tests.distributed import tiny
from tests.launch.monitor.node import Node
from tests.machine import patience
from trainer.host import clock
from trainer.host.console import Console
from trainer.host.node_name import node_name
from trainer.life.events import append_row
from trainer.life.rows import read_json


def test_rows_rollups_and_ranks(node: Callable[..., Node]) -> None:
    one = node()
    one.wait_for("ten rows", lambda: len(one.rows()) >= 10)
    one.keeper.stop()
    (head,) = one.rows("node")
    assert (head["version"], head["node"], head["cpus"]) == (1, node_name(), psutil.cpu_count())
    row = one.rows()[-1]
    assert row["attempt"] == 3
    assert row["host"].keys() >= {"cpu_pct", "memory_gib", "swap_gib", "disk_read_mib_s", "network_in_mib_s"}
    (rank,) = row["ranks"]
    assert (rank["rank"], rank["step"], rank["phase"]) == (0, 17, "computing")
    assert rank["memory_gib"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.2)
    (minute,) = one.rows("minute")  # the last one, written at the end
    assert minute["rows"] == len(one.rows())
    assert [e["error"] for e in one.told("no_gpus")] == ["NVML Shared Library Not Found"]


def test_what_the_gpus_did_is_handed_to_rank_0_by_window(
    node: Callable[..., Node], library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("STANDIN_NVML", str(tmp_path / "gpus.txt"))
    (tmp_path / "gpus.txt").write_text("gpus 2\nset nvmlDeviceGetPowerUsage@0 100000\n")
    one = node(window_s=1.0)
    one.wait_for("a row", one.rows)
    other = {"activity_pct": [50.0, 10.0]}
    window = {"kind": "window", "ranks": [], "readings": other}
    append_row(one.folder.gpu / "b.jsonl", window | {"time_s": 1.0, "attempt": 3})  # its clock shows another time
    append_row(one.folder.gpu / "c.jsonl", window | {"time_s": time.time() + 1.0, "attempt": 2})  # an old attempt
    append_row(one.folder.gpu / "d.jsonl", {"kind": "node", "version": 2})
    append_row(one.folder.gpu / "e.jsonl", window | {"time_s": 1.0, "attempt": 3, "readings": [1]})
    one.wait_for("readings", one.folder.readings.exists)
    assert one.told("monitor_lost") == []
    found = read_json(one.folder.readings)
    assert found.keys() == {node_name(), "b"}
    assert found["b"] == other
    assert [e["file"] for e in one.told("bad_row")] == [str(one.folder.gpu / "e.jsonl")]
    mine = found[node_name()]
    assert mine["power_w"] == [200.75, 100.0]  # mean and lowest of two GPUs
    assert mine.keys() >= {"activity_pct", "sm_pct", "tensor_pct", "memory_gib", "sm_clock_mhz"}
    assert one.rows("window")[-1]["readings"] == mine


def test_it_waits_for_a_run_that_takes_long_to_begin(node: Callable[..., Node]) -> None:
    """Preparing data may take many windows before the folder holds a run."""
    one = node(begun=False, window_s=1.0)
    watched = lambda: (one.heartbeats.monitor() or one.heartbeats.ranks()[0]).beats  # noqa: E731
    one.wait_for("a window and a half", lambda: watched() > 30)
    assert one.told("monitor_lost") == []
    assert not one.folder.gpu.exists()
    one.begin()
    one.wait_for("a window", lambda: one.rows("window"))
    assert one.told("monitor_lost") == []
    assert [e["event"] for e in one.told("no_gpus")] == ["no_gpus"]  # the earlier findings are reported now


def is_over(process: psutil.Process) -> bool:
    """Whether the process has ended. A zombie counts."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_monitor_is_started_again(node: Callable[..., Node], capfd: pytest.CaptureFixture[str]) -> None:
    one = node()
    one.wait_for("a row", one.rows)
    first = one.pid()
    os.kill(first, signal.SIGKILL)
    one.wait_for("another monitor", lambda: one.keeper.process is not None and one.pid() != first)
    before = len(one.rows())
    one.wait_for("its rows", lambda: len(one.rows()) > before + 1)
    assert [e["cause"] for e in one.told("monitor_lost")] == ["signal 9"]
    assert "the monitor was lost (signal 9); started again" in capfd.readouterr().out


def test_a_monitor_that_begins_after_the_clock_was_set_stamps_as_the_launcher_does(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    year_s = 365 * 24 * 3600.0
    monkeypatch.setattr("launch.monitor.keeper.booted_s", lambda: clock.booted_s() - year_s)
    one = node()
    one.wait_for("two rows", lambda: len(one.rows()) > 1)
    (begun,) = one.rows("node")
    for row in (begun, *one.rows(), *one.told("no_gpus")):
        assert row["time_s"] == pytest.approx(clock.now_s() - year_s, abs=60)


def test_a_monitor_that_stands_still_is_replaced(node: Callable[..., Node]) -> None:
    one = node()
    one.wait_for("a row", one.rows)
    first = psutil.Process(one.pid())
    first.suspend()
    one.keeper._silent_s = 1.0
    one.wait_for("its loss", lambda: one.told("monitor_lost"))
    one.keeper._silent_s = 60.0
    one.wait_for("another monitor", lambda: one.keeper.process is not None and one.pid() != first.pid)
    assert [e["cause"] for e in one.told("monitor_lost")] == ["silent for 1 s"]
    one.wait_for("the end of the first", lambda: is_over(first))


@pytest.mark.parametrize(("stopped", "within_s"), [(False, 1.0), (True, 3.0)])
def test_ending_it_takes_no_time(stopped: bool, within_s: float, node: Callable[..., Node]) -> None:
    """Even when the monitor hangs."""
    one = node()
    one.wait_for("a row", one.rows)
    process = psutil.Process(one.pid())
    if stopped:
        process.suspend()
    began = time.monotonic()
    one.keeper.stop()
    assert time.monotonic() - began < patience(within_s)
    psutil.wait_procs([process], timeout=patience(1.0))
    assert is_over(process)


def test_a_second_monitor_of_a_node_leaves(node: Callable[..., Node], capfd: pytest.CaptureFixture[str]) -> None:
    one = node()
    one.wait_for("a row", one.rows)
    local = one.folder.root / "other"
    local.mkdir()
    config = Config.model_validate({**tiny(local), "monitor": {"interval_s": 0.05}})
    second = Keeper(config, one.folder, one.heartbeats, local, Console(rank=0), one.events)
    second._start()  # `start` would clear the first one's records
    deadline = time.monotonic() + patience(20.0)
    while second.process is not None and time.monotonic() < deadline:
        second.poll()
        time.sleep(0.01)
    assert second._taken
    assert one.told("monitor_lost") == []
    assert "another monitor writes" in capfd.readouterr().out
    before = len(one.rows())
    one.wait_for("more rows", lambda: len(one.rows()) > before + 2)


class Clock:
    """Stands in for `time`: the third look comes an hour later."""

    def __init__(self) -> None:
        self.looks = 0

    def monotonic(self) -> float:
        return time.monotonic() + (3600.0 if self.looks >= 3 else 0.0)


def test_a_pause_and_a_clock_that_jumps_are_said(node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one = node(interval_s=0.05)
    one.keeper.stop()
    clock, real = Clock(), time.time

    def ended(wait_s: float) -> bool:
        clock.looks += 1
        return clock.looks > 7

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(time, "time", lambda: real() + (500.0 if clock.looks >= 5 else 0.0))
    monkeypatch.setattr(module, "_ended", ended)
    module.Monitor(one.keeper._orders, one.heartbeats).run()
    assert [round(e["seconds"] / 100) for e in one.told("monitor_paused")] == [36]
    assert [round(e["seconds"] / 100) for e in one.told("clock_jumped")] == [5]
    assert one.told("hang") == []


def test_signals_to_the_whole_step_leave_it_alone(node: Callable[..., Node]) -> None:
    one = node()
    one.wait_for("a row", one.rows)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        os.kill(one.pid(), number)
    before = len(one.rows())
    one.wait_for("more rows", lambda: len(one.rows()) > before + 2)
    assert one.told("monitor_lost") == []


def test_nothing_is_written_before_there_is_a_run(node: Callable[..., Node]) -> None:
    """A mistake in the config leaves the folder unchanged."""
    one = node()
    one.keeper.stop()
    one.folder.config.unlink()
    for path in [*one.folder.gpu.glob("*"), *one.folder.events.glob("*")]:
        path.unlink()
    one.keeper.start()
    time.sleep(1.0)
    assert [p.name for p in one.folder.root.rglob("*") if p.is_file()] == []
    one.folder.config.write_text("run: {}\n")
    one.wait_for("rows", one.rows)
    assert one.told("no_gpus")


def test_it_dies_with_its_launcher(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom launch.monitor.keeper import *\n"
        "from configs.load import load\nfolder = RunFolder(Path(sys.argv[1]))\nbeats = Heartbeats.make(1)\n"
        "keeper = Keeper(load('demo', []), folder, beats, folder.root, Console(0), Events(folder, 'a', 'launcher'))\n"
        "keeper.start()\nprint(keeper.process.pid, flush=True)\ntime.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    monitor = psutil.Process(int(launcher.stdout.readline()))
    time.sleep(1.0)
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    monitor.wait(5)
