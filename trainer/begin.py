"""Where a run begins: its own newest checkpoint, what `start.from` names, or step 0."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.errors import UserError
from trainer.checkpoint.errors import BadCheckpoint
from trainer.checkpoint.load import Checkpoint
from trainer.checkpoint.pieces import GROUPS, Group
from trainer.checkpoint.plan import plan
from trainer.data.prepared import check_unchanged
from trainer.folder import RunFolder
from trainer.loop import Progress

if TYPE_CHECKING:
    from trainer.run import Run


OPEN_PATIENCE_S = 20.0  # for a shared filesystem that shows a new folder late


@dataclass(frozen=True)
class Origin:
    """What is loaded: nothing when `path` is None. `everything`: optimizer, step and position too."""

    path: Path | None
    everything: bool
    continuing: bool

    def __str__(self) -> str:
        if self.path is None:
            return "step 0, fresh weights"
        return f"{self.path}" + ("" if self.everything else " (weights only)")


def find_origin(run: Run) -> Origin:
    """Decide, on rank 0, where to begin, and refuse what does not fit. Bad checkpoints of this run are set aside;
    others' folders are not touched."""
    newest = run.store.shelf.newest_good()
    start = run.config.start
    if newest is not None:
        origin = Origin(newest.path, everything=True, continuing=True)
        check_fit(run, newest, origin)
    elif start.from_ is not None:
        named = named_checkpoint(Path(start.from_))
        origin = Origin(named.path, start.take == "everything", continuing=False)
        check_fit(run, named, origin)
    else:
        origin = Origin(None, everything=False, continuing=False)
    return origin


def check_fit(run: Run, checkpoint: Checkpoint, origin: Origin) -> None:
    """Raise UserError unless data and tensors are what this run expects; else say what will be loaded."""
    if origin.everything and "data.sources" not in run.config.run.accept_changes:
        check_unchanged(checkpoint.manifest.data, run.prepared)
    wanted = {name: (info.shape, info.dtype) for name, info in run.engine.parameters().items()}
    if origin.everything and holds_state(checkpoint):
        wanted |= {key: wanted[key.rpartition(".")[0]] for key in run.engine.optimizer_keys()}
    groups: tuple[Group, ...] = GROUPS if origin.everything else ("model", "frozen")
    loading = plan(checkpoint.manifest, wanted, groups, str(origin.path))
    loading.refuse()
    run.console.say("\n".join(loading.summary()))


def holds_state(checkpoint: Checkpoint) -> bool:
    """A run whose every update was skipped so far has no optimizer state yet; else all of it must be there."""
    return any(tensor.group == "optim" for tensor in checkpoint.manifest.tensors.values())


def named_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `start.from` names: the folder itself, or the newest one of a run folder."""
    if (path / "manifest.json").exists():
        found = path
    else:
        _, name = RunFolder(path).newest_checkpoint()
        if name is None:
            what = "holds no committed checkpoint" if path.is_dir() else "does not exist"
            raise UserError(f"start.from: {path} {what}; name a run folder or a checkpoint in it")
        found = RunFolder(path).checkpoints / name
    try:
        return Checkpoint(found)
    except BadCheckpoint as error:
        raise UserError(f"start.from: {error}\nname another checkpoint") from error


def begin(run: Run) -> Origin:
    """Load or initialise, on every rank. When a checkpoint proves bad while it is read, all fall back together."""
    while True:
        origin = run.world.from_first(lambda: find_origin(run))
        if origin.path is None:
            run.engine.initialise(run.config.run.seed)
            return origin
        bad = _load(run, origin)
        bad_ranks = run.world.sum(torch.tensor([float(bad is not None)], device=run.world.device))
        if float(bad_ranks) == 0:
            run.engine.after_load()
            return origin
        found_bad = [found for found in run.world.gather((str(bad), bad.path) if bad is not None else None) if found]
        reason = found_bad[0][0]
        mended = run.world.from_first(partial(set_aside, run, origin, origin.path, reason, {p for _, p in found_bad}))
        event = "checkpoint_recovered" if mended else "checkpoint_rejected"
        run.events.write(event, checkpoint=origin.path.name, reason=reason)


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


def _load(run: Run, origin: Origin) -> BadCheckpoint | None:
    """Read into place. Returns what is wrong with a file rather than raising: the others must not be left waiting."""
    assert origin.path is not None
    try:
        checkpoint = _open(origin.path, patience_s=0.0 if run.world.first else OPEN_PATIENCE_S)
    except BadCheckpoint as error:
        return error
    try:
        run.engine.load(checkpoint, with_optimizer=origin.everything and holds_state(checkpoint))
    except BadCheckpoint as error:
        return error
    finally:
        checkpoint.close()
    if origin.everything:
        run.progress = Progress.of(checkpoint.manifest.loop)
    return None


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
