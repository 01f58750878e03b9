"""gpu/<node>.jsonl is bounded, whole after a crash, and written by one monitor. Also the rollup per minute."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from launch.monitor.journal import Journal, Taken
from launch.monitor.rollup import Minute
from trainer.life.rows import read_rows


def row(kind: str, number: int, size: int = 100) -> dict[str, Any]:
    return {"kind": kind, "time_s": float(number), "text": "x" * size}


def test_it_never_grows_past_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "a.jsonl"
    journal = Journal(path, {"node": "a"}, 20_000)
    largest = 0
    for number in range(1000):
        journal.write(row("minute" if number % 10 == 0 else "second", number))
        largest = max(largest, path.stat().st_size)
    assert 15_000 < largest <= 20_000
    rows = read_rows(path)
    assert [r["kind"] for r in rows].count("node") == 1
    assert rows[0] == {"kind": "node", "version": 1, "node": "a"}
    seconds = [r["time_s"] for r in rows if r["kind"] == "second"]
    minutes = [r["time_s"] for r in rows if r["kind"] == "minute"]
    assert seconds == sorted(seconds)
    assert max(seconds) == 999.0
    assert minutes == sorted(minutes)
    assert minutes[0] < seconds[0] - 200  # rollups are kept longer than seconds
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


def test_a_row_cut_in_half_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"kind": "second", "time_s": 1.0}\n{"kind": "second", "ti')
    Journal(path, {"node": "a"}, 20_000).write(row("second", 2))
    assert [r.get("time_s") for r in read_rows(path)] == [1.0, None, 2.0]


def hold(path: Path, ready: Any, end: Any) -> None:
    Journal(path, {}, 20_000)
    ready.set()
    end.wait(30)


def test_two_monitors_of_one_node(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    first = context.Process(target=hold, args=(path, ready, end))
    first.start()
    try:
        assert ready.wait(10)
        with pytest.raises(Taken, match=r"a\.jsonl"):
            Journal(path, {}, 20_000)
    finally:
        end.set()
        first.join(10)
    Journal(path, {}, 20_000).write(row("second", 1))


def test_a_full_disk_loses_rows_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", {}, 20_000)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file)  # no lock on /dev/full itself: every process of this machine shares it
    os.close(full)
    journal.write(row("second", 1))


def test_a_minute_holds_mean_lowest_and_highest() -> None:
    minute = Minute()
    for number, power in enumerate([100.0, 300.0, 200.0, 200.0]):
        throttled = ["hw_thermal"] if number == 1 else []
        gpu = {"uuid": "GPU-1", "index": 3, "power_w": power, "throttled": throttled, "processes": [{"pid": 1}]}
        ranks = [{"rank": 5, "step": 10 + number, "phase": "computing", "cpu_pct": 50.0}]
        minute.add({"host": {"cpu_pct": 10.0 * number}, "gpus": [gpu], "ranks": ranks})
    rolled = minute.row()
    assert json.loads(json.dumps(rolled)) == rolled
    assert rolled["rows"] == 4
    assert rolled["host"] == {"cpu_pct": [15.0, 0.0, 30.0]}
    (gpu,) = rolled["gpus"]
    assert gpu == {"uuid": "GPU-1", "index": 3, "power_w": [200.0, 100.0, 300.0], "throttled": {"hw_thermal": 0.25}}
    assert rolled["ranks"] == [{"rank": 5, "steps": [10, 13], "cpu_pct": [50.0, 50.0, 50.0]}]
