"""Held-out loss over a fixed set of samples."""

from __future__ import annotations

import torch

from models import IGNORE
from trainer.agreement import Agreement
from trainer.data.loader import ValidationBatches
from trainer.engines.base import Engine
from trainer.tasks.lm import LanguageModelling


def validate(
    engine: Engine, task: LanguageModelling, batches: ValidationBatches, agreement: Agreement
) -> dict[str, float] | None:
    """The task's validation metrics over all ranks; None when a wish to stop came before the last batch.

    Sums and wishes are agreed together after each batch, so that a long validation can be left, by all ranks at the
    same place.
    """
    world = agreement.world
    total: torch.Tensor | None = None
    for number, micro_batches in enumerate(batches, 1):
        targets = sum(int((m.targets != IGNORE).sum()) for m in micro_batches)
        sums = torch.stack([engine.evaluate(m.to(world.device)) for m in micro_batches]).sum(0)
        agreed = agreement.sum(torch.cat([sums, sums.new_tensor([float(targets)])]))
        total = agreed if total is None else total + agreed
        world.heartbeat.beat()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        if agreement.outcome() is not None and number < len(batches):
            return None
    assert total is not None  # the preparation refuses a run that validates without held-out samples
    return task.validation_metrics(total[:-1], int(total[-1]))
