"""A run put together, and its life from the first folder to `end.json`."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.schema import Config, fingerprint, to_dict
from models.flops import flops_per_token
from trainer import life
from trainer.begin import begin
from trainer.checkpoint.assemble import RunState
from trainer.checkpoint.store import CheckpointStore, SaveResult
from trainer.console import Console, gib
from trainer.data.loader import Loader, StepBatch
from trainer.data.prepare import Interrupted, prepare
from trainer.data.prepared import Prepared
from trainer.engines.fsdp import FsdpEngine
from trainer.events import Events, append_row
from trainer.folder import RunFolder
from trainer.freeze import choose_trainable
from trainer.layout import resolve
from trainer.lease import Lease
from trainer.life import Attempt, End
from trainer.loop import Progress, train
from trainer.metrics import Meter
from trainer.preflight import check_folder, write_config
from trainer.sample import write_sample
from trainer.step import RunFailed
from trainer.stop import Cause, Kind, StopRequested, StopWish
from trainer.summary import say_end, say_start
from trainer.tasks.lm import LanguageModelling
from trainer.world import World

Changes = list[dict[str, Any]]  # admitted differences from the config that a folder was begun with


class Run:
    """Everything the loop needs, built in the order in which it can fail: cheap and likely mistakes first."""

    def __init__(self, config: Config, world: World, folder: RunFolder, attempt: Attempt, wish: StopWish) -> None:
        self.config, self.world, self.folder, self.attempt, self.wish = config, world, folder, attempt, wish
        self.began = time.monotonic()
        self.console = Console(world.rank)
        self.events = Events(folder, world.node, f"rank{world.rank:05d}")
        self.events.attempt = attempt.number
        self.progress = Progress()
        self.task = LanguageModelling(config.task)
        self.store = CheckpointStore(
            folder.checkpoints,
            world.rank,
            world.size,
            world.kv,
            attempt.number,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            still_newest=attempt.is_newest,
            say=self.console.say,
            timeout_s=config.parallel.load_timeout_s,
        )
        self.meter: Meter  # once the engine can tell its FLOPs
        self.saved_step = -1
        self._failed_saves = 0
        self._first_step_done = False

    def build(self) -> None:
        """Data, engine, weights. Raises UserError, or StopRequested when a wish to stop comes in between."""
        config, world = self.config, self.world
        if world.first:
            self.wish.watch(self.folder.stop, config.train.time_limit_s, self.began)
        prepared = world.from_first(self._prepare)
        self.prepared = Prepared.open(prepared)
        self.engine = FsdpEngine(config, world, self.task)
        names, aliases = self.engine.parameters(), self.engine.aliases()
        self.engine.set_trainable(choose_trainable(config.freeze, names, aliases))
        world.from_first(self.store.shelf.clean)
        self.origin = begin(self)
        if self.origin.continuing:
            self.saved_step = self.progress.step
        self._check_space()
        self.loader = Loader(
            self.prepared,
            config,
            start=self.progress.consumed_samples,
            step=self.progress.step,
            rank=world.rank,
            world_size=world.size,
            pin=world.device.type == "cuda",
        )

    def _prepare(self) -> Path:
        config = self.config
        try:
            return prepare(config, self.folder.cache(config.data.cache), self.console.say, self._wished)
        except Interrupted as interrupted:
            raise StopRequested(self.wish.cause or Cause.INTERRUPT) from interrupted

    def _wished(self) -> bool:
        return self.wish.poll() is not None

    # ---- what the loop calls ----------------------------------------------------------------------------------------

    def after_first_step(self) -> None:
        if not self._first_step_done:
            self._first_step_done = True
            self.world.shorten_timeout(self.config.parallel.step_timeout_s)

    def record_samples(self, batch: StepBatch) -> None:
        """Which samples this rank was given, when the config asks for it."""
        if self.config.data.record_samples:
            path = self.attempt.path / f"samples-{self.world.rank:05d}.jsonl"
            append_row(path, {"step": batch.step, "samples": [int(n) for n in batch.samples]})

    def save(self, best: bool) -> None:
        """Begin a save of this step. No collective: the ranks meet in the store, from their saver threads."""
        if self.saved_step == self.progress.step:
            return
        self.saved_step = self.progress.step
        metric = self.progress.best_loss if best else None
        self.store.save(self.progress.step, self.engine.pieces(), self._state(), metric)

    def poll_saves(self, wait: bool = False) -> None:
        """Take note of saves that have ended. Too many failed ones in a row end the run, at an agreed step."""
        for result in self.store.wait() if wait else self.store.poll():
            if result.ok:
                self._failed_saves = 0
            else:
                self._failed_saves += 1
                self.saved_step = -1
            if self.world.first:
                self._tell(result)
        if self.saving_failed:
            self.wish.wish(Cause.SAVING)

    @property
    def saving_failed(self) -> bool:
        """Whether as many saves failed in a row as make the run fail."""
        return self._failed_saves >= self.config.checkpoint.failures_limit

    def _tell(self, result: SaveResult) -> None:
        name = f"step-{result.step:08d}"
        if result.ok:
            times = {"seconds": round(result.seconds, 3), "stall_s": round(result.stall_s, 3)}
            self.events.write("saved", checkpoint=name, bytes=result.bytes_written, **times)
            self.console.say(f"saved {name}: {gib(result.bytes_written)} in {result.seconds:.1f} s")
        else:
            self.events.write("save_failed", checkpoint=name, error=result.error)
            self.console.say(f"SAVE FAILED, {name}: {result.error}; the last good checkpoint stands")

    def _check_space(self) -> None:
        """Refuse before the first step what would fill the disk. A collective: bytes are summed over all ranks."""
        mine = [p for p in self.engine.pieces() if p.is_mine()]
        frozen = sum(p.nbytes for p in mine if p.group == "frozen")
        # before the first update there is no optimizer state yet: its tensors are as large as their parameters
        state_keys = self.engine.optimizer_keys()
        weights = sum(p.nbytes for p in mine if p.group == "model")
        trained = len({key.rpartition(".")[0] for key in state_keys})
        changing = weights * (1 + len(state_keys) / max(trained, 1))
        total = self.world.sum(torch.tensor([changing, frozen], dtype=torch.float64, device=self.world.device))
        self.world.from_first(lambda: self.store.shelf.check_space(int(total[0]), int(total[1])))

    def _state(self) -> RunState:
        layout = resolve(self.config.parallel, self.world.size)
        return RunState(
            position={"consumed_samples": self.progress.consumed_samples},
            loop=self.progress.state(),
            config=to_dict(self.config),
            fingerprint=fingerprint(self.config),
            model=to_dict(self.config)["model"],
            layout={"engine": self.config.parallel.engine, **asdict(layout)},
            data=self.prepared.fingerprints,
            step_counts=self.engine.step_counts(),
            aliases=self.engine.aliases(),
            trained_steps={},
        )

    def newest_checkpoint(self) -> str | None:
        steps = self.folder.committed_steps()
        return f"step-{steps[-1]:08d}" if steps else None

    def flops_per_token(self) -> float:
        return flops_per_token(self.engine.model, self.config.data.seq_len)

    def seconds(self) -> float:
        """How long this attempt has been running."""
        return time.monotonic() - self.began

    def close(self) -> None:
        self.loader.close()
        self.meter.close()


def live(run: Run) -> End:
    """Train, save what is not saved, and say how it ended. The same on every rank."""
    try:
        cause = train(run)
        save_last(run)
    except RunFailed as failure:
        run.poll_saves(wait=True)
        run.console.say(f"FAILED: {failure}")
        return End("failed", run.progress.step, run.newest_checkpoint(), requeue=False, cause=failure.cause)
    else:
        if cause is None and run.config.task.sample_tokens:
            text = write_sample(run)
            run.console.end_live()
            run.console.say(f"what the model writes now:\n{text}")
    finally:
        run.close()
    if cause is None:
        return End("finished", run.progress.step, run.newest_checkpoint(), requeue=False)
    return stopped(run, cause)


def save_last(run: Run) -> None:
    """Save where the run leaves off. A save that fails is tried again as often as saves may fail in a row.

    Raises RunFailed, on all ranks alike, when none succeeds.
    """
    run.poll_saves(wait=True)  # else ranks that know of a failed save would save again, and the others would not
    while run.progress.step > 0 and run.saved_step != run.progress.step:
        run.save(best=False)
        run.poll_saves(wait=True)
        if run.saving_failed:
            raise RunFailed(Cause.SAVING.word, f"step {run.progress.step} could not be saved")


def stopped(run: Run, cause: Cause) -> End:
    step = run.progress.step or max(run.folder.committed_steps(), default=0)  # perhaps nothing is loaded yet
    run.events.write("stop_requested", cause=cause.word, step=step)
    return End("stopped", step, run.newest_checkpoint(), cause.kind is Kind.REQUEUE, cause.word)


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
        return Attempt.open(folder).number

    attempt = Attempt(folder, world.from_first(take))
    try:
        yield folder, attempt, changes
    except UserError:
        if world.first:
            for lease in holder:
                lease.release()
            attempt.discard()
        raise
    finally:
        for lease in holder:
            lease.release()


def run(config: Config, wish: StopWish, world: World, kind: type[Run]) -> End:
    """One attempt, from the folder to its end. Raises UserError; anything else it raises is recorded first."""
    with run_folder(config, world, Console(world.rank)) as (folder, attempt, changes):
        run = kind(config, world, folder, attempt, wish)
        run.console.open_log(attempt.path / f"rank-{world.rank:05d}.log")
        try:
            end = _attempt(run, changes)
        except UserError:
            raise
        except Exception as error:
            _record_failure(run, error)
            raise
        if world.first:
            attempt.write_end(end)
            run.events.write("ended", **{k: getattr(end, k) for k in ("reason", "step", "cause")})
            say_end(run, end)
        world.barrier()
        return end


def _attempt(run: Run, changes: Changes) -> End:
    folder, attempt, config, world = run.folder, run.attempt, run.config, run.world
    if world.from_first(lambda: life.attempts_without_progress(folder)) > config.run.give_up_after:
        run.events.write("giving_up", attempts=config.run.give_up_after)
        run.console.say(
            f"giving up after {config.run.give_up_after} attempts without a new checkpoint: {folder.attempts}"
        )
        return End("failed", 0, run.newest_checkpoint(), requeue=False, cause="giving_up")
    before = Attempt(folder, attempt.number - 1)
    if attempt.number and world.first and (before.end is None or before.end.reason == "failed"):
        run.console.say(f"attempt {attempt.number}: attempt {before.number} failed, going on from the last checkpoint")
    try:
        world.from_first(run.wish.raise_if_wished)  # agreed: the others may not have heard of it yet
        run.build()
    except StopRequested as request:
        return stopped(run, request.cause)
    run.meter = Meter(config, world, folder, run.console, attempt.number, run.flops_per_token())
    if world.first:
        for change in changes:
            run.events.write(**change)
        write_config(config, folder)
        attempt.write_start(run.progress.step, {"hosts": [world.node], "world_size": world.size})
        run.events.write("started", step=run.progress.step, origin=str(run.origin), world_size=world.size)
        say_start(run)
    return live(run)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _record_failure(run: Run, error: Exception) -> None:
    """The traceback and rank, for whoever looks. The other ranks may be gone: no collective from here on."""
    text = "".join(traceback.format_exception(error))
    run.events.write("rank_failed", rank=run.world.rank, error=repr(error), traceback=text)
    run.console.note(text)
    if run.world.size == 1:
        print(text, file=sys.stderr)
    else:  # it may be another rank's death that this one met; the launcher names the first
        run.console.say(f"rank {run.world.rank} failed: {_first_line(error)}; traceback in {run.console.log_path}")
    if run.world.first:
        run.attempt.write_end(End("failed", run.progress.step, run.newest_checkpoint(), True, "rank_failed"))
