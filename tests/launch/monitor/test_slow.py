"""How slow and idle ranks are found: on made-up windows, and with seeded faults in real runs on CPU ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.monitor.slow import RankWindow, idle, rank_window, stragglers
from tests.distributed import write_config
from tests.life.runs import LAUNCH, Running, running
from trainer.life.heartbeat import Beat, Phase

ROOT = Path(__file__).resolve().parents[3]
SEEDED = str(Path(__file__).with_name("seeded"))

HEALTHY = RankWindow(
    rank=0,
    node="a",
    gpu="GPU-0",
    steps=30,
    seconds=60.0,
    phases_pct={"computing": 96.0, "waiting_for_data": 1.0, "communicating": 3.0},
    activity_pct=50.0,
    sm_clock_mhz=1755.0,
    pcie_width=16.0,
    most_pcie_width=16.0,
)


def ranks(**changes: Any) -> list[RankWindow]:
    """Eight ranks; rank 5 has the changes."""
    return [replace(HEALTHY, rank=n, gpu=f"GPU-{n}", **(changes if n == 5 else {})) for n in range(8)]


def test_healthy_ranks_are_left_alone() -> None:
    jitter = [replace(rank, activity_pct=50.0 + 2 * (rank.rank % 4)) for rank in ranks()]
    assert stragglers(jitter, 0.3) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"sm_clock_mhz": 900.0, "throttled": {"hw_thermal": 0.9}}, "its clock is held at 900 MHz (hw_thermal)"),
        ({"sm_clock_mhz": 900.0}, "its clock is held at 900 MHz (no reason given)"),
        ({"ecc_new": 3}, "3 new ECC errors"),
        ({"pcie_width": 4.0}, "its PCIe link has 4 of 16 lanes"),
        ({"cpu_wait_pct": 44.0}, "its CPU is taken: 44 % of the time it could have run and had none"),
        ({"phases_pct": {"waiting_for_data": 40.0, "computing": 60.0}}, "it waits for data 40 % of the time"),
        ({"phases_pct": {"saving": 35.0, "computing": 65.0}}, "it waits for saves 35 % of the time"),
    ],
)
def test_a_slow_rank_is_named_with_what_is_known(changes: dict[str, Any], why: str | None) -> None:
    ((rank, times, told),) = stragglers(ranks(activity_pct=95.0, **changes), 0.3)
    assert (rank.rank, rank.gpu) == (5, "GPU-5")
    assert times > 1.8
    assert told == why


def test_a_power_cap_that_all_have_explains_nothing() -> None:
    capped = [replace(rank, throttled={"sw_power_cap": 1.0}) for rank in ranks(activity_pct=95.0)]
    ((_, _, why),) = stragglers(capped, 0.3)
    assert why is None


def test_without_activity_nobody_is_named() -> None:
    assert stragglers(ranks(activity_pct=None), 0.3) == []
    assert idle([replace(rank, activity_pct=None) for rank in ranks()], 30.0) is None


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({"waiting_for_data": 70.0, "computing": 30.0}, "the reader is too slow"),
        ({"saving": 60.0, "computing": 40.0}, "checkpoint.every_steps is small"),
        ({"validating": 60.0, "computing": 40.0}, "train.validate_every_steps is small"),
        ({"communicating": 30.0, "computing": 70.0}, "a step is too small"),
    ],
)
def test_an_idle_run_is_told_why(phases: dict[str, float], words: str) -> None:
    found = idle([replace(rank, activity_pct=12.0, phases_pct=phases) for rank in ranks()], 30.0)
    assert found is not None
    assert found[0] == pytest.approx(12.0)
    assert words in found[1]
    assert idle(ranks(), 30.0) is None


def test_a_window_is_counted_from_heartbeats() -> None:
    def beat(step: int, since_s: float, waiting: float, computing: float) -> Beat:
        seconds = [0.0] * len(Phase)
        seconds[Phase.WAITING_FOR_DATA], seconds[Phase.COMPUTING] = waiting, computing
        return Beat(1, 3, 0, Phase.COMPUTING, step, step, since_s, since_s, tuple(seconds))

    rolled = {"rank": {"main_cpu_pct": [40.0, 0, 0], "cpu_wait_pct": [10.0, 0, 0]}, "gpu": None}
    window = rank_window((beat(10, 98.0, 1.0, 50.0), 100.0), (beat(30, 119.0, 5.0, 68.0), 120.0), "a", rolled)
    assert (window.rank, window.steps, window.seconds, window.activity_pct) == (3, 20, 20.0, 50.0)
    assert window.phases_pct == {"waiting_for_data": 20.0, "computing": 85.0}  # 18 + 1 - 2 of 20 s
    assert window.own_s == pytest.approx(0.7)


# ---- seeded causes, for real ----------------------------------------------------------------------------------------

WATCH = {"monitor__window_s": 4.0, "monitor__interval_s": 0.25, "monitor__idle_windows": 1}
# A step takes about 60 ms on an idle core, mostly computing.
STEADY = {"train__steps": 100_000, "train__global_batch": 64, "model__dim": 96, "run__log_every_steps": 20}


@contextmanager
def seeded(folder: Path, seed: str | None, **changes: Any) -> Iterator[Running]:
    env = {"PYTHONPATH": f"{SEEDED}:{ROOT}", "SEEDED": seed} if seed else {}
    write_config(folder, **{**STEADY, **WATCH, "checkpoint__every_steps": 0, **changes})
    with running(LAUNCH, folder, env=env) as run:
        yield run


def seldom(run: Running, event: str) -> Callable[[], Any]:
    """Whether the event was recorded. Asked once a second: constant asking would use a rank's CPU."""

    def told() -> Any:
        time.sleep(1.0)
        return run.told_by("monitor", event)

    return told


@pytest.mark.full
@pytest.mark.parametrize(
    ("seed", "why"), [("slow_rank:1:5", None), ("slow_reader:1:5", "it waits for data")], ids=["computing", "reading"]
)
def test_one_slow_rank(seed: str, why: str | None, tmp_path: Path) -> None:
    with seeded(tmp_path, seed) as run:
        run.wait_for("a slow rank", seldom(run, "slow_rank"))
        (event,) = run.events("slow_rank")
        assert event["rank"] == 1
        assert event["times"] > 1.3
        assert (event["why"] or "").startswith(why or "")
        assert "slow: rank 1 on" in run.output


@pytest.mark.full
def test_a_cpu_hog_beside_one_rank(tmp_path: Path) -> None:
    with seeded(tmp_path, None) as run:
        run.wait_for("a step", lambda: run.step() >= 20)
        for rank, process in run.workers().items():
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {rank})
        # Each process in its own session, since the kernel shares a core among sessions first.
        busy = "import time\nend = time.monotonic() + 200\nwhile time.monotonic() < end: pass"
        hogs = [subprocess.Popen([sys.executable, "-c", busy], start_new_session=True) for _ in range(8)]
        try:
            for hog in hogs:
                os.sched_setaffinity(hog.pid, {1})
            run.wait_for("a slow rank", seldom(run, "slow_rank"))
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()
        assert [e["rank"] for e in run.events("slow_rank")] == [1]
        assert run.events("slow_rank")[0]["why"].startswith("its CPU is taken")


@pytest.mark.full
@pytest.mark.parametrize(
    ("seed", "changes", "words"),
    [
        ("slow_reader:0,1:5", {}, "the reader is too slow"),
        (None, {"train__global_batch": 2, "model__dim": 32}, "a step is too small"),
        (
            None,
            {
                "checkpoint__every_steps": 1,
                "checkpoint__asynchronous": False,
                "model__vocab_size": 16_000,
                "model__dim": 256,
                "train__global_batch": 2,
            },
            "checkpoint.every_steps is small",
        ),
    ],
    ids=["slow reader", "tiny batch", "save every step"],
)
def test_an_idle_run(seed: str | None, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    hook = f'echo "$MUSTER_TEXT" >> {tmp_path}/told'
    with seeded(tmp_path, seed, **{"monitor__idle_pct": 60.0, "monitor__hook": hook, **changes}) as run:
        run.wait_for("an idle run", seldom(run, "idle"))
        run.wait_for("the hook", (tmp_path / "told").exists)
        assert words in (tmp_path / "told").read_text()
        assert words in run.events("idle")[0]["why"]
        assert run.events("slow_rank") == []
        assert "idle: " in run.output
