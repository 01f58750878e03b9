"""Heartbeats: written by a rank, read by another process, and gone with the last process that holds them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny, train
from tests.engines import under_both
from tests.machine import patience, takes_at_most
from trainer.host.environment import FromLauncher, Ranks
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import RECORD_BYTES, Heartbeat, Heartbeats, Phase
from trainer.life.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]


def joined(heartbeats: Heartbeats, rank: int) -> Heartbeat:
    unused = Path("/unused")
    launcher = FromLauncher(0.0, 1, "token", unused, unused, unused, Path(heartbeats.path), 0.0)
    return Heartbeat.of(Ranks(rank + 4, 8, rank, 4), launcher)


def test_each_rank_has_a_record_of_its_own() -> None:
    heartbeats = Heartbeats.make(3)
    first, last = (joined(heartbeats, rank) for rank in (0, 2))
    last.attempt = 7
    last.enter(Phase.WAITING_FOR_DATA, step=41)
    zero, one, two = Heartbeats.open(heartbeats.path).ranks()
    assert zero is not None
    assert two is not None
    assert one is None
    assert (zero.pid, zero.rank, zero.attempt, zero.phase, zero.step) == (os.getpid(), 4, -1, Phase.STARTING, 0)
    assert (two.rank, two.attempt, two.phase, two.step) == (6, 7, Phase.WAITING_FOR_DATA, 41)
    assert (zero.beats, two.beats) == (1, 2)
    assert first.seconds().keys() == {"starting"}


def test_every_second_is_in_one_phase() -> None:
    before = time.monotonic()
    heartbeat = Heartbeat()
    after = time.monotonic()
    heartbeat.enter(Phase.COMPUTING, 1)
    time.sleep(0.02)
    with heartbeat.during(Phase.SAVING):
        time.sleep(0.03)
    assert heartbeat.phase is Phase.COMPUTING
    least_s = time.monotonic() - after
    seconds = heartbeat.seconds()
    rounded_s = 0.002  # each to a millisecond
    assert least_s - rounded_s <= sum(seconds.values()) <= time.monotonic() - before + rounded_s
    assert seconds["saving"] >= 0.03
    assert seconds["computing"] >= 0.02


def test_a_reader_never_sees_a_mixture() -> None:
    """The writer, another process, sets its step to the number of its beats."""
    heartbeats = Heartbeats.make(1)
    code = (
        "import sys\nfrom trainer.life.heartbeat import *\nh = Heartbeat.at(sys.argv[1], 0, 0)\n"
        "while True:\n    h.enter(Phase.COMPUTING, h._beats + 1)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, heartbeats.path], cwd=ROOT)
    try:
        seen = set()
        deadline = time.monotonic() + 20
        while len(seen) < 2000 and time.monotonic() < deadline:
            (beat,) = heartbeats.ranks()
            if beat is not None and beat.phase is Phase.COMPUTING:
                assert beat.step == beat.beats
                seen.add(beat.beats)
    finally:
        writer.kill()
        writer.wait()
    assert len(seen) == 2000


def test_a_mixture_is_not_believed() -> None:
    """A writer may stop in the middle of a write. Then its last whole record counts."""
    heartbeats = Heartbeats.make(1)
    heartbeat = joined(heartbeats, 0)
    heartbeat.enter(Phase.COMPUTING, 7)
    before = heartbeats.ranks()
    with open(heartbeats.path, "r+b") as file:
        file.seek(24)
        file.write(b"\x09")  # another step, and the old checksum
    assert heartbeats.ranks() == before
    heartbeat.enter(Phase.SAVING)
    (beat,) = heartbeats.ranks()
    assert beat is not None
    assert beat.phase is Phase.SAVING


def test_nothing_is_left_when_its_maker_is_killed() -> None:
    """The records have no name on any disk. A reader that holds them can still read."""
    code = "from trainer.life.heartbeat import *\nimport time\nprint(Heartbeats.make(2).path, flush=True)\n"
    code += "time.sleep(60)"
    maker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    path = maker.stdout.readline().strip()
    reader = Heartbeats.open(path)
    shm = set(os.listdir("/dev/shm"))
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    assert not os.path.exists(path)
    assert reader.ranks() == [None, None]
    assert {name for name in os.listdir("/dev/shm") if "muster" in name} == {n for n in shm if "muster" in n} == set()


def test_a_beat_costs_microseconds() -> None:
    heartbeat = Heartbeat()

    def beat() -> None:
        for step in range(20_000):
            heartbeat.enter(Phase.COMPUTING, step)

    takes_at_most(20_000 * 20e-6, beat)  # 2 here; a step makes five


@under_both
def test_a_run_says_how_long_each_phase_took(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, train__validate_every_steps=3, **engine)
    assert train(config, 2) == [0, 0]
    folder = RunFolder(Path(config["run"]["dir"]))
    rows = read_rows(folder.metrics)
    sums = [sum(row["phases_s"].values()) for row in rows]
    assert sums == sorted(sums)
    for earlier, later in itertools.pairwise(rows):
        passed = sum(later["phases_s"].values()) - sum(earlier["phases_s"].values())
        assert passed == pytest.approx(later["time_s"] - earlier["time_s"], abs=patience(0.05))
    (ended,) = [event for event in read_events(folder) if event["event"] == "ended"]
    assert ended["phases_s"].keys() >= {"starting", "waiting_for_data", "computing", "saving", "validating"}


def test_records_do_not_share_a_cache_line() -> None:
    assert RECORD_BYTES % 64 == 0
