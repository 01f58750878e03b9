"""The folder of checkpoints: which there are, which are good, and which are deleted. Only rank 0 uses it."""

from __future__ import annotations

import errno
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.keep.recover import UNFINISHED, recover
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.host.console import gib
from trainer.life.entries import (
    Kind,
    checkpoint_name,
    committed_steps,
    entries,
    passed_over,
    refuse_to_pass_over,
)

KEEP = "KEEP"  # a file in a checkpoint's folder; while it exists, the checkpoint is not pruned


@dataclass(frozen=True)
class _Facts:
    """What pruning needs to know of a checkpoint. `fault`: why it does not open; None when it does."""

    fault: str | None
    metric: float | None = None
    sources: frozenset[str] = frozenset()


def ask_to_keep(checkpoint: Path, user: Path) -> None:
    """Write into a checkpoint of another run that `user` needs it, so that it is not pruned there. Raises OSError."""
    line = f"{user} refers to files in here\n"
    with (checkpoint / KEEP).open("a+") as file:
        file.seek(0)
        if line not in file.readlines():
            file.write(line)


class Shelf:
    def __init__(self, root: Path, keep: KeepSection, say: Callable[[str], None]) -> None:
        self.root = root
        self._keep = keep
        self._say = say
        self._facts: dict[int, _Facts] = {}
        self._mended: set[Path] = set()

    def path(self, step: int) -> Path:
        return self.root / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Committed steps, ascending, good or not."""
        return committed_steps(self.root)

    def linked(self) -> list[int]:
        """Committed steps whose folder is elsewhere, behind a link. They are read, never deleted or repaired."""
        return [e.step for e in entries(self.root) if e.kind is Kind.COMMITTED and e.is_link and e.step is not None]

    def clean(self) -> list[str]:
        """Remove what a crash left half written or half deleted; returns the names. Only under the run's lease."""
        found = entries(self.root)
        left = [entry.path for entry in found if entry.kind in (Kind.PARTIAL, Kind.DELETING)]
        for path in sorted(left):
            disk.remove_tree(str(path))
        for entry in found:
            if entry.kind is Kind.COMMITTED and not entry.is_link:
                for path in sorted(entry.path.glob("*/.*")):
                    if UNFINISHED.match(path.name):
                        disk.unlink(str(path))
        return sorted(path.name for path in left)

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest and files are sound, or None when there is no checkpoint at all.

        A file that is missing or has a wrong size is recovered from another copy, where there is one. Newer checkpoints
        that are bad are reported, and set aside as `step-....bad-<k>`. Raises UserError, and renames nothing, when all
        are bad or set aside: to go on would begin the run from nothing. Raises UserError, too, when an unusable entry
        may be newer than the checkpoint found.
        """
        bad: list[tuple[int, BadCheckpoint]] = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self._open_or_recover(step)
            except BadCheckpoint as error:
                bad.append((step, error))
                continue
            refuse_to_pass_over(self.root, step)
            for bad_step, reason in bad:
                self.reject(bad_step, str(reason))
            return checkpoint
        if bad:
            raise UserError(f"none of the {len(bad)} checkpoints in {self.root} can be read; the newest: {bad[0][1]}")
        aside = self.set_aside()
        if aside:
            raise UserError(
                f"no good checkpoint is left in {self.root}, only {', '.join(aside)}: "
                "repair one, or move them away to begin the run anew"
            )
        refuse_to_pass_over(self.root, None)
        return None

    def _open(self, step: int) -> Checkpoint:
        return Checkpoint(self.path(step))

    def _open_or_recover(self, step: int) -> Checkpoint:
        try:
            return self._open(step)
        except BadCheckpoint as error:
            try:
                recover(self.path(step), self.root, (), self._say)
            except BadCheckpoint:
                raise error from None
            return self._open(step)

    def mend(self, step: int, found_bad: Collection[Path]) -> bool:
        """Recover files that were found bad when they were read. False when that is impossible, or was done before: if
        a recovered file is bad again, its bytes are not the cause."""
        if not found_bad or not self._mended.isdisjoint(found_bad):
            return False
        self._mended.update(found_bad)
        try:
            recover(self.path(step), self.root, found_bad, self._say)
        except BadCheckpoint as error:
            self._say(f"{error}")
            return False
        return True

    def set_aside(self) -> list[str]:
        """Names of the bad checkpoints that were set aside."""
        return sorted(entry.path.name for entry in entries(self.root) if entry.kind is Kind.ASIDE)

    def reject(self, step: int, reason: str) -> Path:
        """Rename a bad checkpoint, so that nothing continues from it. Returns the new path."""
        k = 0
        while (target := self.root / f"{checkpoint_name(step)}.bad-{k}").exists():
            k += 1
        disk.rename(str(self.path(step)), str(target))
        disk.fsync_dir(str(self.root))
        self._say(f"checkpoint {checkpoint_name(step)} is bad and was set aside as {target.name}: {reason}")
        return target

    def forget(self, step: int) -> None:
        """Drop what was known of a step, after a checkpoint of that step was committed."""
        self._facts.pop(step, None)

    def prune(self, tag: str, remove: Callable[[str], None] = disk.remove_tree) -> list[int]:
        """Delete the checkpoints that `keep` does not hold; returns their steps. Each is renamed, durably, before the
        first of its files is unlinked, so that no half-deleted checkpoint looks whole. `remove` may unlink later: after
        the rename nobody reads the folder or links to its files."""
        going = self.going()
        names = [(str(self.path(step)), str(self.root / f"{checkpoint_name(step)}.deleting-{tag}")) for step in going]
        for name, doomed in names:
            disk.rename(name, doomed)
        if names:
            disk.fsync_dir(str(self.root))
        for _, doomed in names:
            remove(doomed)
        return going

    def going(self) -> list[int]:
        """The committed steps that `prune` would delete now: none, with a message, if the newest does not open."""
        steps = self.steps()
        if len(steps) <= self._keep.last:
            return []
        fault = self._known(steps[-1]).fault
        if fault is not None:
            self._facts.pop(steps[-1])
        newer = passed_over(self.root, steps[-1])
        fault = f"{newer[0].path}: {newer[0].fault}" if newer else fault
        if fault is not None:
            self._say(f"no old checkpoint is deleted, as the newest does not open: {fault}")
            return []
        kept = self.kept(steps)
        return [step for step in steps if step not in kept]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Which of the committed steps stay.

        The newest `last` that open stay, and any newer ones. So do those of `every_steps`, the best one, links, and
        those with a file KEEP. Any that stays also keeps those in its `manifest.sources`.
        """
        kept: set[int] = set()
        well = 0
        for step in sorted(steps, reverse=True):
            if well == self._keep.last:
                break
            kept.add(step)
            well += self._known(step).fault is None
        kept |= {step for step in steps if self._asked_to_keep(step)}
        kept |= set(self.linked())
        if self._keep.every_steps:
            kept |= {step for step in steps if step % self._keep.every_steps == 0}
        if self._keep.best:
            rated = [(metric, -step) for step in steps if (metric := self._known(step).metric) is not None]
            kept |= {-min(rated)[1]} if rated else set()
        own = {os.path.realpath(self.path(step)): step for step in steps}
        asked: set[int] = set()
        while asked != kept:
            asked = set(kept)
            kept |= {own[path] for step in asked for path in self._known(step).sources if path in own}
        return kept

    def _asked_to_keep(self, step: int) -> bool:
        try:
            os.stat(self.path(step) / KEEP)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)  # an unreadable folder may hold one
        return True

    def _known(self, step: int) -> _Facts:
        """The facts of a checkpoint. It is opened once, not at every save."""
        if step not in self._facts:
            try:
                manifest = self._open(step).manifest
                sources = frozenset(os.path.realpath(source.path) for source in manifest.sources)
                self._facts[step] = _Facts(None, manifest.metric, sources)
            except (BadCheckpoint, UserError) as error:
                self._facts[step] = _Facts(str(error))
        return self._facts[step]

    def opens(self, step: int) -> bool:
        """Whether the checkpoint of this step opens, and holds the step in its name."""
        return self._known(step).fault is None

    def check_space(self, changing_bytes: int, frozen_bytes: int, saves_to_come: int) -> None:
        """Raise UserError unless the filesystem has room for all checkpoints at once: those that `keep` holds, and the
        one being written. If fewer saves are to come, only those count. Checkpoints of `keep.every_steps` are not
        counted, as their number has no limit. Bytes are of one checkpoint, over all ranks. Frozen tensors count twice
        at most, as later saves link to them."""

        def more(last: int) -> int:
            copies = last + 1 + (1 if self._keep.best else 0)
            return min(max(1, copies - len(self.steps())), saves_to_come)

        def needed(count: int) -> int:
            return count * changing_bytes + min(count, 2) * frozen_bytes

        existing = next(folder for folder in (self.root, *self.root.parents) if folder.is_dir())
        free, missing = shutil.disk_usage(existing).free, more(self._keep.last)
        if free >= needed(missing):
            return
        ways = ["free some space", "move run.dir"]
        fits = bisect_right(range(1, self._keep.last), free, key=lambda last: needed(more(last)))
        ways += [f"set checkpoint.keep.last={fits}"] if fits else []
        raise UserError(
            f"{existing} has {gib(free)} free, but {missing} more checkpoint{'s' * (missing != 1)} of "
            f"{gib(changing_bytes + frozen_bytes)} need {gib(needed(missing))}, {gib(needed(missing) - free)} more: "
            f"{', '.join(ways[:-1])} or {ways[-1]}"
        )
