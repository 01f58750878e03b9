"""One optimizer step: the only one there is, whatever the engine, layout and task.

`Task.sums` computes the loss, `Engine.forward_backward` its gradients. On a GPU a step only queues work: the host does
not wait. It reads the step's numbers in one copy, after it has queued the next step (`QueuedStep.result`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from configs.config import Config
from trainer.agreement import WISHES, Agreed, Agreement
from trainer.data.batch import StepBatch
from trainer.engines.base import Engine
from trainer.life.heartbeat import Phase
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
    """The numbers of one step. `weights` and `sums` are summed over all ranks; `sums` is empty without `with_sums`.

    After a skipped update, `bad_samples` are all samples of this rank's micro batches with a loss that is not finite.
    `bad_loss` says whether any rank has such a micro batch."""

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
    """A step that the device may still be computing."""

    batch: StepBatch
    columns: list[torch.Tensor]  # of each micro batch of this rank: the task's sums, fp64 [columns]; the loss is first
    lr_factor: float
    agreed: Agreed
    facts: Reading  # the norm, then the weights, the wishes, and the sums if they were asked for

    def result(self, agreement: Agreement) -> StepResult:
        """Wait for the step, and hand its wishes to `agreement`. All ranks must call it together: after a skipped
        update it runs a collective. Raises RunFailed when the first weight, summed over all ranks, is 0."""
        norm, *values = self.facts.values()
        weights, wishes, sums = _cut(values, len(self.batch.weights), WISHES)
        agreement.heard(wishes)
        world = agreement.world
        # Of the time that the host spent waiting for the GPU, this part was spent waiting for other ranks.
        world.heartbeat.count_as(Phase.COMMUNICATING, self.agreed.took.seconds())
        if weights[0] == 0:  # the scale was infinite, the gradients NaN, so every rank has skipped this update
            raise RunFailed("no_targets", f"step {self.batch.step}: no sample of the global batch has a target")
        applied = math.isfinite(norm)
        bad: list[int] = []
        bad_loss = False
        if not applied:  # the norm is the same on all ranks, so all ranks enter this branch
            bad = _samples_of_bad_losses(self.batch, self.columns) if world.counts else []
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

    The summed loss is divided by the summed weight (for tokens: the count of targets) of all ranks and micro batches.
    So each target counts the same on any rank. with_sums: also sum the task's columns over all ranks, for a row; it
    costs one more collective. computing: the phase that the monitor sees, COMPILING or COMPUTING.
    """
    heartbeat = agreement.world.heartbeat
    heartbeat.enter(computing)
    # It carries the wishes to stop, too. It goes on during the first forward: only backward needs the scale.
    agreed = agreement.sum(batch.weights)
    columns = []
    for i, micro_batch in enumerate(batch.batches):
        seed_micro_batch(config.run.seed, batch.step, i, agreement.world.rank)
        last = i == len(batch.batches) - 1
        columns.append(engine.forward_backward(micro_batch.to(engine.device), agreed.scale, last))
        heartbeat.beat()
    factor = lr_factor(config.optim, batch.step, config.train.steps)
    norm = engine.update(factor, config.train.clip_norm)
    facts = [norm.reshape(1), agreed.sums, agreed.wishes]
    if with_sums:
        facts.append(agreement.world.sum_data(torch.stack(columns).sum(0)))
    return QueuedStep(batch, columns, factor, agreed, Reading(torch.cat(facts)))


def _cut(values: list[float], first: int, second: int) -> tuple[list[float], list[float], list[float]]:
    return values[:first], values[first : first + second], values[first + second :]


def _samples_of_bad_losses(batch: StepBatch, columns: list[torch.Tensor]) -> list[int]:
    """Sample numbers of the micro batches whose loss, the first column, is not finite."""
    found: list[int] = []
    begin = 0
    for micro_batch, sums in zip(batch.batches, columns, strict=True):
        end = begin + micro_batch.size
        if not torch.isfinite(sums[0]):
            found += [int(n) for n in batch.samples[begin:end]]
        begin = end
    return found
