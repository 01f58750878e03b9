"""How the launcher handles ranks that failed. Whole runs are in tests/life."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import launch.run.command
import slurm.job.job
from configs.config import Config
from configs.errors import UserError
from launch.run.node import Nodes, Supervisor, _first_to_fall, default_processes, run_node
from slurm.job.lives import Life
from tests.distributed import tiny, write_config
from trainer.host.console import Console
from trainer.life.attempts import FAILED, REQUEUE, STOPPED, USER_ERROR
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.lease import Lease
from trainer.life.stop import SIGNALS, Cause, StopWish, write_request
from trainer.preflight import Problem

PATIENCE_S = 20.0
KILLED, RAISED, ENDED = -9, 1, -15  # somebody's SIGKILL, an exception, torchrun's SIGTERM


def failures(*codes: int) -> list[dict[str, Any]]:
    return [{"rank": rank, "exit_code": code} for rank, code in enumerate(codes)]


def raised(*ranks: int) -> list[dict[str, Any]]:
    """The `rank_failed` events of these ranks, oldest first."""
    return [{"rank": rank, "error": f"error {rank}\nmore"} for rank in ranks]


@pytest.mark.parametrize(
    ("codes", "events", "first"),
    [
        ((RAISED, KILLED), raised(0), (1, "SIGKILL")),  # rank 0 failed because the other went silent
        ((RAISED, RAISED, RAISED), raised(2, 0, 1), (2, "error 2")),
        ((ENDED, RAISED), raised(1), (1, "error 1")),
        ((ENDED, KILLED), [], (1, "SIGKILL")),
        ((RAISED, ENDED), [], (0, "exit_code_1")),  # an import failed before the rank could write events
    ],
)
def test_the_first_to_fall(codes: tuple[int, ...], events: list[dict[str, Any]], first: tuple[int, str]) -> None:
    assert _first_to_fall(failures(*codes), events) == first


def test_when_this_process_began() -> None:
    code = "from trainer.host.clock import began_s; print(began_s())"
    before = time.time()
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert before - 0.02 <= began <= before + 0.5


@pytest.mark.parametrize(
    ("visible", "processes"),
    [
        *[("0,1,2", 3), ("0", 1), (" 3 , 1", 2), ("1gpu,2", 2), ("GPU-a1,GPU-b2", 2)],
        *[("0,-1,1", 1), ("0,none", 1), ("GPU-a1,0", 1), ("0,GPU-a1", 1), ("0,", 1)],  # the list ends there, as in CUDA
        *[("MIG-a1,MIG-b2", 1), ("MIG-a1", 1)],  # a process sees one instance
        *[("", 2), ("-1", 2), ("none", 2), ("NoDevFiles", 2), (",0", 2), ("0,0", 2)],  # no GPU: two on the CPU
    ],
)
def test_a_process_per_visible_gpu(visible: str, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert default_processes() == processes


def test_a_process_per_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MUSTER_PRETEND_GPUS", "3")
    assert default_processes() == 3
    monkeypatch.setenv("MUSTER_PRETEND_GPUS", "0")
    assert default_processes() == 2


@pytest.fixture
def second_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """The supervisor of the second of two nodes, before an attempt."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else it takes a moment to look for idle processors
    monkeypatch.setattr("launch.run.node._adopt_orphans", lambda: None)  # this process adopts none
    config, local = Config.model_validate(tiny(tmp_path)), tmp_path / "local"
    folder = RunFolder(Path(config.run_dir))
    local.mkdir()
    lease, console = Lease(folder.lease, "first's"), Console(rank=0)
    return Supervisor(config, folder, [], 2, StopWish(), console, lease, local, Nodes(count=2, index=1))


@pytest.mark.parametrize(
    ("cause", "code"),
    [(None, USER_ERROR), (Cause.TERMINATE, REQUEUE), (Cause.WARNING, REQUEUE), (Cause.HANGUP, STOPPED)],
)
@pytest.mark.parametrize("heard", ["here", "by rank 0's node alone"])
def test_a_stop_while_the_ranks_of_several_nodes_meet_is_no_mistake(
    cause: Cause | None, code: int, heard: str, second_of_two: Supervisor
) -> None:
    if cause is not None and heard == "here":
        second_of_two.wish.wish(cause)
    elif cause is not None:
        write_request(second_of_two.told.stop_request, cause)  # as its ranks do after they heard of it from rank 0
    assert second_of_two._outcome_of_many(-1, 0) == code


def test_what_counts_for_one_life_of_a_job_names_it(
    second_of_two: Supervisor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    second_of_two.folder.root.mkdir()
    second_of_two.wish.wish(Cause.TERMINATE)
    second_of_two._pass_on()
    second_of_two._agent_died = True
    assert second_of_two._outcome_of_many(-1, -9) == FAILED
    rows = read_events(second_of_two.folder)
    assert [row["event"] for row in rows] == ["stop_passed_on", "agent_died"]
    assert all(Life(second_of_two.folder, "7", 2).wrote(row) for row in rows)
    assert not any(Life(second_of_two.folder, "7", 1).wrote(row) for row in rows)


@pytest.mark.parametrize(
    ("number", "index", "code"),
    [
        (signal.SIGUSR2, 0, REQUEUE),
        (signal.SIGTERM, 0, REQUEUE),
        (signal.SIGINT, 0, STOPPED),
        (signal.SIGTERM, 1, FAILED),
    ],
)
def test_a_signal_ends_slow_checks_and_leaves_nothing(
    number: int, index: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> list[Problem]:
        os.kill(os.getpid(), number)
        time.sleep(PATIENCE_S)  # as a filesystem that does not answer
        return []

    monkeypatch.setattr("launch.run.node.check", slow)
    monkeypatch.setattr("launch.run.node.check_numbers", slow)
    wish, began = StopWish(), time.monotonic()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        wish.listen()
        assert run_node(str(write_config(tmp_path)), [], 1, wish, Nodes(2, index)) == code
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
    assert time.monotonic() - began < PATIENCE_S
    assert not (tmp_path / "run").exists()


def test_whoever_runs_a_node_listens_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a job's node leaves its last word, whatever it is doing."""
    heard: list[bool] = []

    def seen(*arguments: Any) -> int:
        (wish,) = (argument for argument in arguments if isinstance(argument, StopWish))
        heard.append(signal.getsignal(signal.SIGUSR2) == wish._note)
        return 0

    monkeypatch.setattr("launch.run.node.run_node", seen)
    monkeypatch.setattr("slurm.job.job._share", seen)
    monkeypatch.setattr("slurm.job.job.nodes_of_step", lambda environment: Nodes())
    monkeypatch.setattr("launch.run.command.go_on_unheard", lambda: None)
    monkeypatch.setattr("slurm.job.job.go_on_unheard", lambda: None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for main in (launch.run.command.main, slurm.job.job.main):
            signal.signal(signal.SIGUSR2, signal.SIG_DFL)
            assert main(["demo"]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == [True, True]


def test_the_others_wait_as_long_as_the_first_node_may_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.life.lease._FIRST_NODE_S", 0.1)
    path = write_config(tmp_path, parallel__load_timeout_s=0.5)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(UserError, match=r"node1 has not taken .* within 0.5 s"):
        run_node(str(path), [], 1, StopWish(), Nodes(2, 1, "node1"))
    assert said.getvalue().count("waits for node1 to take") == 1
    assert not (tmp_path / "run").exists()


def test_torchrun_and_openmp_hear_the_launcher_not_what_is_left_in_the_environment(
    second_of_two: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator of Kubernetes sets PET_... for its own torchrun, and a job script sets OMP_NUM_THREADS to nothing."""
    from torch.distributed.run import parse_args

    second_of_two.nodes = Nodes()
    for name, value in {"PET_NNODES": "2:4", "PET_NODE_RANK": "1", "PET_STANDALONE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    environment = second_of_two._environment()
    assert environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(os, "environ", environment)
    command = second_of_two._agent_command()
    options = parse_args(command[command.index("launch.run.agent") + 1 :])
    assert (options.nnodes, options.node_rank, options.standalone) == ("1", 0, False)
