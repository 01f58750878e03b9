"""One attempt of a run: from the folder and its lease to `end.json`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from configs.config import Config
from configs.errors import UserError
from trainer.host.console import Console
from trainer.host.garbage import collected_at_agreed_steps
from trainer.host.terminal import say
from trainer.life import attempts as life
from trainer.life.attempts import Attempt, End
from trainer.life.events import UNWRITABLE, tolerate_unwritable
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Phase
from trainer.life.lease import Lease, writable
from trainer.life.stop import Cause, Kind, StopRequested, StopWish
from trainer.loop import train
from trainer.preflight import check_folder, write_config
from trainer.ranks.world import World
from trainer.run import Run
from trainer.schedule import rate_change, remarks
from trainer.shown.summary import Size, end_lines, start_lines
from trainer.step import RunFailed

Changes = list[dict[str, Any]]  # admitted differences from the config that a folder was begun with


class Recorded(Exception):
    """A failure that stands in the log and the events already."""


def live(run: Run) -> End:
    """Train, save what is not saved, and say how it ended. The same on every rank."""
    with _closed_at_the_end(run), collected_at_agreed_steps():
        try:
            cause = train(run)
            run.save_now()
            run.world.heartbeat.enter(Phase.LEAVING)
        except RunFailed as failure:
            run.poll_saves(wait=True)
            run.console.say(f"FAILED: {failure}")
            newest = run.folder.newest_checkpoint()[1]
            return End("failed", run.progress.step, newest, requeue=False, cause=failure.cause)
        if cause is None:
            _show(run)
    if cause is None:
        return End("finished", run.progress.step, run.folder.newest_checkpoint()[1], requeue=False)
    return stopped(run, cause)


def _show(run: Run) -> None:
    """What the task shows of a finished run."""
    engine = run.engine
    text = run.task.show(engine.call, run.config, engine.device, run.progress.step)
    if text is not None:
        run.console.end_live()
        run.console.say(text)


@contextmanager
def _closed_at_the_end(run: Run) -> Iterator[None]:
    """After a failure, what cannot be closed must not take the place of the first cause."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            run.close()
        raise
    run.close()


def stopped(run: Run, cause: Cause) -> End:
    """An agreed stop. A collective: some ranks may know only that another one asked for it."""
    known = [c for c in run.world.gather(run.wish.poll()) if c is not None and c.kind is cause.kind]
    cause = known[0] if known else cause
    committed, name = run.folder.newest_checkpoint()
    step = run.progress.step or committed  # perhaps nothing is loaded yet
    run.events.write("stop_requested", cause=cause.word, step=step)
    return End("stopped", step, name, cause.kind is Kind.REQUEUE, cause.word)


@contextmanager
def run_folder(config: Config, world: World, console: Console) -> Iterator[tuple[RunFolder, Attempt, Changes]]:
    """The run folder under its lease, with a new attempt. After a user error nothing of this start is left in it."""
    folder = RunFolder(Path(config.run_dir))
    changes = world.from_first(lambda: check_folder(config, folder))
    holder: list[Lease] = []

    def take() -> int:
        number = max(life.numbers(folder), default=-1) + 1
        lease = Lease.inherited(folder)
        if lease is None:
            holder.append(Lease.take(folder, world.node, number, console.say))
        with writable(folder.root):
            return Attempt.open(folder).number

    attempt = Attempt(folder, world.from_first(take))
    refused = False
    try:
        yield folder, attempt, changes
    except UserError:
        refused = True
        raise
    finally:
        for lease in holder:
            lease.release()
        if refused and world.first:
            attempt.discard()


def run_attempt(config: Config, wish: StopWish, world: World, kind: type[Run]) -> End:
    """One attempt, from the folder to its end. Raises UserError, or Recorded for anything else."""
    with run_folder(config, world, Console(world.rank)) as (folder, attempt, changes):
        run = kind(config, world, folder, attempt, wish)
        run.console.open_log(attempt.path / f"rank-{world.rank:05d}.log")
        try:
            end = _attempt(run, changes)
            if world.first:
                with tolerate_unwritable() if end.reason == "failed" else nullcontext():  # missing means failed, too
                    attempt.write_end(end)
                facts = {k: getattr(end, k) for k in ("reason", "step", "cause")}
                run.events.write("ended", phases_s=world.heartbeat.seconds(), **facts)
                run.console.end_live()
                run.console.say("\n".join(end_lines(run.config, attempt, end, run.seconds())))
            world.barrier()
        except UserError:
            raise
        except Exception as error:
            _record_failure(run, error)
            raise Recorded from error
        finally:
            run.leave()
        return end


def _attempt(run: Run, changes: Changes) -> End:
    folder, attempt, config, world = run.folder, run.attempt, run.config, run.world
    if world.from_first(lambda: life.attempts_without_progress(folder)) > config.run.give_up_after:
        run.events.write("giving_up", attempts=config.run.give_up_after)
        run.console.say(
            f"giving up after {config.run.give_up_after} attempts without a new checkpoint: {folder.attempts}"
        )
        return End("failed", 0, run.folder.newest_checkpoint()[1], requeue=False, cause="giving_up")
    before = Attempt(folder, attempt.number - 1)
    if attempt.number and world.first and (before.end is None or before.end.reason == "failed"):
        run.console.say(f"attempt {attempt.number}: attempt {before.number} failed, going on from the last checkpoint")
    try:
        world.from_first(run.wish.raise_if_wished)  # agreed: the others may not have heard of it yet
        run.build()
    except StopRequested as request:
        return stopped(run, request.cause)
    config = run.config  # the data may have decided some of it
    world.from_first(lambda: run.meter.begin_series(run.progress.step + 1))
    hosts = sorted(set(world.gather(world.node)))
    if world.first:
        for change in changes:
            run.events.write(**change)
        write_config(config, folder)
        facts = {"hosts": hosts, "world_size": world.size, "cpu_threads": torch.get_num_threads()}
        attempt.write_start(run.progress.step, facts | {"last_step": config.train.steps})
        run.events.write("started", step=run.progress.step, origin=str(run.origin), world_size=world.size)
        _say_start(run)
        _say_rates(run, changes)
        _say_threads(run, before)
    return live(run)


def _say_start(run: Run) -> None:
    states = {name: len(keys) for name, keys in run.beginning.target_of(run.origin.trainable).state.items()}
    size = Size(run.task.unit, run.task.example(run.config)[1], run.meter.flops_per_unit)
    begins = f"{run.origin}" + (f", step {run.progress.step}" if run.progress.step else "")
    data = run.task.describe(run.prepared, run.config)
    lines = start_lines(run.config, run.world, run.engine, size, states, data, begins)
    place = f"attempt {run.attempt.number}, rank 0 of {run.world.size} on {run.world.node}"
    run.console.say("\n".join([*lines, f"folder    {run.folder.root} ({place})"]))


def _say_rates(run: Run, changes: Changes) -> None:
    """What this length of the run makes of the schedule: a jump of the learning rate is heard before it is seen."""
    step, config = run.progress.step, run.config
    lengths = [change["old"] for change in changes if change["event"] == "steps_changed"]
    lines = [rate_change(config, old, step) for old in lengths if step < config.train.steps]
    for line in [*lines, *remarks(config)]:
        run.console.say(line)


def _say_threads(run: Run, before: Attempt) -> None:
    """Another number of threads adds in another order, so a CPU run goes on to other bits."""
    then, now = before.cpu_threads, torch.get_num_threads()
    if run.progress.step and run.world.device.type == "cpu" and then not in (None, now):
        run.console.say(f"threads   {now} a process, {then} before: sums on the CPU may differ in their last bits")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _record_failure(run: Run, error: Exception) -> None:
    """The traceback and rank, for whoever looks, as far as they can be written. A note that fails must not take the
    place of the first cause. The other ranks may be gone: no collective from here on."""
    text = "".join(traceback.format_exception(error))
    with suppress(OSError):
        run.events.write("rank_failed", rank=run.world.rank, error=repr(error), traceback=text)
    logged = run.console.note(text)
    why = _of_the_filesystem(error, run.folder)
    if run.world.size == 1 and why is None:
        say(text.rstrip(), sys.stderr)
    else:  # it may be another rank's death that this one met; the launcher names the first
        where = f"; traceback in {run.console.log_path}" if logged else ""
        run.console.say(f"rank {run.world.rank} failed: {why or _first_line(error)}{where}")
    if run.world.first:
        with suppress(OSError):  # missing means failed, too
            newest = run.folder.newest_checkpoint()[1]
            run.attempt.write_end(End("failed", run.progress.step, newest, True, "rank_failed"))


def _of_the_filesystem(error: Exception, folder: RunFolder) -> str | None:
    """In a person's words, when it is the disk or what was done to it; None for any other failure."""
    if not folder.root.is_dir():
        return f"{folder.root} is gone: it was moved or removed while this ran"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"cannot write to {error.filename or folder.root}: {error.strerror}"
    return None
