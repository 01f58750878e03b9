"""One optimizer step: the only one there is, whatever the engine, layout and task."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.config import Config
from trainer.agreement import Agreement
from trainer.data.batch import StepBatch
from trainer.engines.base import Engine
from trainer.life.heartbeat import Phase
from trainer.ranks.seeds import seed_micro_batch
from trainer.schedule import lr_factor


class RunFailed(Exception):
    """Going on makes no sense and starting again would not help. Raised on all ranks alike."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class StepResult:
    """What one step gave. `sums` are this rank's, on the device; `weights` those of all ranks. After a skipped update
    `bad_samples` are those whose loss was not finite on this rank; `bad_loss` says whether any rank has such."""

    sums: torch.Tensor
    weights: tuple[float, ...]
    grad_norm: float
    lr_factor: float
    applied: bool
    bad_samples: list[int]
    bad_loss: bool


def train_step(
    engine: Engine,
    batch: StepBatch,
    step: int,
    config: Config,
    agreement: Agreement,
    computing: Phase = Phase.COMPUTING,
) -> StepResult:
    """Make update number `step` (1-based) from this rank's share of the global batch.

    The loss is divided by its weight (for tokens: the count of targets) over all ranks and micro batches, so every
    target weighs the same wherever it falls. `computing` is what the monitor is told that it does. Raises RunFailed
    when the weight is 0.
    """
    # The one collective before the first forward; it carries the wish to stop as well.
    heartbeat = agreement.world.heartbeat
    heartbeat.enter(Phase.COMMUNICATING)
    weights = agreement.sum(list(batch.weights))
    heartbeat.enter(computing)
    scale = (1.0 / weights[0]).float()
    losses = []
    for i, micro_batch in enumerate(batch.batches):
        seed_micro_batch(config.run.seed, step, i, agreement.world.rank)
        last = i == len(batch.batches) - 1
        losses.append(engine.forward_backward(micro_batch.to(engine.device), scale, last))
        heartbeat.beat()
    sums = torch.stack(losses).sum(0)
    factor = lr_factor(config.optim, step, config.train.steps)
    norm = engine.update(factor, config.train.clip_norm)
    applied = norm == norm and norm != float("inf")
    divisors = tuple(weights.tolist())
    if divisors[0] == 0:  # nothing was updated: the scale was infinite, so the norm is no number
        raise RunFailed("no_targets", f"step {step}: no sample of the global batch has a target")
    bad = [] if applied or not agreement.world.counts else _samples_of_bad_losses(batch, losses)
    bad_loss = not applied and float(agreement.sum([float(bool(bad))])[0]) > 0  # all ranks skipped, so all are here
    return StepResult(sums, divisors, norm, factor, applied, bad, bad_loss)


def _samples_of_bad_losses(batch: StepBatch, losses: list[torch.Tensor]) -> list[int]:
    """Sample numbers of the micro batches whose loss, the first column, is not finite."""
    found: list[int] = []
    begin = 0
    for micro_batch, columns in zip(batch.batches, losses, strict=True):
        end = begin + micro_batch.size
        if not torch.isfinite(columns[0]):
            found += [int(n) for n in batch.samples[begin:end]]
        begin = end
    return found
