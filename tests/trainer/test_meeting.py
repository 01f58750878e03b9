"""Ranks that wait for each other at the start report for whom, and obey a stop."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.config import Config
from configs.errors import UserError
from tests.distributed import free_port, run_ranks, tiny
from tests.machine import patience
from trainer.host.environment import FromLauncher, Ranks
from trainer.life.heartbeat import Heartbeats
from trainer.life.stop import Cause, StopRequested, StopWish
from trainer.ranks import meeting
from trainer.ranks.meeting import meet, where
from trainer.start import start

PATIENCE_S = 30.0


class Meeting:
    """Ranks as threads of this process. `said` and `ended` by rank. An error counts as an end."""

    def __init__(self, size: int, by_torchrun: bool = False) -> None:
        self.ranks = Ranks(0, size, 0, size, ("127.0.0.1", free_port()), by_torchrun)
        self.said: dict[int, list[str]] = {}
        self.ended: dict[int, Any] = {}
        self.wishes: dict[int, StopWish] = {}

    def join(self, rank: int, timeout_s: float = PATIENCE_S) -> None:
        self.said[rank], self.wishes[rank] = [], StopWish()
        ranks = replace(self.ranks, rank=rank, local_rank=rank)

        def run() -> None:
            try:
                self.ended[rank] = meet(ranks, "here", False, timeout_s, self.wishes[rank], self.said[rank].append)
            except Exception as error:  # noqa: BLE001
                self.ended[rank] = error

        threading.Thread(target=run, daemon=True).start()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + patience(PATIENCE_S)
        while not condition():
            assert time.monotonic() < deadline, (self.said, self.ended)
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_FIRST_S", 0.2)


def test_rank_0_says_whom_it_waits_for_until_all_are_there() -> None:
    one = Meeting(4)
    one.join(0)
    one.wait_for(lambda: one.said[0])
    (line,) = one.said[0]
    assert line.startswith(f"rank 0 waits for ranks 1, 2, 3 at 127.0.0.1:{one.ranks.meeting[1]} (")  # type: ignore[index]
    assert one.ended == {}
    for rank in (1, 2, 3):
        one.join(rank)
    one.wait_for(lambda: len(one.ended) == 4)
    stores = [one.ended[rank] for rank in range(4)]
    stores[3].set("word", "heard")
    assert stores[1].get("word") == b"heard"
    assert len(one.said[0]) == 1


def test_a_rank_says_that_it_waits_for_rank_0_and_both_are_served() -> None:
    one = Meeting(2)
    one.join(1)
    one.wait_for(lambda: one.said[1])
    assert "rank 1 waits for rank 0 at 127.0.0.1:" in one.said[1][0]
    one.join(0)
    one.wait_for(lambda: len(one.ended) == 2)
    assert not any(isinstance(end, Exception) for end in one.ended.values())


def test_it_is_said_again_and_under_torchrun_by_one_rank_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_THEN_S", 0.2)
    one = Meeting(3, by_torchrun=True)
    one.join(1)
    one.join(0)
    one.wait_for(lambda: len(one.said[0]) > 2)
    assert all("rank 0 waits for rank 2" in line or "ranks 1, 2" in line for line in one.said[0])
    assert one.said[1] == []


def test_those_who_do_not_come_are_named() -> None:
    by_hand, by_torchrun = Meeting(12), Meeting(2, by_torchrun=True)
    by_hand.join(0, timeout_s=0.5)
    by_torchrun.join(1, timeout_s=0.5)
    by_hand.wait_for(lambda: by_hand.ended)
    by_torchrun.wait_for(lambda: by_torchrun.ended)
    assert isinstance(by_hand.ended[0], UserError)
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not come to 127.0.0.1:" in str(by_hand.ended[0])
    assert isinstance(by_torchrun.ended[1], TimeoutError)  # a failure, which is started again
    assert "rank 0 did not come" in str(by_torchrun.ended[1])


def test_a_stop_is_heard_by_all_that_are_there() -> None:
    one = Meeting(3)
    one.join(0)
    one.join(1)
    one.wait_for(lambda: one.said[0])
    one.wishes[1].wish(Cause.INTERRUPT)  # this rank alone does not decide
    time.sleep(0.5)
    assert one.ended == {}
    one.wishes[0].wish(Cause.WARNING)
    one.wait_for(lambda: len(one.ended) == 2)
    assert all(isinstance(end, StopRequested) and end.cause is Cause.WARNING for end in one.ended.values())


def test_one_that_waits_for_rank_0_hears_its_own_stop() -> None:
    one = Meeting(2)
    one.join(1)
    one.wishes[1].wish(Cause.TERMINATE)
    one.wait_for(lambda: one.ended)
    assert isinstance(one.ended[1], StopRequested)


def test_ranks_that_meet_soon_leave_a_stop_to_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt writes its end.json. A start that ends here leaves no trace."""
    monkeypatch.setattr(meeting, "_FIRST_S", 10.0)
    one = Meeting(2)
    one.join(0)
    one.wishes[0].wish(Cause.INTERRUPT)
    time.sleep(0.5)
    one.join(1)
    one.wait_for(lambda: len(one.ended) == 2)
    assert not any(isinstance(end, Exception) for end in one.ended.values())


def test_one_node_never_meets_at_the_name_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "pod-nowhere")
    here = Ranks(0, 2, 0, 2, ("pod-nowhere", 29500))
    assert where(here) == ("127.0.0.1", 29500)
    assert where(replace(here, meeting=("pod-nowhere.cluster.local", 1))) == ("127.0.0.1", 1)
    assert where(replace(here, meeting=("pod-nowhere-2", 1))) == ("pod-nowhere-2", 1)  # another host, whoever that is
    assert where(replace(here, local_size=1)) == ("pod-nowhere", 29500)  # several nodes: unchanged


def _told_to_stop(config: dict[str, Any]) -> tuple[int, str]:
    """(exit code, printed text)."""
    meeting._FIRST_S = 0.2  # in this rank
    wish, said = StopWish(), io.StringIO()
    wish.wish(Cause.INTERRUPT)
    with contextlib.redirect_stdout(said):
        return start(Config.model_validate(config), wish), said.getvalue()


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("by", ["hand", "torchrun", "launch run"])
def test_a_run_that_is_stopped_while_ranks_wait_ends_as_stopped_and_says_it_once(
    by: str, rank: str, tmp_path: Path
) -> None:
    env = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port())}
    request, heartbeats = tmp_path / "request", Heartbeats.make(2)
    if by != "hand":
        env |= {"TORCHELASTIC_RUN_ID": "x"}
    if by == "launch run":
        there = FromLauncher(1.0, 1, "token", request, tmp_path / "e", tmp_path / "f", Path(heartbeats.path), 1.0)
        env |= there.environment()
    ((code, said),) = run_ranks(1, _told_to_stop, tiny(tmp_path), env=env)
    assert code == (3 if by == "hand" else 0)
    heard = by == "hand" or rank == "0"
    assert said == f"stopped (interrupt) while rank {rank} waited for others\n" * heard
    assert request.exists() == (by == "launch run")  # so that this node's launcher knows why they left
    assert not (tmp_path / "run").exists()
