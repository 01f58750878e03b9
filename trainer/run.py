"""A run put together: everything the loop needs, and what it asks for between steps."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch

from configs.schema import Config, fingerprint, to_dict
from trainer.begin import begin
from trainer.checkpoint.assemble import RunState
from trainer.checkpoint.store import CheckpointStore, SaveResult
from trainer.console import Console, gib
from trainer.data.loader import Loader, StepBatch, validation_batches
from trainer.data.prepare import Interrupted, prepare
from trainer.data.prepared import Prepared
from trainer.engines.fsdp import FsdpEngine
from trainer.events import Events, append_row
from trainer.folder import RunFolder, checkpoint_name
from trainer.freeze import choose_trainable
from trainer.layout import resolve
from trainer.life import Attempt
from trainer.loop import Progress
from trainer.metrics import Meter
from trainer.stop import Cause, StopRequested, StopWish
from trainer.tasks.lm import LanguageModelling
from trainer.world import World


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
        # Tokenising takes as long as it takes, longer than any collective may.
        prepared = world.from_first(self._prepare, patiently=f"prepared/{self.attempt.number}")
        self.prepared = Prepared.open(prepared)
        self.engine = FsdpEngine(config, world, self.task)
        self.engine.set_trainable(world.from_first(self._choose_trainable))
        world.from_first(self._last_look_before_loading)
        self.origin = begin(self)
        if self.origin.continuing:
            self.saved_step = self.progress.step
        self._check_space()
        self.validation = validation_batches(self.prepared, config, world.data_rank, world.data_size)
        self.loader = Loader(
            self.prepared,
            config,
            start=self.progress.consumed_samples,
            step=self.progress.step,
            rank=world.data_rank,
            world_size=world.data_size,
            pin=world.device.type == "cuda",
        )

    def _prepare(self) -> Path:
        config = self.config
        try:
            return prepare(config, self.folder.cache(config.data.cache), self.console.say, self._wished)
        except Interrupted as interrupted:
            raise StopRequested(self.wish.cause or Cause.INTERRUPT) from interrupted

    def _choose_trainable(self) -> set[str]:
        names, aliases = self.engine.parameters(), self.engine.aliases()
        trainable = choose_trainable(self.config.freeze, names, aliases)
        for alias, first in aliases.items():
            if first not in trainable:
                self.console.say(f"frozen: {first}, and with it {alias}, which is tied to it")
        return trainable

    def _last_look_before_loading(self) -> None:
        self.wish.raise_if_wished()
        self.store.shelf.clean()

    def _wished(self) -> bool:
        return self.wish.poll() is not None

    # ---- what the loop calls ----------------------------------------------------------------------------------------

    def after_first_step(self) -> None:
        if not self._first_step_done:
            self._first_step_done = True
            self.world.shorten_timeout(self.config.parallel.step_timeout_s)

    def record_samples(self, batch: StepBatch) -> None:
        """Which samples this data rank was given, when the config asks for it."""
        if self.config.data.record_samples and self.world.counts:
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
        name = checkpoint_name(result.step)
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

    def flops_per_token(self) -> float:
        return self.engine.flops_per_token(self.config.data.seq_len)

    def seconds(self) -> float:
        """How long this attempt has been running."""
        return time.monotonic() - self.began

    def close(self) -> None:
        self.loader.close()
        self.meter.close()
