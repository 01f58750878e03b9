"""Where a run begins: its own newest checkpoint, what `start.from` names, or step 0."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from configs.config import Config
from configs.errors import UserError
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.load.checkpoint import Checkpoint, read_manifest
from trainer.checkpoint.load.plan import Plan, Target, frozen_in, plan, some
from trainer.checkpoint.load.request import Loading
from trainer.checkpoint.load.start_from import checkpoint_named
from trainer.checkpoint.save.store import CheckpointStore
from trainer.data.prepared import Prepared, check_unchanged
from trainer.engines.base import Engine
from trainer.freeze import check_schedule, choose_trainable
from trainer.host.console import Console
from trainer.life.events import Events
from trainer.life.folder import RunFolder
from trainer.preflight import DATA_CONTENT
from trainer.progress import Progress
from trainer.ranks.world import World

Faults = list[tuple[str, Path]]  # what is wrong with a checkpoint, and in which file; one per rank that met it
OPEN_PATIENCE_S = 20.0  # for a shared filesystem that shows a new folder late


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    path: the checkpoint that is loaded, None for fresh weights. everything: optimizer, step and position are loaded
    too. continuing: the checkpoint is this run's own. trainable: the parameters that the next update trains."""

    path: Path | None
    everything: bool
    continuing: bool
    trainable: frozenset[str]
    plan: Plan | None = None

    def __str__(self) -> str:
        if self.path is None:
            return "step 0, fresh weights"
        return f"{self.path}" + ("" if self.everything else " (weights only)")


class Beginning:
    """Finds where a run begins, and fills its engine from there."""

    def __init__(
        self,
        config: Config,
        world: World,
        folder: RunFolder,
        engine: Engine,
        store: CheckpointStore,
        events: Events,
        console: Console,
    ) -> None:
        self.config, self.world, self.folder, self.engine = config, world, folder, engine
        self.store, self.events, self.console = store, events, console
        self.prepared: Prepared  # once it is

    def look_ahead(self) -> None:
        """Raise UserError for a `start.from` that does not fit, before hours of preparing data. Rank 0 alone."""
        start = self.config.start
        if start.from_ is not None and not self.store.shelf.steps():
            named, everything = named_checkpoint(Path(start.from_)), start.take == "everything"
            self._plan(named, everything, self.trainable_after(named.step if everything else 0), continuing=False)

    def begin(self) -> tuple[Origin, Progress]:
        """Build the engine, then load or initialise, on every rank. If a checkpoint proves bad while it is read, all
        ranks go back to the one before it."""
        while True:
            origin = self.world.from_first(lambda: self.find_origin())
            if origin.path is None:
                self.engine.set_trainable(origin.trainable)
                self.engine.initialise(self.config.run.seed)
                return origin, Progress()
            loaded = self.load(origin)
            if isinstance(loaded, Checkpoint):
                return origin, Progress.of(loaded.manifest) if origin.everything else Progress()
            reason, paths = loaded[0][0], {path for _, path in loaded}
            mended = self.world.from_first(partial(self.set_aside, origin, origin.path, reason, paths))
            event = "checkpoint_recovered" if mended else "checkpoint_rejected"
            self.events.write(event, checkpoint=origin.path.name, reason=reason)

    def find_origin(self) -> Origin:
        """Decide, on rank 0, where to begin, and refuse what does not fit. Bad checkpoints of this run are set aside;
        others' folders are not touched."""
        check_schedule(self.config.freeze, self.engine.parameters(), self.engine.aliases())
        newest = self.store.shelf.newest_good()
        start = self.config.start
        if newest is not None:
            return self.origin_at(newest, everything=True, continuing=True)
        if start.from_ is not None:
            named = named_checkpoint(Path(start.from_))
            return self.origin_at(named, everything=start.take == "everything", continuing=False)
        return Origin(None, everything=False, continuing=False, trainable=self.trainable_after(0))

    def origin_at(self, checkpoint: Checkpoint, everything: bool, continuing: bool) -> Origin:
        """What loading this checkpoint would do. Raises UserError unless data and tensors are what this run expects."""
        if everything:
            self._check_data(checkpoint)
        step = checkpoint.step if everything else 0
        trainable = self.trainable_after(step)
        loading = self._plan(checkpoint, everything, trainable, continuing)
        if continuing and not any(key.startswith("freeze.") for key in self.config.run.accept_changes):
            self.check_freezing(checkpoint)
        self.console.say("\n".join(loading.lines()))
        return Origin(checkpoint.path, everything, continuing, trainable, loading)

    def trainable_after(self, step: int) -> frozenset[str]:
        """Names of the parameters that train in the updates after `step`."""
        return frozenset(choose_trainable(self.config.freeze, step, self.engine.parameters(), self.engine.aliases()))

    def target_of(self, trainable: frozenset[str]) -> Target:
        """What this run's memory is to hold when these parameters train."""
        engine = self.engine
        parameters, buffers = engine.parameters(), engine.buffers()
        return Target(
            parameters | buffers,
            frozenset(buffers),
            {name: engine.state_keys(name) for name in trainable},
            frozenset(name for name in trainable if engine.counts_steps(name)),
        )

    def load(self, origin: Origin) -> Checkpoint | Faults:
        """Build the engine for what trains, and fill it. Returns the checkpoint, or what is wrong with its files, the
        same on all ranks. A collective."""
        assert origin.plan is not None
        carried = origin.plan.carried
        self.engine.set_trainable(origin.trainable, carried.keys(), self._counts(origin))
        self.engine.initialise(self.config.run.seed, sorted(origin.plan.fresh))
        checkpoint = self._read(origin)
        bad = checkpoint if isinstance(checkpoint, BadCheckpoint) else None
        bad_ranks = self.world.sum(torch.tensor([float(bad is not None)], device=self.world.device))
        if float(bad_ranks):
            faults = self.world.gather((str(bad), bad.path) if bad is not None else None)
            return [fault for fault in faults if fault is not None]
        self.engine.after_load()
        assert isinstance(checkpoint, Checkpoint)
        base = checkpoint if self.world.first else None
        self.store.adopt(base, carried, lineage=origin.everything, foreign=not origin.continuing)
        return checkpoint

    def set_aside(self, origin: Origin, path: Path, reason: str, found_bad: set[Path]) -> bool:
        """Recover the bad files of this run's own checkpoint from copies (True), or reject it. The last one is not
        rejected: the run would begin from nothing."""
        shelf = self.store.shelf
        if not origin.continuing:
            raise UserError(f"start.from: {reason}\nname another checkpoint")
        if shelf.mend(int(path.name.removeprefix("step-")), found_bad):
            return True
        if len(shelf.steps()) == 1:
            alone = f"it is the only checkpoint left in {shelf.root}: restore it, or begin another run"
            raise UserError(f"{reason}\n{alone}")
        shelf.reject(int(path.name.removeprefix("step-")), reason)
        return False

    def check_freezing(self, checkpoint: Checkpoint) -> None:
        """Raise UserError unless a checkpoint of this run froze what the config says was frozen in its last update."""
        trained = self.trainable_after(checkpoint.step - 1)
        expected, found = self.engine.parameters().keys() - trained, frozen_in(checkpoint.manifest)
        if expected != found:
            raise UserError(
                f"{checkpoint.path} was made with other parameters frozen than the config says for its step: "
                f"{some(expected ^ found)}\nadmit it with run.accept_changes=[freeze.frozen]"
            )

    def _check_data(self, checkpoint: Checkpoint) -> None:
        try:
            check_unchanged(checkpoint.manifest.data, self.prepared)
        except UserError as error:
            if DATA_CONTENT not in self.config.run.accept_changes:
                raise
            self.events.write("data_changed", what=str(error).splitlines()[0])

    def _plan(self, checkpoint: Checkpoint, everything: bool, trainable: frozenset[str], continuing: bool) -> Plan:
        """What is read of it into which tensor. Raises UserError where the two do not fit."""
        start, target = None if continuing else self.config.start, self.target_of(trainable)
        found = plan(checkpoint.manifest, target, everything, start, str(checkpoint.path))
        found.refuse()
        return found

    def _counts(self, origin: Origin) -> dict[str, int]:
        """Updates seen by the optimizer state that will be read, of each parameter that has any."""
        assert origin.plan is not None
        counts, read = origin.plan.counts, origin.plan.read
        states = self.target_of(origin.trainable).state
        return {name: counts.get(name, 0) for name in states if any(f"{name}.{key}" in read for key in states[name])}

    def _read(self, origin: Origin) -> Checkpoint | BadCheckpoint:
        """Read into place. What is wrong with a file is returned, not raised: other ranks would wait for this one."""
        assert origin.path is not None
        assert origin.plan is not None
        try:
            checkpoint = _open(origin.path, patience_s=0.0 if self.world.first else OPEN_PATIENCE_S)
        except BadCheckpoint as error:
            return error
        try:
            self.engine.load(Loading(checkpoint, origin.plan))
        except BadCheckpoint as error:
            return error
        finally:
            checkpoint.close()
        return checkpoint


def named_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `start.from` names: the folder itself, or the newest one of a run folder."""
    try:
        return Checkpoint(checkpoint_named(path))
    except BadCheckpoint as error:
        raise UserError(f"start.from: {error}\nname another checkpoint") from error


def _open(path: Path, patience_s: float) -> Checkpoint:
    """Rank 0 has just opened it and found it good: what another node does not see yet, it will in a moment."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return Checkpoint(path)
        except BadCheckpoint:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)


def fingerprints_to_find(config: Config, folder: RunFolder) -> dict[str, str]:
    """What the sources held when the checkpoint that this run goes on from was saved. Empty without one, and
    when it is bad: loading it will say so."""
    start, name = config.start, folder.newest_checkpoint()[1]
    if name is None and (start.from_ is None or start.take == "weights"):
        return {}
    path = folder.checkpoints / name if name is not None else checkpoint_named(Path(start.from_ or ""))
    try:
        return read_manifest(path)[0].data
    except BadCheckpoint:
        return {}
