"""A run put together: everything the loop needs, and what it asks for between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from configs.config import Config
from configs.fingerprint import decide, fingerprint, to_dict, undecided
from configs.own import is_own
from trainer.begin import Beginning, fingerprints_to_find
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.pieces import Piece, with_state_to_come
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore, SaveResult
from trainer.data.batch import StepBatch
from trainer.data.loader import HeldOut, Loader, held_out
from trainer.data.preparing import Interrupted
from trainer.engines import build_engine
from trainer.host.console import Console, gib
from trainer.life.attempts import Attempt
from trainer.life.entries import checkpoint_name
from trainer.life.events import Events, append_row
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Phase
from trainer.life.layout import resolve
from trainer.life.lookout import Lookout
from trainer.life.stop import Cause, StopRequested, StopWish
from trainer.progress import Progress, saves_to_come
from trainer.ranks.world import World
from trainer.shown.metrics import Meter
from trainer.shown.profiling import Profiling
from trainer.step import RunFailed
from trainer.tasks import build_task
from trainer.tasks.base import best_metric


class Run:
    """Everything the loop needs, built in the order in which it can fail: cheap and likely mistakes first."""

    def __init__(self, config: Config, world: World, folder: RunFolder, attempt: Attempt, wish: StopWish) -> None:
        self.config, self.world, self.folder, self.attempt, self.wish = config, world, folder, attempt, wish
        self.began = time.monotonic()
        self.console = Console(world.rank)
        self.events = Events(folder, world.node, f"rank{world.rank:05d}")
        self.events.attempt = world.heartbeat.attempt = attempt.number
        self.progress = Progress()
        self.profiling = Profiling(config, world, attempt, self.events, self.console)
        self.task = build_task(config)
        best_metric(self.task, config)  # or refused
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
            reference=config.checkpoint.frozen == "reference",
        )
        self.saved_step = -1
        self._failed_saves = 0
        self.first_step_done = False

    def build(self) -> None:
        """Data, engine, weights. Raises UserError, or StopRequested when a wish to stop comes in between."""
        world = self.world
        if world.first:
            self.wish.watch(self.folder.stop, self.config.train.time_limit_s, self.began)
        complete = not any(undecided(self.config)) and not is_own(self.config.model.name)  # theirs may take sizes
        if complete:
            self._make_engine()  # before hours of preparing data: it finds what does not fit
        # Tokenising takes as long as it takes, longer than any collective may.
        with world.heartbeat.during(Phase.PREPARING):
            path = world.from_first(self._prepare, patiently=f"prepared/{self.attempt.number}")
        self.prepared = self.task.open(path, self.config)
        self._take_sizes()
        if not complete:
            self._make_engine()
        self.beginning.prepared = self.prepared
        world.from_first(self._last_look_before_loading)
        self.origin, self.progress = self.beginning.begin()
        self._say_frozen_ties()
        if self.origin.continuing:
            self.saved_step = self.progress.step
        self.check_space()
        self.reserve_memory()
        self._open_batches()
        self.meter = Meter(self.config, world, self.folder, self.console, self.attempt.number, self.task.unit)
        self.meter.flops_per_unit = self.flops_per_unit()
        self.profiling.look()  # one that was asked for before the start begins at the first step
        self.lookout = Lookout([self.wish.poll, self.profiling.look], self.console.say)

    def _make_engine(self) -> None:
        """Names and shapes: it takes memory when it is filled."""
        config, world = self.config, self.world
        self.engine = build_engine(config, world, self.task)
        self.beginning = Beginning(config, world, self.folder, self.engine, self.store, self.events, self.console)
        world.from_first(self.beginning.look_ahead)

    def _take_sizes(self) -> None:
        """What the data decide: sizes that the config leaves out, and how many steps its epochs are."""
        config, train = self.config, self.config.train
        if train.epochs is not None:
            samples = sum(len(source.train) for source in self.prepared.sources)
            steps = max(1, math.ceil(train.epochs * samples / train.global_batch))
            config = decide(config, {"train.steps": steps, "train.epochs": None})
        self.config = self.task.resolve(config, self.prepared)

    def _open_batches(self) -> None:
        config, world = self.config, self.world
        rank, ranks = world.data_rank, world.data_size
        chosen = held_out(self.prepared, "validation", config.train.validate_samples)
        self.held_out = HeldOut(self.task, chosen, config, rank, ranks)
        self.test_set = HeldOut(self.task, held_out(self.prepared, "test"), config, rank, ranks)
        self.loader = Loader(
            self.task,
            self.prepared,
            config,
            start=self.progress.consumed_samples,
            step=self.progress.step,
            rank=rank,
            world_size=ranks,
            pin=world.device.type == "cuda",
        )

    def _prepare(self) -> Path:
        config = self.config
        cache, began_with = self.folder.cache(config.data.cache), fingerprints_to_find(config, self.folder)
        try:
            return self.task.prepare(config, cache, self.console.say, self._wished, began_with)
        except Interrupted as interrupted:
            raise StopRequested(self.wish.cause or Cause.INTERRUPT) from interrupted

    def _last_look_before_loading(self) -> None:
        self.wish.raise_if_wished()
        self.store.shelf.clean()

    def _say_frozen_ties(self) -> None:
        for alias, first in self.engine.aliases().items():
            if first not in self.origin.trainable:
                self.console.say(f"frozen: {first}, and with it {alias}, which is tied to it")

    def _wished(self) -> bool:
        return self.wish.poll() is not None

    # ---- what the loop calls ----------------------------------------------------------------------------------------

    @property
    def step_phase(self) -> Phase:
        """What the coming step is: the first one compiles, if any does."""
        return Phase.COMPILING if self.config.parallel.compile and not self.first_step_done else Phase.COMPUTING

    def after_first_step(self) -> None:
        """All ranks have made a step: none of them compiles any more, so a rank that is late from now on is lost."""
        if not self.first_step_done:
            self.first_step_done = True
            self.world.set_timeout(self.config.parallel.step_timeout_s)

    def record_samples(self, batch: StepBatch) -> None:
        """Which samples this data rank was given, when the config asks for it."""
        if self.config.data.record_samples and self.world.counts:
            path = self.attempt.path / f"samples-{self.world.rank:05d}.jsonl"
            append_row(path, {"step": batch.step, "samples": [int(n) for n in batch.samples]})

    def save(self) -> None:
        """Begin a save of this step. No collective: the ranks meet in the store, from their saver threads."""
        if self.saved_step == self.progress.step:
            return
        self.saved_step = self.progress.step
        metric = self.progress.best_score if self.progress.is_best else None
        with self.world.heartbeat.during(Phase.SAVING):
            pieces = self.engine.pieces()
            self.store.save(self.progress.step, pieces, self._state(pieces), metric)

    def save_now(self) -> None:
        """Save this step, and return when it is committed. A save that fails is tried again as often as saves may fail
        in a row. Raises RunFailed, on all ranks alike, when none succeeds."""
        with self.world.heartbeat.during(Phase.SAVING):
            self._save_now()

    def _save_now(self) -> None:
        # All ranks must know of a failed save. If only some did, only they would save again, and would wait for ever.
        self.poll_saves(wait=True)
        while self.progress.step > 0 and self.saved_step != self.progress.step:
            self.save()
            self.poll_saves(wait=True)
            if self.saving_failed:
                raise RunFailed(Cause.SAVING.word, f"step {self.progress.step} could not be saved")

    def follow_freeze_schedule(self) -> None:
        """Where `freeze.schedule` changes what trains: save, build the engine anew, and go on from that checkpoint,
        just as a new start would. So the originals of what freezes, and its optimizer state, are safe in a file before
        they leave memory. A collective."""
        step = self.progress.step
        if all(change.step != step for change in self.config.freeze.schedule):
            return
        before, after = self.engine.trainable(), self.beginning.trainable_after(step)
        if before == after:
            return
        self.world.set_timeout(self.config.parallel.load_timeout_s)  # longer again, until the next step is done
        self.first_step_done = False
        self.save_now()
        path = self.folder.checkpoints / checkpoint_name(step)
        self.world.heartbeat.enter(Phase.STARTING)
        self.origin = self.world.from_first(
            lambda: self.beginning.origin_at(Checkpoint(path), everything=True, continuing=True)
        )
        faults = self.beginning.load(self.origin)
        if isinstance(faults, list):
            raise BadCheckpoint(faults[0][1], f"just written, and bad: {faults[0][0]}")
        self.meter.flops_per_unit = self.flops_per_unit()
        self.events.write("freeze_changed", step=step, frozen=sorted(before - after), trained=sorted(after - before))

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
        name = checkpoint_name(result.step)
        if result.ok:
            times = {"seconds": round(result.seconds, 3), "stall_s": round(result.stall_s, 3)}
            self.events.write("saved", checkpoint=name, bytes=result.bytes_written, **times)
            self.console.say(f"saved {name}: {gib(result.bytes_written)} in {result.seconds:.1f} s")
        else:
            self.events.write("save_failed", checkpoint=name, error=result.error)
            self.console.say(f"SAVE FAILED, {name}: {result.error}; the last good checkpoint stands")

    def check_space(self) -> None:
        """Refuse before the first step what would fill the disk. A collective: bytes are summed over all ranks."""
        mine = [p for p in self._pieces_to_come() if p.is_mine() and p.original]
        carried = self.store.carried_bytes() if self.world.first else 0
        in_files = self.origin.plan.carried if self.origin.plan else {}
        frozen = sum(p.nbytes for p in mine if p.group == "frozen" and p.key not in in_files)
        changing = sum(p.nbytes for p in mine if p.group != "frozen")
        total = self.world.sum(
            torch.tensor([changing, frozen + carried], dtype=torch.float64, device=self.world.device)
        )
        to_come = saves_to_come(self.config, self.progress.step)
        self.world.from_first(lambda: self.store.shelf.check_space(int(total[0]), int(total[1]), to_come))

    def reserve_memory(self) -> None:
        """Hold the host memory for saves before the first step, unless none is to come."""
        if saves_to_come(self.config, self.progress.step):
            self.store.reserve(self._pieces_to_come())

    def _pieces_to_come(self) -> list[Piece]:
        """What this rank will hold once the first update has made the optimizer's state."""
        return with_state_to_come(self.engine.pieces(), self.beginning.target_of(self.origin.trainable).state)

    def _state(self, pieces: Sequence[Piece]) -> RunState:
        layout = resolve(self.config.parallel, self.world.size)
        with_state = {p.key.rpartition(".")[0] for p in pieces if p.group == "optim"}
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
            buffers=sorted(self.engine.buffers()),
            stateless=sorted(self.engine.trainable() - with_state),
        )

    def flops_per_unit(self) -> float:
        """Forward and backward of a token, or of a sample where the task has no tokens."""
        example, cost = self.task.example(self.config)
        return self.engine.flops(example) / cost

    def seconds(self) -> float:
        """How long this attempt has been running."""
        return time.monotonic() - self.began

    def close(self) -> None:
        self.lookout.close()
        self.profiling.close()
        self.loader.close()
        self.meter.close()

    def leave(self) -> None:
        """The last call, however the attempt ended: nothing half deleted and nothing of the engine stays on disk. It
        comes after the last collective, in which other ranks would wait for a delete that takes long."""
        self.store.close()
        if hasattr(self, "engine"):
            self.engine.close()
