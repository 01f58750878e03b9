"""The hang watch: on made-up heartbeats, on what ranks answer, and on real runs with a rank that hangs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.monitor.ask import Standstill, collectives, where
from launch.monitor.hang import HangWatch, culprits, describe
from tests.distributed import write_config
from tests.life.runs import LAUNCH, clean_end, running
from tests.machine import patience
from trainer.host.node_name import node_name
from trainer.life.heartbeat import Beat, Phase

ROOT = Path(__file__).resolve().parents[3]
SEEDED = str(Path(__file__).with_name("seeded"))


def beat(rank: int, beats: int, phase: Phase = Phase.COMPUTING) -> Beat:
    return Beat(100 + rank, rank, 0, phase, beats, 5, 0.0, 0.0, (0.0,) * len(Phase))


def watched(rows: list[tuple[float, list[Beat]]]) -> list[bool]:
    watch = HangWatch(hang_s=10.0, patient_s=100.0, interval_s=1.0)
    return [watch.look(beats, time_s) for time_s, beats in rows]


def still(phase: Phase, seconds: int) -> list[tuple[float, list[Beat]]]:
    return [(float(second), [beat(0, 7, phase)]) for second in range(seconds)]


def test_a_rank_that_stands_still() -> None:
    assert watched(still(Phase.COMPUTING, 13)) == [False] * 11 + [True] * 2


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.COMPILING, Phase.SAVING, Phase.LEAVING])
def test_what_takes_long_may_take_long(phase: Phase) -> None:
    seen = watched(still(phase, 103))
    assert seen.index(True) == 101


def test_preparing_data_never_hangs() -> None:
    assert not any(watched(still(Phase.PREPARING, 1000)))


def test_ranks_that_wait_for_a_save_do_not_hang() -> None:
    rows = [(float(s), [beat(0, 7, Phase.SAVING), beat(1, 7, Phase.COMMUNICATING)]) for s in range(99)]
    assert not any(watched(rows))


def test_a_suspended_node_has_not_hung() -> None:
    """The monitor was suspended too, so that time does not count."""
    rows = [(0.0, [beat(0, 7)]), (1.0, [beat(0, 7)]), (3600.0, [beat(0, 7)]), (3601.0, [beat(0, 8)])]
    assert not any(watched(rows))


def test_a_new_process_begins_anew() -> None:
    rows = still(Phase.COMPUTING, 9) + [(9.0 + s, [replace(beat(0, 7), pid=200)]) for s in range(9)]
    assert not any(watched(rows))


# ---- whose fault ----------------------------------------------------------------------------------------------------

WAITING = Standstill(0, "a", 1, 5, "computing", 9.0, "S", "c10d.py:1 in wait", True, 40)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state": "X"}, "its process is gone"),
        ({"state": "T"}, "its process was stopped"),
        ({"state": "D"}, "it waits for a device"),
        ({"step": 4}, "it is at an earlier step"),
        ({"waits": False, "place": "x.py:7 in f"}, "the others wait in a collective"),
        ({"collectives": 39}, "it made fewer collectives"),
    ],
)
def test_the_culprit_is_named(changes: dict[str, Any], why: str) -> None:
    found = [replace(WAITING, rank=rank) for rank in range(4)]
    found[2] = replace(found[2], **changes)
    assert culprits(found) == ([found[2]], why)
    line, facts = describe(*culprits(found))
    assert line.startswith("hang: rank 2 on a (computing, step ")
    assert facts["ranks"][0]["rank"] == 2


def test_nobody_is_named_without_a_reason() -> None:
    found = [replace(WAITING, rank=rank) for rank in range(4)]
    assert culprits(found) == (found, "nothing tells the ranks apart")
    assert "all 4 ranks stand still" in describe(*culprits(found))[0]


def test_what_faulthandler_wrote() -> None:
    dump = (
        'Thread 0x01 (most recent call first):\n  File "/a/saver.py", line 1 in save\n\n'
        'Thread 0x02 (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line 9 in wait\n'
        '  File "/y/trainer/step.py", line 3 in step\n'
    )
    assert where(dump) == ("/x/torch/distributed/distributed_c10d.py:9 in wait", True)
    assert where(dump.replace("distributed_c10d.py", "tensor/_ops.py"))[1] is False
    assert where("") == (None, None)


def test_collectives_are_counted_over_groups() -> None:
    entries = [{"process_group": ["0", "x"], "collective_seq_id": n} for n in (1, 2, 3)]
    entries.append({"process_group": ["1", "y"], "collective_seq_id": 5})
    assert collectives(json.dumps({"entries": entries}).encode()) == 8
    assert collectives(b"{cut") is None


# ---- real runs ------------------------------------------------------------------------------------------------------

HANG_S = 4.0


def hung_run(folder: Path, env: dict[str, str], act: Callable[[Any], None], within_s: float) -> Any:
    write_config(
        folder,
        train__steps=40,
        train__global_batch=64,
        monitor__hang_s=HANG_S,
        monitor__interval_s=0.5,
        checkpoint__every_steps=2,
    )
    with running(LAUNCH, folder, env=env) as run:
        run.wait_for("step 3", lambda: run.step() >= 3)
        act(run)
        since = time.time()
        run.wait_for("a hang", lambda: run.events("hang"))
        assert run.events("hang")[0]["time_s"] - since < patience(within_s), run.output
        assert run.wait() == 0, run.output
        clean_end(run)
    return run


def test_a_rank_that_hangs_in_its_reader_is_named_with_its_line(tmp_path: Path) -> None:
    env = {"PYTHONPATH": f"{SEEDED}:{ROOT}", "SEEDED": "hang_reader:1:5"}

    # The next attempt would hang at its own fifth step, which it does not reach: it goes from step 4 to 7.
    write_config(tmp_path, train__steps=7, monitor__hang_s=HANG_S, monitor__interval_s=0.5, checkpoint__every_steps=2)
    with running(LAUNCH, tmp_path, env=env) as run:
        run.wait_for("step 4", lambda: run.step() >= 4)
        since = time.time()
        assert run.wait() == 0, run.output
        clean_end(run)
    (hang,) = run.events("hang")
    assert HANG_S - 1.0 < hang["time_s"] - since < HANG_S + 8.0
    (rank,) = hang["ranks"]
    assert (rank["rank"], rank["phase"], rank["step"], rank["node"]) == (1, "waiting_for_data", 5, node_name())
    assert hang["why"] == "the others wait in a collective"
    attempt = run.attempts()[0]
    assert "sitecustomize.py" in rank["place"]
    assert "in _hang" in (attempt / "stack-00001.txt").read_text()
    assert "all_gather" in (attempt / "stack-00000.txt").read_text()
    assert (attempt / "flight-00000.json").stat().st_size > 1000
    assert "hang: rank 1 on" in run.output
    assert [run.end(n)["reason"] for n in (0, 1)] == ["failed", "finished"]
    assert run.end(0)["cause"] == "hang"
    assert run.events("agent_died") == []


@pytest.mark.full
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    def stop(run: Any) -> None:
        os.kill(run.workers()[0].pid, signal.SIGSTOP)

    run = hung_run(tmp_path, {}, stop, HANG_S + 8.0)
    (hang,) = run.events("hang")
    assert [(r["rank"], r["state"]) for r in hang["ranks"]] == [(0, "T")]
    assert hang["why"] == "its process was stopped"
    assert (run.attempts()[0] / "stack-00000.txt").stat().st_size > 100  # it was continued, and answered
