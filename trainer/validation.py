"""Held-out loss over a fixed set of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models import IGNORE
from trainer.agreement import Agreement

if TYPE_CHECKING:
    from trainer.run import Run


def validate(run: Run, agreement: Agreement) -> dict[str, float] | None:
    """The task's validation metrics over all ranks; None when a wish to stop came before the last batch.

    Sums and wishes are agreed together after each batch, so that a long validation can be left, by all ranks at the
    same place.
    """
    total: torch.Tensor | None = None
    for number, micro_batches in enumerate(run.validation, 1):
        targets = sum(int((m.targets != IGNORE).sum()) for m in micro_batches)
        sums = torch.stack([run.engine.evaluate(m.to(run.world.device)) for m in micro_batches]).sum(0)
        agreed = agreement.sum(torch.cat([sums, sums.new_tensor([float(targets)])]))
        total = agreed if total is None else total + agreed
        run.world.heartbeat.beat()
        if run.world.device.type == "cuda":
            torch.cuda.synchronize()
        if agreement.outcome() is not None and number < len(run.validation):
            return None
    assert total is not None  # the preparation refuses a run that validates without held-out samples
    return run.task.validation_metrics(total[:-1], int(total[-1]))
