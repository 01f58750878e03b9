"""The folder of checkpoints: what is there, what is good, and what goes. Rank 0 alone uses it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from configs.errors import UserError
from configs.schema import KeepSection
from trainer.checkpoint import disk
from trainer.checkpoint.errors import BadCheckpoint
from trainer.checkpoint.load import Checkpoint
from trainer.folder import checkpoint_name, committed_steps

_ASIDE = re.compile(r"^step-\d{8,}\.bad-\d+$")
_LEFTOVER = re.compile(r"^step-\d{8,}\.(partial|deleting)-")


class Shelf:
    def __init__(self, root: Path, keep: KeepSection, say: Callable[[str], None]) -> None:
        self.root = root
        self._keep = keep
        self._say = say
        self._metrics: dict[int, float | None] = {}

    def path(self, step: int) -> Path:
        return self.root / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Committed steps, ascending. Whether they are good is not asked here."""
        return committed_steps(self.root)

    def clean(self) -> list[str]:
        """Remove what a crash left half written or half deleted; returns the names. Only under the run's lease."""
        if not self.root.is_dir():
            return []
        names = sorted(entry.name for entry in os.scandir(self.root) if _LEFTOVER.match(entry.name))
        for name in names:
            disk.remove_tree(str(self.root / name))
        return names

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest and files are sound, or None when there is none at all.

        Bad ones that are newer are set aside as `step-....bad-<k>`, loudly. When all are bad nothing is renamed and a
        UserError says so, because going on would begin the run from nothing; likewise when only such are left.
        """
        bad: list[tuple[int, BadCheckpoint]] = []
        for step in reversed(self.steps()):
            try:
                checkpoint = Checkpoint(self.path(step))
                if checkpoint.step != step:
                    raise BadCheckpoint(checkpoint.path, f"it holds step {checkpoint.step}")
            except BadCheckpoint as error:
                bad.append((step, error))
                continue
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
        return None

    def set_aside(self) -> list[str]:
        """Names of the bad checkpoints."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.root) if _ASIDE.match(entry.name))

    def reject(self, step: int, reason: str) -> Path:
        """Set a bad checkpoint aside under another name, from which nothing continues. Returns the new path."""
        k = 0
        while (target := self.root / f"{checkpoint_name(step)}.bad-{k}").exists():
            k += 1
        disk.rename(str(self.path(step)), str(target))
        disk.fsync_dir(str(self.root))
        self._say(f"checkpoint {checkpoint_name(step)} is bad and was set aside as {target.name}: {reason}")
        return target

    def remember(self, step: int, metric: float | None) -> None:
        """Note the metric of a checkpoint just committed."""
        self._metrics[step] = metric

    def prune(self, tag: str) -> list[int]:
        """Delete what `keep` does not hold; returns the steps. Each goes at once: it is renamed, durably, before the
        first of its files is unlinked, so that nothing half deleted looks whole."""
        steps = self.steps()
        going = [step for step in steps if step not in self.kept(steps)]
        names = [(str(self.path(step)), str(self.root / f"{checkpoint_name(step)}.deleting-{tag}")) for step in going]
        for name, doomed in names:
            disk.rename(name, doomed)
        if names:
            disk.fsync_dir(str(self.root))
        for _, doomed in names:
            disk.remove_tree(doomed)
        return going

    def kept(self, steps: list[int]) -> set[int]:
        """Which of the committed steps stay."""
        kept = set(steps[-self._keep.last :])
        if self._keep.every_steps:
            kept |= {step for step in steps if step % self._keep.every_steps == 0}
        if self._keep.best:
            rated = [(metric, -step) for step in steps if (metric := self._metric(step)) is not None]
            kept |= {-min(rated)[1]} if rated else set()
        return kept

    def _metric(self, step: int) -> float | None:
        """The metric in a checkpoint's manifest. One that cannot be read has none."""
        if step not in self._metrics:
            try:
                self._metrics[step] = Checkpoint(self.path(step)).manifest.metric
            except (BadCheckpoint, UserError):
                self._metrics[step] = None
        return self._metrics[step]

    def check_space(self, changing_bytes: int, frozen_bytes: int) -> None:
        """Raise UserError unless the filesystem has room for the checkpoints that `keep` will hold, and the one being
        written beside them (`keep.every_steps` aside, which grows without end). Bytes are of one checkpoint, over all
        ranks; frozen tensors count twice, as later saves link to them."""
        copies = self._keep.last + 1 + (1 if self._keep.best else 0)
        missing = max(1, copies - len(self.steps()))
        needed = missing * changing_bytes + min(missing, 2) * frozen_bytes
        existing = next(folder for folder in (self.root, *self.root.parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise UserError(
                f"{existing} has {free / 1e9:.2f} GB free, but {missing} more checkpoints of "
                f"{(changing_bytes + frozen_bytes) / 1e9:.2f} GB need {needed / 1e9:.2f} GB: "
                "free some space, move run.dir, or lower checkpoint.keep.last"
            )
