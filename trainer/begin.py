"""Where a run begins: its own newest checkpoint, what `start.from` names, or step 0."""

from __future__ import annotations

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
    """Decide, on rank 0, where to begin. Bad checkpoints of this run are set aside; others' folders are not touched."""
    newest = run.store.shelf.newest_good()
    if newest is not None:
        return Origin(newest.path, everything=True, continuing=True)
    start = run.config.start
    if start.from_ is None:
        return Origin(None, everything=False, continuing=False)
    return Origin(named_checkpoint(Path(start.from_)), start.take == "everything", continuing=False)


def named_checkpoint(path: Path) -> Path:
    """The checkpoint that `start.from` names: the folder itself, or the newest one of a run folder."""
    if (path / "manifest.json").exists():
        found = path
    else:
        steps = RunFolder(path).committed_steps()
        if not steps:
            what = "holds no committed checkpoint" if path.is_dir() else "does not exist"
            raise UserError(f"start.from: {path} {what}; name a run folder or a checkpoint in it")
        found = RunFolder(path).checkpoints / f"step-{steps[-1]:08d}"
    try:
        Checkpoint(found)
    except BadCheckpoint as error:
        raise UserError(f"start.from: {error}\nname another checkpoint") from error
    return found


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
        reasons = run.world.gather(str(bad) if bad is not None else "")
        reason = next(r for r in reasons if r)
        if not origin.continuing:
            raise UserError(f"start.from: {reason}\nname another checkpoint")
        run.events.write("checkpoint_rejected", checkpoint=origin.path.name, reason=reason)
        step = int(origin.path.name.removeprefix("step-"))
        run.world.from_first(partial(run.store.shelf.reject, step, reason))


def _load(run: Run, origin: Origin) -> BadCheckpoint | None:
    """Plan, check, load. Returns what is wrong with the file rather than raising: the others must not be left waiting.

    What does not fit (UserError) is seen alike by all ranks, since the plan is made from the manifest alone.
    """
    assert origin.path is not None
    try:
        checkpoint = Checkpoint(origin.path)
    except BadCheckpoint as error:
        return error
    if origin.everything and "data.sources" not in run.config.run.accept_changes:
        check_unchanged(checkpoint.manifest.data, run.prepared)
    wanted = {name: (info.shape, info.dtype) for name, info in run.engine.parameters().items()}
    # A run whose every update was skipped so far has no optimizer state yet; else all of it must be there.
    state = origin.everything and any(t.group == "optim" for t in checkpoint.manifest.tensors.values())
    if state:
        wanted |= {key: wanted[key.rpartition(".")[0]] for key in run.engine.optimizer_keys()}
    groups: tuple[Group, ...] = GROUPS if origin.everything else ("model", "frozen")
    loading = plan(checkpoint.manifest, wanted, groups, str(origin.path))
    loading.refuse()
    run.console.say("\n".join(loading.summary()))
    try:
        run.engine.load(checkpoint, optimizer=state)
    except BadCheckpoint as error:
        return error
    finally:
        checkpoint.close()
    if origin.everything:
        run.progress = Progress.of(checkpoint.manifest.loop)
    return None
