"""The training loop: the first file to read.

A step is made by `trainer.step`; here is what stands around it: leaving at an agreed step, logging, validating, saving.
Every rank runs this loop and takes each branch alike, because each branch may hold collectives.
"""

from __future__ import annotations

import math
import time

from configs.config import Config
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
    """Train to `train.steps`. Returns why it stopped before, None when it did not.

    Raises RunFailed, on all ranks alike, when going on makes no sense.
    """
    config, progress = run.config, run.progress
    agreement = Agreement(run.world, run.wish, run.profiling.asked)
    health = Health(config, progress, run.events, run.world.first)
    before: QueuedStep | None = None  # the step before: queued, but what came of it is not read yet
    cause = agreement.now()  # a wish that came while everything was being built
    cause = validate_if_due(run, agreement, cause)  # one that a stop left undone
    run.profiling.after_step(progress.step, asked=False)
    while cause is None and progress.step < config.train.steps and not stopped_early(run):
        run.follow_freeze_schedule()
        run.world.heartbeat.enter(Phase.WAITING_FOR_DATA, progress.step + 1)
        began = time.perf_counter()
        batch = next(run.loader)
        run.record_samples(batch)
        queued = train_step(run.engine, batch, config, agreement, logs(config, batch.step), run.step_phase)
        progress.step = batch.step
        progress.consumed_samples = batch.consumed_samples
        take_result(run, before, agreement, health)  # only now, so that a GPU always has a step to work at
        run.meter.add(time.perf_counter() - began, run.loader.wait_s, batch.cost)
        before = queued
        if not run.first_step_done or must_be_known(config, progress.step):
            take_result(run, before, agreement, health)
            before = None
            run.after_first_step()
        cause = agreement.outcome()  # the wishes that the last reduction that was read carried
        run.profiling.after_step(progress.step, agreement.profile())
        cause = validate_if_due(run, agreement, cause)
        keeps_best = progress.is_best and config.checkpoint.keep.best
        if cause is None and (due(progress.step, config.checkpoint.every_steps) or keeps_best):
            run.save()
        run.poll_saves()
        collect_if_due(progress.step)
    take_result(run, before, agreement, health)
    if cause is None:
        cause = test(run, agreement)
    if cause is not None and cause.kind is Kind.FAIL:
        raise RunFailed(cause.word, "the run was ended by the failure said above")
    return cause


def take_result(run: Run, queued: QueuedStep | None, agreement: Agreement, health: Health) -> None:
    """Read what came of a step, and act on it. It waits for the device, and not for what was queued after that step."""
    if queued is None:
        return
    result = queued.result(agreement)
    health.check(result)
    if run.world.first and logs(run.config, result.step):
        log(run, result)


def logs(config: Config, step: int) -> bool:
    """Whether this step gets a row."""
    return due(step, config.run.log_every_steps) or step == config.train.steps


def must_be_known(config: Config, step: int) -> bool:
    """Whether something follows this step that needs to know what came of it: a save, a validation, the end."""
    every = (config.checkpoint.every_steps, config.train.validate_every_steps)
    changes = any(change.step == step for change in config.freeze.schedule)
    return step == config.train.steps or changes or any(due(step, steps) for steps in every)


def validate_if_due(run: Run, agreement: Agreement, cause: Cause | None) -> Cause | None:
    """Validate when it is due, and return the wish to stop, if there is one. A validation that a stop prevents or
    interrupts is done by the next start."""
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


def test(run: Run, agreement: Agreement) -> Cause | None:
    """Metrics of the test split, where there is one, with the weights of the last step. Returns a wish to stop that
    came in between: then the next start makes up for it."""
    if not len(run.test_set):
        return None
    with run.world.heartbeat.during(Phase.VALIDATING):
        values = validate(run.engine, run.task, run.test_set, agreement)
    if values is not None and run.world.first:
        run.meter.validation(run.progress.step, {f"test_{name}": value for name, value in values.items()})
    return agreement.outcome() if values is None else None


def stopped_early(run: Run) -> bool:
    """Whether the held-out loss has not fallen for as long as the config allows."""
    patience = run.config.train.early_stop_patience
    return patience > 0 and run.progress.validations_without_better >= patience


def log(run: Run, result: StepResult) -> None:
    """Write the step's row."""
    values = mean_loss(run.task, named(run.task, result.sums, result.weights))
    if run.task.unit == "tokens":
        values["target_tokens"] = int(result.weights[0])
    norm = result.grad_norm if result.applied else None
    run.meter.row(result.step, result.batch.consumed_samples, values, result.lr_factor, norm)


def take_validation(run: Run, values: dict[str, float]) -> None:
    """Note a validation's outcome. The values are the same on all ranks."""
    progress, (metric, better_is) = run.progress, best_metric(run.task, run.config)
    progress.validated_step = progress.step
    value = values.get(metric, math.nan)  # too few samples to tell
    score = value if better_is == "min" else -value
    better = math.isfinite(score) and (progress.best_score is None or score < progress.best_score)
    progress.best_score = score if better else progress.best_score
    progress.validations_without_better = 0 if better else progress.validations_without_better + 1
    if run.world.first:
        run.meter.validation(progress.step, {f"validation_{name}": value for name, value in values.items()})
