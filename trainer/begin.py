"""Where a run begins: its own newest checkpoint, what `start.from` names, or step 0."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.errors import UserError
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.load.checkpoint import Checkpoint, read_manifest
from trainer.checkpoint.load.plan import Plan, Target, frozen_in, plan, some
from trainer.checkpoint.load.request import Loading
from trainer.checkpoint.load.start_from import checkpoint_named
from trainer.data.prepared import check_unchanged
from trainer.engines.optim import counts_steps, state_keys
from trainer.freeze import check_schedule, choose_trainable
from trainer.loop import Progress
from trainer.preflight import DATA_CONTENT

if TYPE_CHECKING:
    from trainer.run import Run


Faults = list[tuple[str, Path]]  # what is wrong with a checkpoint, and in which file; one per rank that met it
OPEN_PATIENCE_S = 20.0  # for a shared filesystem that shows a new folder late


@dataclass(frozen=True)
class Origin:
    """What is loaded: nothing when `path` is None. `everything`: optimizer, step and position too. `trainable` are the
    parameters that train in the next update."""

    path: Path | None
    everything: bool
    continuing: bool
    trainable: frozenset[str]
    plan: Plan | None = None

    def __str__(self) -> str:
        if self.path is None:
            return "step 0, fresh weights"
        return f"{self.path}" + ("" if self.everything else " (weights only)")


def look_ahead(run: Run) -> None:
    """Raise UserError for a `start.from` that does not fit, before hours of preparing data. Rank 0 alone."""
    start = run.config.start
    if start.from_ is not None and not run.store.shelf.steps():
        named, everything = named_checkpoint(Path(start.from_)), start.take == "everything"
        _plan(run, named, everything, trainable_after(run, named.step if everything else 0), continuing=False)


def find_origin(run: Run) -> Origin:
    """Decide, on rank 0, where to begin, and refuse what does not fit. Bad checkpoints of this run are set aside;
    others' folders are not touched."""
    check_schedule(run.config.freeze, run.engine.parameters(), run.engine.aliases())
    newest = run.store.shelf.newest_good()
    start = run.config.start
    if newest is not None:
        return origin_at(run, newest, everything=True, continuing=True)
    if start.from_ is not None:
        named = named_checkpoint(Path(start.from_))
        return origin_at(run, named, everything=start.take == "everything", continuing=False)
    return Origin(None, everything=False, continuing=False, trainable=trainable_after(run, 0))


def origin_at(run: Run, checkpoint: Checkpoint, everything: bool, continuing: bool) -> Origin:
    """What loading this checkpoint would do. Raises UserError unless data and tensors are what this run expects."""
    if everything:
        _check_data(run, checkpoint)
    step = checkpoint.step if everything else 0
    trainable = trainable_after(run, step)
    loading = _plan(run, checkpoint, everything, trainable, continuing)
    if continuing and not any(key.startswith("freeze.") for key in run.config.run.accept_changes):
        check_freezing(run, checkpoint)
    run.console.say("\n".join(loading.lines()))
    return Origin(checkpoint.path, everything, continuing, trainable, loading)


def _check_data(run: Run, checkpoint: Checkpoint) -> None:
    try:
        check_unchanged(checkpoint.manifest.data, run.prepared)
    except UserError as error:
        if DATA_CONTENT not in run.config.run.accept_changes:
            raise
        run.events.write("data_changed", what=str(error).splitlines()[0])


def fingerprints_to_find(run: Run) -> dict[str, str]:
    """What the sources held when the checkpoint was saved from which this run will go on. Empty without one, and where
    it is bad: loading it will say so."""
    start, name = run.config.start, run.folder.newest_checkpoint()[1]
    if name is None and (start.from_ is None or start.take == "weights"):
        return {}
    path = run.folder.checkpoints / name if name is not None else checkpoint_named(Path(start.from_ or ""))
    try:
        return read_manifest(path)[0].data
    except BadCheckpoint:
        return {}


def _plan(run: Run, checkpoint: Checkpoint, everything: bool, trainable: frozenset[str], continuing: bool) -> Plan:
    """What is read of it into which tensor. Raises UserError where the two do not fit."""
    start, target = None if continuing else run.config.start, target_of(run, trainable)
    found = plan(checkpoint.manifest, target, everything, start, str(checkpoint.path))
    found.refuse()
    return found


def trainable_after(run: Run, step: int) -> frozenset[str]:
    """Names of the parameters that train in the updates after `step`."""
    return frozenset(choose_trainable(run.config.freeze, step, run.engine.parameters(), run.engine.aliases()))


def target_of(run: Run, trainable: frozenset[str]) -> Target:
    """What this run's memory is to hold when these parameters train."""
    parameters, buffers, optim = run.engine.parameters(), run.engine.buffers(), run.config.optim
    dims = {name: len(parameters[name].shape) for name in trainable}
    return Target(
        parameters | buffers,
        frozenset(buffers),
        {name: state_keys(optim, name, dims[name]) for name in trainable},
        frozenset(name for name in trainable if counts_steps(optim, name, dims[name])),
    )


def check_freezing(run: Run, checkpoint: Checkpoint) -> None:
    """Raise UserError unless a checkpoint of this run froze what the config says was frozen in its last update."""
    trained = trainable_after(run, checkpoint.step - 1)
    expected, found = run.engine.parameters().keys() - trained, frozen_in(checkpoint.manifest)
    if expected != found:
        raise UserError(
            f"{checkpoint.path} was made with other parameters frozen than the config says for its step: "
            f"{some(expected ^ found)}\nadmit it with run.accept_changes=[freeze.frozen]"
        )


def named_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `start.from` names: the folder itself, or the newest one of a run folder."""
    try:
        return Checkpoint(checkpoint_named(path))
    except BadCheckpoint as error:
        raise UserError(f"start.from: {error}\nname another checkpoint") from error


def begin(run: Run) -> Origin:
    """Build the engine, then load or initialise, on every rank. When a checkpoint proves bad while it is read, all fall
    back together."""
    while True:
        origin = run.world.from_first(lambda: find_origin(run))
        if origin.path is None:
            run.engine.set_trainable(origin.trainable)
            run.engine.initialise(run.config.run.seed)
            return origin
        loaded = load(run, origin)
        if isinstance(loaded, Checkpoint):
            if origin.everything:
                run.progress = Progress.of(loaded.manifest)
            return origin
        reason, paths = loaded[0][0], {path for _, path in loaded}
        mended = run.world.from_first(partial(set_aside, run, origin, origin.path, reason, paths))
        event = "checkpoint_recovered" if mended else "checkpoint_rejected"
        run.events.write(event, checkpoint=origin.path.name, reason=reason)


def load(run: Run, origin: Origin) -> Checkpoint | Faults:
    """Build the engine for what trains, and fill it. Returns the checkpoint, or, the same on all ranks, what is wrong
    with files of it. A collective."""
    assert origin.plan is not None
    carried = origin.plan.carried
    run.engine.set_trainable(origin.trainable, carried.keys(), _counts(run, origin))
    run.engine.initialise(run.config.run.seed, sorted(origin.plan.fresh))
    checkpoint = _read(run, origin)
    bad = checkpoint if isinstance(checkpoint, BadCheckpoint) else None
    bad_ranks = run.world.sum(torch.tensor([float(bad is not None)], device=run.world.device))
    if float(bad_ranks):
        faults = run.world.gather((str(bad), bad.path) if bad is not None else None)
        return [fault for fault in faults if fault is not None]
    run.engine.after_load()
    assert isinstance(checkpoint, Checkpoint)
    base = checkpoint if run.world.first else None
    run.store.adopt(base, carried, lineage=origin.everything, foreign=not origin.continuing)
    return checkpoint


def _counts(run: Run, origin: Origin) -> dict[str, int]:
    """Updates seen by the optimizer state that will be read, of each parameter that has any."""
    assert origin.plan is not None
    counts, read = origin.plan.counts, origin.plan.read
    states = target_of(run, origin.trainable).state
    return {name: counts.get(name, 0) for name in states if any(f"{name}.{key}" in read for key in states[name])}


def set_aside(run: Run, origin: Origin, path: Path, reason: str, found_bad: set[Path]) -> bool:
    """Recover the bad files of this run's own checkpoint from copies (True), or reject it, but never the last: going on
    would begin the run from nothing."""
    shelf = run.store.shelf
    if not origin.continuing:
        raise UserError(f"start.from: {reason}\nname another checkpoint")
    if shelf.mend(int(path.name.removeprefix("step-")), found_bad):
        return True
    if len(shelf.steps()) == 1:
        raise UserError(f"{reason}\nit is the only checkpoint left in {shelf.root}: restore it, or begin another run")
    shelf.reject(int(path.name.removeprefix("step-")), reason)
    return False


def _read(run: Run, origin: Origin) -> Checkpoint | BadCheckpoint:
    """Read into place. Returns what is wrong with a file rather than raising: the others must not be left waiting."""
    assert origin.path is not None
    assert origin.plan is not None
    try:
        checkpoint = _open(origin.path, patience_s=0.0 if run.world.first else OPEN_PATIENCE_S)
    except BadCheckpoint as error:
        return error
    try:
        run.engine.load(Loading(checkpoint, origin.plan))
    except BadCheckpoint as error:
        return error
    finally:
        checkpoint.close()
    return checkpoint


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
