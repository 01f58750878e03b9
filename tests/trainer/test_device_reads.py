"""What a step asks of its device. On a GPU each of these waits until the device has done all that is queued."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from configs.config import Config
from tests.distributed import run_ranks, tiny
from trainer.data.batch import StepBatch
from trainer.life.stop import StopWish
from trainer.run import Run
from trainer.start import start

STEPS = 9
WATCHED = range(4, STEPS)  # none of these is the first, the last, or has a save or a validation
READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__")
MAKES = (torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.Tensor.new_tensor)
OPERATIONS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique2"}

Counts = dict[int, Counter[str]]


class Calls(TorchFunctionMode):
    """What Python asks of a tensor, or makes a tensor of."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in READS and any(func is getattr(torch.Tensor, read, None) for read in READS):
            self.counts["read"] += 1
        elif func in MAKES:
            self.counts["made"] += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """What libtorch does by itself: it also reads in places where Python shows no call."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in OPERATIONS:
            self.counts["read by libtorch"] += 1
        return func(*args, **(kwargs or {}))


class Watched(Run):
    """Counts between the batches of two steps."""

    def build(self) -> None:
        super().build()
        self.counts: Counter[str] = Counter()
        self.by_step: Counts = {}
        self.modes = (Calls(self.counts), Operations(self.counts))

    def record_samples(self, batch: StepBatch) -> None:
        super().record_samples(batch)
        if batch.step - 1 in WATCHED:
            self.by_step[batch.step - 1] = Counter(self.counts)
        if batch.step == WATCHED.start:
            for mode in self.modes:
                mode.__enter__()
        elif batch.step == WATCHED.stop:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)
        self.counts.clear()


def counted(config: dict[str, Any]) -> Counts:
    found: list[Counts] = []

    class Kept(Watched):
        def leave(self) -> None:
            found.append(self.by_step)
            super().leave()

    assert start(Config.model_validate(config), StopWish(), Kept) == 0
    return found[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_step_reads_once(optimizer: str, ranks: int, tmp_path: Path) -> None:
    config = tiny(tmp_path, train__steps=STEPS, train__clip_norm=0.1, run__log_every_steps=3, optim__name=optimizer)
    config["checkpoint"] = {**config.get("checkpoint", {}), "every_steps": 0}
    for counts in run_ranks(ranks, counted, config):
        assert counts == {step: {"read": 1, "made": 1} for step in WATCHED}
