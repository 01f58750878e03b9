"""The host copy of a save: its memory is held before the first step, page-locked for a GPU, or said to be slower."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_store import save, some, whole

from tests.distributed import run_ranks, tiny
from trainer.checkpoint.format.pieces import with_state_to_come
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save import staging
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.share import plan_files
from trainer.checkpoint.save.store import CheckpointStore


class Driver:
    """A stand-in for the one function that asks the driver. The memory, the copies and the saves are real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
        self.refuses = refuses
        self.locked: dict[int, int] = {}
        self.asked: list[int] = []
        monkeypatch.setattr(staging, "page_lock", self.page_lock)

    def page_lock(self, buffer: torch.Tensor, device: torch.device) -> Callable[[], None]:
        address, count = buffer.data_ptr(), buffer.numel()
        assert sum(self.locked.values()) == 0, "never two buffers at a time"
        self.asked.append(count)
        if self.refuses:
            raise RuntimeError("CUDA error: out of memory")
        self.locked[address] = count

        def unlock() -> None:
            assert self.locked.pop(address) == count
            assert buffer.numel() == count, "unlocked before it is freed"

        return unlock


def larger(step: int) -> list[Any]:
    return [*some(step), whole("b", "model", torch.full((1000,), float(step)))]


def test_a_driver_that_refuses_is_said_once_and_saves_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, said = Driver(monkeypatch, refuses=True), list[str]()
    store = CheckpointStore(tmp_path / "checkpoints", say=said.append)
    store.reserve(some(0))
    (line,) = said
    assert line.startswith("page-locking 128 bytes for saves failed (CUDA error: out of memory): ")
    for step in (1, 2):
        assert save(store, step).ok
    store.save(3, larger(3), RunState())
    assert [result.error for result in store.wait()] == [None]
    assert len(said) == len(driver.asked) == 1
    assert torch.equal(Checkpoint(store.shelf.path(2)).read("a"), torch.full((3,), 2.0))
    assert torch.equal(Checkpoint(store.shelf.path(3)).read("b"), torch.full((1000,), 3.0))


def test_memory_that_grows_is_unlocked_before_it_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, said = Driver(monkeypatch, refuses=False), list[str]()
    store = CheckpointStore(tmp_path / "checkpoints", say=said.append)
    for step in (1, 2):
        assert save(store, step).ok
    assert driver.asked == [128]
    for step in (3, 4):
        store.save(step, larger(step), RunState())
        assert [result.error for result in store.wait()] == [None]
    assert driver.asked == [128, 4096]
    assert list(driver.locked.values()) == [4096]
    assert said == []


def test_what_is_reserved_is_what_saves_with_optimizer_state_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(monkeypatch, refuses=False)
    store = CheckpointStore(tmp_path / "checkpoints")
    a, _, frozen = some(1)
    store.reserve(with_state_to_come([a, frozen], {"a": ("m",)}))
    assert save(store, 1).ok
    assert driver.asked == [128]
    assert [piece.key for piece in with_state_to_come(some(1), {"a": ("m", "v")})] == ["a", "a.m", "f", "a.v"]


def test_on_the_cpu_no_page_is_touched(tmp_path: Path) -> None:
    """400 MB are reserved, and the process grows by next to nothing."""
    script = """
import sys, torch
from pathlib import Path
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.save.store import CheckpointStore
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
store = CheckpointStore(sys.argv[1])
tensor = torch.empty(100_000_000)
store.reserve([Piece("w", "model", tensor[:10], (10,), (0,), (10,))])
before = resident()
store.reserve([Piece("w", "model", tensor, (100_000_000,), (0,), (100_000_000,))])
print(store._copy._buffer.numel(), resident() - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    held, grown = map(int, done.stdout.split())
    assert held == 400_000_000
    assert grown < 4_000_000


def train_and_look(config: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes held before the first step, at the end, and those that the last save took."""
    from configs.config import Config
    from trainer.life.stop import StopWish
    from trainer.run import Run
    from trainer.start import start

    found: list[int] = []

    def held(run: Run) -> int:
        return run.store._copy._buffer.numel()

    class Looked(Run):
        def build(self) -> None:
            super().build()
            found.append(held(self))

        def leave(self) -> None:
            files = plan_files(self.engine.pieces(), self.world.rank)
            found.extend([held(self), staging._places(staging._changing(files))[1]])
            super().leave()

    assert start(Config.model_validate(config), StopWish(), Looked) == 0
    before, after, taken = found
    return before, after, taken


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim__name": "sgd"},
        {"optim__name": "muon"},
        {"freeze__frozen": ["embed*", "blocks.0.*"]},
        {"parallel__engine": "zero", "parallel__zero_stage": 3},
        {"parallel__tensor": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "adamw",
)
def test_the_first_save_of_a_run_finds_its_memory(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Before the first update no optimizer state is there. Once more, when it was loaded."""
    config = tiny(tmp_path, **changes)
    for steps in (3, 6):
        config["train"]["steps"] = steps
        for before, after, taken in run_ranks(2, train_and_look, config):
            assert before == after == taken > 0


def test_a_run_that_saves_no_more_holds_nothing(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    run_ranks(1, train_and_look, config)
    ((before, after, _),) = run_ranks(1, train_and_look, config)
    assert before == after == 0
