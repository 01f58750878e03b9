"""Gradients over many micro batches, and updates that are skipped on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.config import Config
from tests.distributed import run_ranks, tiny
from trainer.data.batch import Batch
from trainer.engines.fsdp import FsdpEngine
from trainer.life.stop import StopWish
from trainer.ranks import world as worlds
from trainer.tasks.lm import LanguageModelling

MICRO_BATCHES = 64


def built(config: dict[str, Any]) -> FsdpEngine:
    checked = Config.model_validate(config)
    engine = FsdpEngine(checked, worlds.start(checked, wish=StopWish()), LanguageModelling(checked.task))
    engine.set_trainable(engine.parameters())
    engine.initialise(0)
    return engine


def batches(rank: int) -> list[Batch]:
    """All alike, so that each gradient is a 64th of the sum: as it is when a model learns the same from each."""
    tokens = torch.randint(0, 256, (1, 33), generator=torch.Generator().manual_seed(rank))
    return [Batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, 1)] * MICRO_BATCHES


def gradients(config: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(the gradients of a step, the fp64 sums of those of its micro batches taken alone), as this rank has them."""
    engine = built(config)
    scale, mine = (lambda: torch.tensor(1.0 / MICRO_BATCHES)), batches(engine.world.rank)
    alone: dict[str, torch.Tensor] = {}
    for batch in mine:
        engine.forward_backward(batch, scale, last=True)
        for name, gradient in engine.gradients().items():
            alone[name] = alone.get(name, torch.zeros(())) + gradient.double()
            gradient.zero_()
    for parameter in engine.stored.values():
        parameter.grad = None
    for number, batch in enumerate(mine, 1):
        engine.forward_backward(batch, scale, last=number == MICRO_BATCHES)
    together = {name: gradient.double().numpy() for name, gradient in engine.gradients().items()}
    worlds.leave()
    return together, {name: gradient.numpy() for name, gradient in alone.items()}


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, "sharded"), (2, "sharded"), (2, "unsharded")])
def test_bf16_gradients_of_many_micro_batches_lose_nothing(ranks: int, accumulate: str, tmp_path: Path) -> None:
    """As exact as bf16 can say a number: to 2 ** -9 of it. Added up in bf16 they were 3 % wrong."""
    config = tiny(tmp_path, precision__params="bf16", precision__compute="bf16", parallel__accumulate=accumulate)
    for together, alone in run_ranks(ranks, gradients, config):
        assert together.keys() == alone.keys()
        for name, exact in alone.items():
            wrong = np.linalg.norm(together[name] - exact) / np.linalg.norm(exact)
            assert wrong < 2**-9, name


def updated(config: dict[str, Any], good: list[bool]) -> tuple[dict[str, bytes], dict[str, int], list[bool]]:
    """What an engine holds after these updates, of which the good ones are the same each time, and which it applied."""
    engine = built(config)
    number, applied = 0, []
    for is_good in good:
        number += is_good
        batch = batches(10 * number + engine.world.rank)[0]
        factor = torch.tensor(1.0 if is_good else torch.nan)
        engine.forward_backward(batch, lambda factor=factor: factor, last=True)
        applied.append(bool(engine.update(1.0, 0.5).isfinite()))
    held = {piece.key: piece.tensor.detach().numpy().tobytes() for piece in engine.pieces()}
    counts = engine.step_counts()
    worlds.leave()
    return held, counts, applied


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("changes", [{"name": "sgd"}, {"name": "muon"}, {"name": "adamw", "l1": 0.01, "l2": 0.01}])
def test_a_skipped_update_leaves_no_trace(changes: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    """Not even the very first one, where torch's own fused SGD keeps memory as it found it as momentum."""
    config = tiny(tmp_path, optim={"lr": 1e-2, **changes})
    pattern = [False, True, False, False, True, False]
    skipping = run_ranks(ranks, updated, config, pattern)
    straight = run_ranks(ranks, updated, config, [True, True])
    for (held, counts, applied), (expected, expected_counts, _) in zip(skipping, straight, strict=True):
        assert applied == pattern
        assert held == expected
        assert counts == expected_counts
