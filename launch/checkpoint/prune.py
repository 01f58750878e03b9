"""`python -m launch checkpoint prune`: delete by hand what `checkpoint.keep` deletes while a run saves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from configs.errors import UserError
from configs.load import load
from configs.schema.checkpoint import KeepSection
from launch.look.run_folder import readable
from launch.look.text import size_text
from trainer.checkpoint.format import disk
from trainer.checkpoint.keep.shelf import Shelf
from trainer.host.node_name import node_name
from trainer.host.terminal import say
from trainer.life.entries import checkpoint_name
from trainer.life.folder import RunFolder
from trainer.life.lease import Lease

_TAG = "pruned"


def prune(folder: Path, last: int | None, every_steps: int | None, bad: bool, dry_run: bool, yes: bool) -> int:
    """Returns the exit code."""
    run = RunFolder(folder)
    with readable(folder):
        if not run.checkpoints.is_dir():
            raise UserError(f"{folder} is no run folder: it has no folder checkpoints")
        keep = _keep(run, last, every_steps)
    with readable(folder), nullcontext() if dry_run else _held(run):
        shelf = Shelf(run.checkpoints, keep, say)
        going = [checkpoint_name(step) for step in shelf.going()]
        if bad:
            _must_hold_a_good_one(shelf)
            going += _deletable(shelf)
        every = keep.every_steps and f", every {keep.every_steps} steps"
        say(f"{run.checkpoints}: keeping the newest {keep.last}{every or ''}{', the best' if keep.best else ''}")
        stay = [*map(checkpoint_name, shelf.linked()), *(sorted(set(shelf.set_aside()) - set(going)) if bad else [])]
        for name in stay:
            say(f"{name} stays: it is a link, and what it leads to may be in use elsewhere; delete it by hand")
        freed = _freed(run.checkpoints / name for name in going)
        for name in going:
            say(f"{'would delete' if dry_run else 'deleting'} {name}")
        if not going:
            say("nothing to delete")
            return 0
        if dry_run:
            say(f"{size_text(freed)} would be freed")
            return 0
        if not yes:
            _confirm(f"delete {len(going)} and free {size_text(freed)}?")
        shelf.clean()
        shelf.prune(_TAG)
        for name in _deletable(shelf) if bad else []:
            _delete(run.checkpoints / name)
    say(f"{size_text(freed)} freed")
    return 0


@contextmanager
def _held(run: RunFolder) -> Iterator[None]:
    """Hold the run's lease: refused while its holder lives. No run can begin meanwhile."""
    lease = Lease.take(run, node_name(), 0, say)
    try:
        yield
    finally:
        lease.release()


def _delete(aside: Path) -> None:
    """Delete as the shelf does: first rename, so that the next start clears what an interrupted deletion leaves."""
    step, _, rest = aside.name.partition(".")
    doomed = aside.with_name(f"{step}.deleting-{rest}")
    disk.rename(str(aside), str(doomed))
    disk.fsync_dir(str(aside.parent))
    disk.remove_tree(str(doomed))


def _keep(run: RunFolder, last: int | None, every_steps: int | None) -> KeepSection:
    """The run's own setting, with the numbers that were given in its place."""
    keep = KeepSection()
    try:
        if os.path.lexists(run.config):
            keep = load(str(run.config), []).checkpoint.keep
    except UserError as error:
        if last is None:
            first, *_ = str(error).splitlines()
            raise UserError(f"{first}\nso checkpoint.keep is not known; say --last N") from None
    said = {"last": last, "every_steps": every_steps}
    return keep.model_copy(update={name: value for name, value in said.items() if value is not None})


def _deletable(shelf: Shelf) -> list[str]:
    """What was set aside, without links."""
    return [name for name in shelf.set_aside() if not (shelf.root / name).is_symlink()]


def _must_hold_a_good_one(shelf: Shelf) -> None:
    for step in reversed(shelf.steps()):
        if shelf.opens(step):
            return
    raise UserError(f"{shelf.root} holds no good checkpoint: what was set aside may be all that is left of the run")


def _freed(folders: Iterable[Path]) -> int:
    """Bytes of the files that lose every name."""
    names: dict[tuple[int, int], int] = {}
    found: dict[tuple[int, int], os.stat_result] = {}
    for folder in folders:
        for inner, _, files in os.walk(folder):
            for name in files:
                status = os.lstat(os.path.join(inner, name))
                inode = (status.st_dev, status.st_ino)
                names[inode] = names.get(inode, 0) + 1
                found[inode] = status
    return sum(status.st_size for inode, status in found.items() if names[inode] == status.st_nlink)


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise UserError(f"{question} Say --yes, or --dry-run to look only")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was deleted")
