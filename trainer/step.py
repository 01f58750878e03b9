"""One optimizer step: the only one there is, whatever the engine, layout and task.

On a GPU a step is queued, not made: nothing here waits for the device. What came of the step is read while the next
one runs, in one copy of a few numbers (`QueuedStep.result`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from configs.config import Config
from trainer.agreement import Agreed, Agreement
from trainer.data.batch import StepBatch
from trainer.engines.base import Engine
from trainer.life.heartbeat import Phase
from trainer.life.stop import Kind
from trainer.ranks.device import Reading
from trainer.ranks.seeds import seed_micro_batch
from trainer.schedule import lr_factor


class RunFailed(Exception):
    """Going on makes no sense and starting again would not help. Raised on all ranks alike."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class StepResult:
    """What came of one step. `sums` and `weights` are those of all ranks; `sums` only where they were asked for.

    After a skipped update `bad_samples` are those whose loss was not finite on this rank; `bad_loss` says whether any
    rank has such."""

    step: int
    batch: StepBatch
    sums: list[float]
    weights: list[float]
    grad_norm: float
    lr_factor: float
    applied: bool
    bad_samples: list[int]
    bad_loss: bool


@dataclass(frozen=True)
class QueuedStep:
    """A step that the device may still be at."""

    batch: StepBatch
    losses: list[torch.Tensor]  # by micro batch: this rank's sums, fp64 [columns]
    lr_factor: float
    agreed: Agreed
    facts: Reading  # the norm, then the weights, the wishes, and the sums if they were asked for

    def result(self, agreement: Agreement) -> StepResult:
        """Wait for the step, and tell `agreement` which wishes it carried. All ranks call it at the same place: after a
        skipped update it holds a collective. Raises RunFailed when the weight is 0."""
        norm, *values = self.facts.values()
        weights, wishes, sums = _cut(values, len(self.batch.weights), len(Kind) + 1)
        agreement.heard(wishes)
        world = agreement.world
        world.heartbeat.count_as(Phase.COMMUNICATING, self.agreed.took.seconds())
        if weights[0] == 0:  # the scale was infinite, so the norm is no number, and no rank has updated anything
            raise RunFailed("no_targets", f"step {self.batch.step}: no sample of the global batch has a target")
        applied = math.isfinite(norm)
        bad: list[int] = []
        bad_loss = False
        if not applied:  # the norm is that of all ranks, so all ranks are here
            bad = _samples_of_bad_losses(self.batch, self.losses) if world.counts else []
            bad_loss = Reading(agreement.sum([float(bool(bad))]).sums).values()[0] > 0
        return StepResult(self.batch.step, self.batch, sums, weights, norm, self.lr_factor, applied, bad, bad_loss)


def train_step(
    engine: Engine,
    batch: StepBatch,
    config: Config,
    agreement: Agreement,
    with_sums: bool,
    computing: Phase = Phase.COMPUTING,
) -> QueuedStep:
    """Make update number `batch.step` (from 1) from this rank's share of the global batch.

    The loss is divided by its weight (for tokens: the count of targets) over all ranks and micro batches, so every
    target weighs the same wherever it falls. with_sums: whether the result shall have the task's sums over all ranks,
    which is a collective more. `computing` is what the monitor is told that it does.
    """
    # The one collective before the first forward; it carries the wish to stop as well.
    heartbeat = agreement.world.heartbeat
    heartbeat.enter(Phase.COMMUNICATING)
    agreed = agreement.sum(batch.weights)
    heartbeat.enter(computing)
    scale = (1.0 / agreed.sums[0]).float()
    losses = []
    for i, micro_batch in enumerate(batch.batches):
        seed_micro_batch(config.run.seed, batch.step, i, agreement.world.rank)
        last = i == len(batch.batches) - 1
        losses.append(engine.forward_backward(micro_batch.to(engine.device), scale, last))
        heartbeat.beat()
    factor = lr_factor(config.optim, batch.step, config.train.steps)
    norm = engine.update(factor, config.train.clip_norm)
    facts = [norm.reshape(1), agreed.sums, agreed.wishes]
    if with_sums:
        facts.append(agreement.world.sum_data(torch.stack(losses).sum(0)))
    return QueuedStep(batch, losses, factor, agreed, Reading(torch.cat(facts)))


def _cut(values: list[float], first: int, second: int) -> tuple[list[float], list[float], list[float]]:
    return values[:first], values[first : first + second], values[first + second :]


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
