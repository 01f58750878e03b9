"""The training loop: the first file to read.

`trainer.step` makes one update. This file decides when to stop, log, validate and save; `trainer.attempt` makes the
last save. All ranks must take the same branches: a branch may contain collectives, which hang without one of the ranks.
"""

from __future__ import annotations

import math
import time

from configs.config import Config
from configs.errors import UserError
from trainer.agreement import Agreement
from trainer.health import Health
from trainer.host.garbage import collect_if_due
from trainer.life.heartbeat import Phase
from trainer.life.stop import Cause, Kind
from trainer.progress import due
from trainer.run import Run
from trainer.step import QueuedStep, RunFailed, StepResult, train_step
from trainer.tasks.base import best_metric, mean_loss, named
from trainer.validation import validate


def train(run: Run) -> Cause | None:
    """Train to `train.steps`. Returns the cause of a stop request, or None if training ended by itself.

    Raises RunFailed, on all ranks alike, when training cannot go on.
    """
    config, progress = run.config, run.progress
    agreement = Agreement(run.world, run.wish, run.profiling.asked)
    health = Health(config, progress, run.events, run.world.first)
    unread: QueuedStep | None = None  # the last step, if its norm, sums and wishes are not read yet
    cause = agreement.now()  # a stop request that arrived during start-up
    cause = validate_if_due(run, agreement, cause)  # a validation that a stop prevented in the last attempt
    run.profiling.after_step(progress.step, asked=False)
    while cause is None and progress.step < config.train.steps and not stopped_early(run):
        run.follow_freeze_schedule()
        run.world.heartbeat.enter(Phase.WAITING_FOR_DATA, progress.step + 1)
        began = time.perf_counter()
        batch = next(run.loader)
        run.record_samples(batch)
        queued = train_step(run.engine, batch, config, agreement, row_is_due(config, batch.step), run.step_phase)
        progress.step = batch.step
        progress.consumed_samples = batch.consumed_samples
        # The step before this one: its numbers are read only after queueing this one, so that a GPU is never idle.
        take_result(run, unread, agreement, health)
        run.meter.add(time.perf_counter() - began, run.loader.wait_s, batch.cost)
        unread = queued
        if not run.first_step_done or must_be_known(config, progress.step):
            take_result(run, unread, agreement, health)  # this step itself
            unread = None
            run.after_first_step()
        cause = agreement.outcome()  # from the wishes that `take_result` read last
        run.profiling.after_step(progress.step, agreement.profile())
        cause = validate_if_due(run, agreement, cause)
        keeps_best = progress.is_best and config.checkpoint.keep.best
        if cause is None and (due(progress.step, config.checkpoint.every_steps) or keeps_best):
            run.save()
        run.poll_saves()
        collect_if_due(progress.step)
    take_result(run, unread, agreement, health)
    if cause is None:
        cause = measure_test_split(run, agreement)
    if cause is not None and cause.kind is Kind.FAIL:
        raise RunFailed(cause.word, "the run was ended by the failure said above")
    return cause


def take_result(run: Run, queued: QueuedStep | None, agreement: Agreement, health: Health) -> None:
    """Read a step's numbers and act on them. Waits until a GPU has finished this step; later steps may still run."""
    if queued is None:
        return
    result = queued.result(agreement)
    health.check(result)
    if run.world.first and row_is_due(run.config, result.step):
        write_row(run, result)


def row_is_due(config: Config, step: int) -> bool:
    """Whether this step writes a row to metrics.jsonl."""
    return due(step, config.run.log_every_steps) or step == config.train.steps


def must_be_known(config: Config, step: int) -> bool:
    """Whether a save, a validation, a change of what trains, or the end follows. It needs this step's numbers now."""
    every = (config.checkpoint.every_steps, config.train.validate_every_steps)
    changes = any(change.step == step for change in config.freeze.schedule)
    return step == config.train.steps or changes or any(due(step, steps) for steps in every)


def validate_if_due(run: Run, agreement: Agreement, cause: Cause | None) -> Cause | None:
    """Validate when it is due. Returns the cause of a stop request, if there is one. If a stop prevents or interrupts
    a validation, the next start of the run makes it."""
    train, progress = run.config.train, run.progress
    every, step = train.validate_every_steps, progress.step
    is_due = every > 0 and 0 < step != progress.validated_step and (due(step, every) or step == train.steps)
    if cause is not None or not is_due:
        return cause
    with run.world.heartbeat.during(Phase.VALIDATING):
        values = validate(run.engine, run.task, run.held_out, agreement)
    if values is not None:
        take_validation(run, values)
    return agreement.outcome()


def measure_test_split(run: Run, agreement: Agreement) -> Cause | None:
    """Write the metrics of the test split, if there is one. Returns the cause of a stop that interrupted it: then the
    next start of the run measures again."""
    if not len(run.test_set):
        return None
    with run.world.heartbeat.during(Phase.VALIDATING):
        values = validate(run.engine, run.task, run.test_set, agreement)
    if values is not None and run.world.first:
        run.meter.validation(run.progress.step, {f"test_{name}": value for name, value in values.items()})
    return agreement.outcome() if values is None else None


def stopped_early(run: Run) -> bool:
    """Whether `train.best_metric` has not become better in the last `train.early_stop_patience` validations."""
    patience = run.config.train.early_stop_patience
    return patience > 0 and run.progress.validations_without_better >= patience


def write_row(run: Run, result: StepResult) -> None:
    """Write the step's row."""
    values = mean_loss(run.task, named(run.task, result.sums, result.weights))
    if run.task.unit == "tokens":
        values["target_tokens"] = int(result.weights[0])
    norm = result.grad_norm if result.applied else None
    run.meter.row(result.step, result.batch.consumed_samples, values, result.lr_factor, norm)


def take_validation(run: Run, values: dict[str, float]) -> None:
    """Record a validation's metrics. The values are the same on all ranks."""
    progress, (metric, better_is) = run.progress, best_metric(run.task, run.config)
    progress.validated_step = progress.step
    if metric not in values:
        raise UserError(f"task.name {run.config.task.name}: `better` names {metric!r}, which `metrics` does not give")
    value = values[metric]  # NaN where the samples are too few for it: never better
    score = value if better_is == "min" else -value
    better = math.isfinite(score) and (progress.best_score is None or score < progress.best_score)
    progress.best_score = score if better else progress.best_score
    progress.validations_without_better = 0 if better else progress.validations_without_better + 1
    if run.world.first:
        run.meter.validation(progress.step, {f"validation_{name}": value for name, value in values.items()})
