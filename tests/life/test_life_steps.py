"""Faults inside a step or a save: all ranks agree on what follows, and the state stays unchanged."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.config import Config
from tests.distributed import run_ranks, tiny, write_config
from tests.engines import ENGINES, rows, under_both
from tests.life.runs import LAUNCH, Watched, clean_end, running
from tests.machine import patience
from trainer.checkpoint.format import disk
from trainer.data.batch import Batch
from trainer.life.stop import Cause, StopWish
from trainer.run import Run
from trainer.start import start

Outcome = tuple[int, int]  # exit code and last step
of_one_rank = pytest.mark.parametrize(("rank", "engine"), rows([("1", "fsdp")], [0, 1], ENGINES), indirect=["engine"])


def on_ranks(
    folder: Path, size: int, prepare: Callable[..., Any], *arguments: Any, **changes: Any
) -> tuple[Watched, list[Any]]:
    """A run on forked ranks, each of which first calls `prepare` with its `Run` and `StopWish`: (files, outcomes)."""
    write_config(folder, **changes)
    return Watched(folder), run_ranks(size, _start, tiny(folder, **changes), prepare, arguments)


def _start(config: dict[str, Any], prepare: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    wish, runs = StopWish(), list[Run]()

    class Prepared(Run):
        def build(self) -> None:
            super().build()
            runs.append(self)
            prepare(self, wish, *arguments)

    code = start(Config.model_validate(config), wish, Prepared)
    return code, runs[0].progress.step if runs else -1


class Engine:
    """Passes everything to an engine, except what a test changes."""

    def __init__(self, engine: Any) -> None:
        self.inner, self.step = engine, 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def update(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.step += 1
        norm: torch.Tensor = self.inner.update(*arguments, **named)
        return norm


# ---- numbers that are not finite ------------------------------------------------------------------------------------


class Poisoned(Engine):
    """On one rank, at some steps, the loss, its gradient or both are not finite. A skip must change no number."""

    def __init__(self, engine: Any, rank: int, steps: set[int], what: str) -> None:
        super().__init__(engine)
        self.bad, self.what = steps if engine.world.rank == rank else set(), what
        self.poisoned = steps
        self.task_sums, engine.task.sums = engine.task.sums, self.sums

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the total to differentiate, the loss) of the task, poisoned."""
        total, sums = self.task_sums(model, batch)
        if self.step in self.bad:
            total = total * (1.0 if self.what == "loss alone" else math.nan)
            sums = sums * (1.0 if self.what == "gradient" else math.nan)
        return total, sums

    def update(self, *arguments: Any, **named: Any) -> torch.Tensor:
        skipped = self.step in self.poisoned
        before = self._state()
        norm = super().update(*arguments, **named)
        assert bool(norm.isnan()) is skipped
        assert (before == self._state()) is skipped  # parameters, moments and step counts are unchanged on every rank
        return norm

    def _state(self) -> tuple[dict[str, bytes], dict[str, int]]:
        return {p.key: p.tensor.detach().numpy().tobytes() for p in self.inner.pieces()}, self.inner.step_counts()


def poison(run: Run, wish: StopWish, rank: int, steps: set[int], what: str) -> None:
    run.engine = Poisoned(run.engine, rank, steps, what)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("what", "engine"),
    rows([("gradient", "fsdp"), ("loss alone", "zero")], ["loss", "gradient", "loss alone"], ENGINES),
    indirect=["engine"],
)
def test_skipped_updates_change_nothing_and_are_survived(what: str, engine: dict[str, Any], tmp_path: Path) -> None:
    steps = {3, 4, 6}  # never three in a row
    changes = {"train__steps": 8, "train__nonfinite_limit": 3, "data__record_samples": True, **engine}
    run, outcomes = on_ranks(tmp_path, 2, poison, 1, steps, what, **changes)
    assert outcomes == [(0, 8), (0, 8)]
    assert run.end()["reason"] == "finished"
    # The rank whose loss was bad names its samples. For a bad gradient the rank is unknown, so rank 0 names its own.
    rank = 0 if what == "gradient" else 1
    assert run.told_by(f"rank{1 - rank:05d}", "nonfinite") == []
    told = run.told_by(f"rank{rank:05d}", "nonfinite")
    assert [(e["step"], e["what"]) for e in told] == [(step, what.split()[0]) for step in sorted(steps)]
    assert set(told[0]["samples"]) <= set(range(16, 24))  # the samples of step 3
    assert all(n % 2 == rank for n in told[0]["samples"])
    assert [row["step"] for row in run.rows() if row["grad_norm"] is None] == sorted(steps)


@pytest.mark.full
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_skips_on_all_ranks(stage: int, compute: str, offload: bool, tmp_path: Path) -> None:
    """The stages take the norm in different ways in DeepSpeed; at stage 1 in bf16 each rank takes it alone."""
    changes = {"parallel__engine": "zero", "parallel__zero_stage": stage, "parallel__cpu_offload": offload}
    run, outcomes = on_ranks(
        tmp_path, 2, poison, 1, {2, 4}, "loss alone", train__steps=5, precision__compute=compute, **changes
    )
    assert outcomes == [(0, 5), (0, 5)]
    assert [row["step"] for row in run.rows() if row["grad_norm"] is None] == [2, 4]


@under_both
def test_too_many_in_a_row_fail_on_all_ranks_at_one_step(engine: dict[str, Any], tmp_path: Path) -> None:
    changes = {"train__steps": 9, "train__nonfinite_limit": 3, **engine}
    run, outcomes = on_ranks(tmp_path, 3, poison, 2, {5, 6, 7, 8, 9}, "loss", **changes)
    assert outcomes == [(1, 8)] * 3  # step 7's loss is read when step 8 has been queued
    end = run.end()
    assert (end["reason"], end["cause"], end["step"], end["requeue"]) == ("failed", "nonfinite", 8, False)
    assert end["checkpoint"] == "step-00000006"


@under_both
def test_the_count_goes_on_after_a_restart(engine: dict[str, Any], tmp_path: Path) -> None:
    """Otherwise a run that is stopped often enough would skip for ever."""
    changes = {"train__nonfinite_limit": 4, "checkpoint__every_steps": 2, **engine}
    on_ranks(tmp_path, 1, poison, 0, {3, 4}, "loss", train__steps=4, **changes)
    run, outcomes = on_ranks(tmp_path, 1, poison, 0, {1, 2, 3}, "loss", train__steps=9, **changes)  # since this start
    assert outcomes == [(1, 6)]
    assert run.end()["cause"] == "nonfinite"


@under_both
def test_the_launcher_does_not_start_it_again(engine: dict[str, Any], tmp_path: Path) -> None:
    grows = {"optim__lr": 1000.0, "optim__weight_decay": 10.0, "optim__warmup_steps": 0}  # by 10^4 a step
    write_config(tmp_path, train__steps=50, **grows, **engine)
    with running(LAUNCH, tmp_path, "--nproc", "1") as run:
        assert run.wait() == 1
        clean_end(run)
    assert len(run.attempts()) == 1
    end = run.end()
    assert (end["reason"], end["cause"], end["requeue"]) == ("failed", "nonfinite", False)
    told = [e["step"] for e in run.told_by("rank00000", "nonfinite")]
    assert told == list(range(end["step"] - 5, end["step"]))  # the last step was queued before the fifth was read
    assert "5 times in a row" in run.output


# ---- saves that fail ------------------------------------------------------------------------------------------------


def full_disk(run: Run, wish: StopWish, rank: int, times: dict[int, int]) -> None:
    """The disk of one rank is full: for each step, how many saves fail first."""
    left = dict(times)

    @contextmanager
    def refuse() -> Iterator[None]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    def observe(operation: disk.Operation) -> AbstractContextManager[None]:
        path = Path(operation.path)
        for step in left:
            if operation.name == "create" and f"step-{step:08d}.partial" in str(path) and left[step] > 0:
                left[step] -= 1
                return refuse()
        return nullcontext()

    if run.world.rank == rank:
        disk.observer = observe


@of_one_rank
def test_a_full_disk_is_said_and_the_next_save_tries_again(rank: int, engine: dict[str, Any], tmp_path: Path) -> None:
    changes = {"train__steps": 10, "checkpoint__keep": {"last": 5}, **engine}
    run, outcomes = on_ranks(tmp_path, 2, full_disk, rank, {6: 1}, **changes)
    assert outcomes == [(0, 10), (0, 10)]
    assert run.folder.committed_steps() == [3, 9, 10]
    (failed,) = run.events("save_failed")
    assert failed["checkpoint"] == "step-00000006"
    assert "No space left on device" in failed["error"]
    log = (run.attempts()[0] / "rank-00000.log").read_text()
    assert "SAVE FAILED, step-00000006" in log
    assert "the last good checkpoint stands" in log


@of_one_rank
def test_too_many_failed_saves_end_the_run_at_one_step(rank: int, engine: dict[str, Any], tmp_path: Path) -> None:
    never = dict.fromkeys(range(4, 100), 99)
    changes = {"train__steps": 60, "checkpoint__failures_limit": 2, **engine}
    run, outcomes = on_ranks(tmp_path, 2, full_disk, rank, never, **changes)
    (code, step), other = outcomes
    assert (code, step) == other
    assert code == 1
    assert 9 <= step < 60
    end = run.end()
    assert (end["reason"], end["cause"], end["requeue"]) == ("failed", "saving_failed", False)
    assert (end["step"], end["checkpoint"]) == (step, "step-00000003")
    assert run.folder.committed_steps() == [3]


@pytest.mark.parametrize(("last", "engine"), rows([("6", "fsdp")], [6, 8], ENGINES), indirect=["engine"])
def test_the_last_save_is_tried_again(last: int, engine: dict[str, Any], tmp_path: Path) -> None:
    """Also when the loop began the save: then one rank may know of the failure before the other."""
    run, outcomes = on_ranks(tmp_path, 2, full_disk, 1, {last: 2}, train__steps=last, **engine)
    assert outcomes == [(0, last), (0, last)]
    assert run.committed() == last
    assert len(run.events("save_failed")) == 2
    assert run.end()["checkpoint"] == f"step-{last:08d}"


@under_both
def test_a_run_that_cannot_save_its_end_has_failed(engine: dict[str, Any], tmp_path: Path) -> None:
    run, outcomes = on_ranks(tmp_path, 2, full_disk, 0, {8: 99}, train__steps=8, **engine)
    assert outcomes == [(1, 8), (1, 8)]
    end = run.end()
    assert (end["reason"], end["cause"], end["checkpoint"]) == ("failed", "saving_failed", "step-00000006")


def full_files(run: Run, wish: StopWish) -> None:
    """From now on /dev/full answers every write of this rank, as a full disk does."""
    run.console._log = os.open("/dev/full", os.O_WRONLY)
    for path in (run.events.path, *([run.folder.metrics] if run.world.first else [])):
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")


@under_both
def test_rows_that_find_no_room_are_lost_and_the_run_is_not(engine: dict[str, Any], tmp_path: Path) -> None:
    run, outcomes = on_ranks(tmp_path, 2, full_files, **engine)
    assert run.folder.metrics.is_symlink()
    assert outcomes == [(0, 6), (0, 6)]
    assert run.committed() == 6
    assert run.end()["reason"] == "finished"


# ---- wishes that only one rank has ----------------------------------------------------------------------------------


def ask(run: Run, wish: StopWish, rank: int) -> None:
    if run.world.rank == rank:
        wish.wish(Cause.TERMINATE)


@of_one_rank
def test_all_ranks_stop_when_one_was_asked(rank: int, engine: dict[str, Any], tmp_path: Path) -> None:
    run, outcomes = on_ranks(tmp_path, 2, ask, rank, **engine)
    assert outcomes == [(75, 0), (75, 0)]
    assert run.end()["requeue"] is True


@under_both
def test_a_wish_before_the_first_collective_is_agreed(engine: dict[str, Any], tmp_path: Path) -> None:
    """One rank may see the launcher's request, while another rank, a moment earlier, did not."""
    config = tiny(tmp_path, **engine)
    write_config(tmp_path, **engine)
    assert run_ranks(2, _asked_at_once, config, timeout_s=30) == [3, 3]
    end = Watched(tmp_path).end()
    assert (end["reason"], end["cause"], end["step"]) == ("stopped", "interrupt", 0)


def _asked_at_once(config: dict[str, Any]) -> int:
    wish = StopWish()
    if os.environ["RANK"] == "0":
        wish.wish(Cause.INTERRUPT)
    return start(Config.model_validate(config), wish)


# ---- a rank that hangs ----------------------------------------------------------------------------------------------

TIMEOUT_S = 2.0


def freeze(run: Run, wish: StopWish, folder: Path) -> None:
    """Rank 1 stands still from step 3 on, as a process does whose GPU hangs."""

    class Frozen(Engine):
        def forward_backward(self, *arguments: Any) -> torch.Tensor:
            if self.step == 3:
                (folder / "frozen").write_text(f"{os.getpid()} {time.time()}")
                os.kill(os.getpid(), signal.SIGSTOP)
            return torch.as_tensor(self.inner.forward_backward(*arguments))

    if run.world.rank == 1:
        run.engine = Frozen(run.engine)  # type: ignore[assignment]


@under_both
def test_a_frozen_rank_is_given_up_after_the_timeout(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, parallel__step_timeout_s=TIMEOUT_S, parallel__load_timeout_s=600.0, **engine)
    write_config(tmp_path, **engine)
    (code, waited_s), _ = run_ranks(2, _beside_a_frozen_one, config, tmp_path)
    assert code == 1
    assert TIMEOUT_S - 0.5 <= waited_s < TIMEOUT_S + patience(10.0)
    run = Watched(tmp_path)
    assert run.end()["cause"] == "rank_failed"
    assert run.told_by("rank00000", "rank_failed")


def _beside_a_frozen_one(config: dict[str, Any], folder: Path) -> tuple[int, float]:
    code, _ = _start(config, freeze, (folder,))
    pid, since = (folder / "frozen").read_text().split()
    waited_s = time.time() - float(since)
    if os.environ["RANK"] == "0":
        os.kill(int(pid), signal.SIGCONT)
    return code, waited_s


@pytest.mark.full
def test_a_frozen_rank_under_the_launcher(engine: dict[str, Any], tmp_path: Path, note: Callable[..., None]) -> None:
    """The monitor ends the attempt before the other ranks time out: torchrun would then wait 30 s more."""
    write_config(tmp_path, train__steps=16, train__global_batch=64, parallel__step_timeout_s=10.0, **engine)
    with running(LAUNCH, tmp_path) as run:
        run.wait_for("step 4", lambda: run.step() >= 4)
        since = time.time()
        run.workers()[1].suspend()
        assert run.wait() == 0, run.output
        clean_end(run)
    assert len(run.attempts()) == 2
    assert "hang: rank 1 on" in run.output
    assert run.end(0)["cause"] == "hang"
    seconds = run.events("started")[-1]["time_s"] - since
    note("launch run", "step", "SIGSTOP rank 1", 0, f"{seconds:.1f} until it trains again", run.start_step(1))
