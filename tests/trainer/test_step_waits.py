"""What a step does not wait for: a shared filesystem that does not answer, and a collector that comes when it likes."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.config import Config
from configs.errors import UserError
from configs.load import load
from models import build_model
from models.base import Model
from tests.distributed import run_ranks, tiny
from trainer.data.batch import StepBatch
from trainer.engines.named import Named
from trainer.host import garbage
from trainer.host.garbage import collect_everything, collect_if_due, collected_at_agreed_steps
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Heartbeat, Phase
from trainer.life.lookout import Lookout
from trainer.life.stop import StopWish
from trainer.ranks import world as worlds
from trainer.run import Run
from trainer.start import start

# ---- files ----------------------------------------------------------------------------------------------------------


def stalled(config: dict[str, Any], words: tuple[str, ...]) -> tuple[int, int]:
    """A run whose folder stops to answer once it trains: (exit code, looks that never came back)."""
    held: list[str] = []
    real: Callable[..., bool] = Path.exists
    is_file: Callable[..., bool] = Path.is_file

    class Stalled(Run):
        def close(self) -> None:
            Path.exists, Path.is_file = real, is_file  # type: ignore[method-assign, assignment]
            super().close()

        def record_samples(self, batch: StepBatch) -> None:
            time.sleep(0.05)  # so that some looks fall into these steps
            if batch.step == 2 and self.world.first:
                main = threading.get_ident()

                def waits(path: Path, **how: Any) -> bool:
                    if path.name in words and threading.get_ident() != main:
                        held.append(path.name)
                        time.sleep(3600)
                    assert path.name not in words, "the training thread looks at the folder"
                    return real(path, **how)

                Path.exists = Path.is_file = waits  # type: ignore[method-assign, assignment]

    return start(Config.model_validate(config), StopWish(), Stalled), len(held)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_does_not_answer_stops_no_step(ranks: int, tmp_path: Path) -> None:
    config = tiny(tmp_path, train__steps=12, checkpoint__every_steps=0)
    found = run_ranks(ranks, stalled, config, ("STOP", "PROFILE"), timeout_s=60)
    assert found == [(0, 1), (0, 0)][:ranks]


def test_a_look_that_fails_is_said_once_and_tried_again() -> None:
    said: list[str] = []
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        raise OSError("stale file handle")

    lookout = Lookout([look], said.append)
    deadline = time.monotonic() + 30
    while len(looks) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lookout.close()
    assert said == ["cannot look for a wish to stop or for a profile: stale file handle; trying again"]


def test_a_stop_file_is_seen_by_the_thread(tmp_path: Path) -> None:
    """Within a second or so, at an agreed step, on a run that would take a minute."""
    config = tiny(tmp_path, train__steps=1200, checkpoint__every_steps=0)
    assert run_ranks(2, touching, config, timeout_s=60) == [3, 3]
    assert RunFolder(Path(config["run"]["dir"])).newest_checkpoint()[0] < 600


def touching(config: dict[str, Any]) -> int:
    class Touching(Run):
        def record_samples(self, batch: StepBatch) -> None:
            time.sleep(0.05)
            if batch.step == 3 and self.world.rank == 1:
                self.folder.stop.touch()

    return start(Config.model_validate(config), StopWish(), Touching)


# ---- Python's collector ---------------------------------------------------------------------------------------------


def collections_of(config: dict[str, Any]) -> list[int]:
    """The steps that were being made, or had just been made, when this rank's collector ran."""
    steps: list[int] = []

    class Counted(Run):
        def record_samples(self, batch: StepBatch) -> None:
            rubbish: list[Any] = [[] for _ in range(5000)]  # enough for the collector to come by itself
            rubbish.append(rubbish)

        def build(self) -> None:
            super().build()
            gc.callbacks.append(lambda when, info: steps.append(self.progress.step) if when == "start" else None)

    garbage.EVERY_STEPS = 4
    assert start(Config.model_validate(config), StopWish(), Counted) == 0
    assert gc.isenabled()
    return [step for step in steps if 0 < step < config["train"]["steps"]]


def test_all_ranks_collect_at_the_same_steps(tmp_path: Path) -> None:
    config = tiny(tmp_path, train__steps=10, checkpoint__every_steps=0)
    assert run_ranks(2, collections_of, config) == [[4, 8], [4, 8]]


def test_garbage_is_collected_when_it_is_due() -> None:
    class Node:
        pass

    def made() -> list[bool]:
        """Filled as long as a node lives that nothing refers to but itself."""
        node, alive = Node(), [True]
        node.itself = node  # type: ignore[attr-defined]
        weakref.finalize(node, alive.clear)
        return alive

    frozen = gc.get_freeze_count()
    with collected_at_agreed_steps():
        young = made()
        collect_if_due(garbage.EVERY_STEPS + 1)
        assert young
        collect_if_due(2 * garbage.EVERY_STEPS)
        assert not young
        engine = made()
        gc.freeze()  # as one that was alive when training began
        collect_if_due(3 * garbage.EVERY_STEPS)
        assert engine
        collect_everything()
        assert not engine
    assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen


# ---- a GPU's time, memory and buffers -------------------------------------------------------------------------------


def test_time_that_a_gpu_waited_for_others_counts_as_communicating() -> None:
    heartbeat = Heartbeat()
    heartbeat.enter(Phase.COMPUTING)
    time.sleep(0.2)
    heartbeat.enter(Phase.SAVING)
    before = heartbeat.seconds()
    heartbeat.count_as(Phase.COMMUNICATING, 0.15)
    after = heartbeat.seconds()
    assert after["communicating"] == pytest.approx(0.15, abs=2e-3)
    assert after["computing"] == pytest.approx(before["computing"] - 0.15, abs=2e-3)
    heartbeat.count_as(Phase.COMMUNICATING, 1e6)  # more than there is cannot be taken
    assert heartbeat.seconds().get("computing", 0.0) == 0.0


@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}])
@pytest.mark.parametrize("tf32", [False, True])
def test_what_a_gpu_is_told_first(given: dict[str, str], tf32: bool) -> None:
    environ, before = dict(given), torch.get_float32_matmul_precision()
    try:
        worlds._settle_cuda(load("demo", [f"precision.tf32={str(tf32).lower()}"]), environ)
        assert environ == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})  # a person's word counts
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_buffer_that_nobody_fills_is_refused() -> None:
    """Memory as it was found would go into each product, silently: to_empty leaves it in rotary tables and masks."""
    config = load("demo", [])

    def made(fill: Callable[[torch.nn.Module], object]) -> Model:
        with torch.device("meta"):
            model = build_model(config.model)
            model.module.register_buffer("table", torch.empty(3), persistent=False)
        return Model(**{**vars(model), "rebuild_buffers": fill})  # type: ignore[arg-type]

    def named(fill: Callable[[torch.nn.Module], object]) -> Named:
        engine = Named(made(fill))
        engine.config = config
        engine.model.to_empty(device="cpu")
        return engine

    named(lambda module: module.get_buffer("table").fill_(1.0))._rebuild_buffers()
    with pytest.raises(UserError, match="no checkpoint holds the buffer 'table', and the model does not fill it"):
        named(lambda module: None)._rebuild_buffers()
