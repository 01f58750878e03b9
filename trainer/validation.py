"""Metrics of held-out samples."""

from __future__ import annotations

import torch

from trainer.agreement import Agreement
from trainer.data.loader import HeldOut, weigh
from trainer.engines.base import Engine
from trainer.ranks.device import Reading
from trainer.tasks.base import Task, named


def validate(engine: Engine, task: Task, held_out: HeldOut, agreement: Agreement) -> dict[str, float] | None:
    """The task's metrics over all ranks; None when a wish to stop came before the last batch.

    Sums and wishes are agreed together after each batch, so that a long validation can be left, by all ranks at the
    same place.
    """
    world = agreement.world
    total: torch.Tensor | None = None
    for number, batches in enumerate(held_out, 1):
        weights = weigh(task, batches)
        sums = torch.stack([engine.evaluate(batch.to(world.device)) for batch in batches]).sum(0)
        agreed = agreement.sum(weights, on_device=sums)
        total = agreed.sums if total is None else total + agreed.sums
        agreement.heard(Reading(agreed.wishes).values())
        world.heartbeat.beat()
        if agreement.outcome() is not None and number < len(held_out):
            return None
    assert total is not None  # the preparation refuses a run that validates without held-out samples
    values = total.tolist()
    return task.metrics(named(task, values[: len(task.columns)], values[len(task.columns) :]))
