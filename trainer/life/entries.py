"""What lies under `checkpoints/`: the one reader of it, for runs and for all verbs. No torch.

A checkpoint is a folder `step-NNNNNNNN`, or a link to one, say on a larger disk. What lies behind a link is read, and
never changed or deleted: its bytes may be those of another run. Only names that begin with `step-` are looked at.
"""

from __future__ import annotations

import enum
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.files import kind_fault

MANIFEST = "manifest.json"  # the file that makes a folder a checkpoint: written last
_OURS = re.compile(r"(step-\d{8,18})(?:\.(bad|partial|deleting)-.+)?", re.ASCII)
_ANY_STEP = re.compile(r"step-(\d{1,18})")  # also in digits of other scripts
_SHOWN = 3


class Kind(enum.Enum):
    """A value is the word behind the dot of a name, such as `bad` in `step-00000008.bad-0`."""

    COMMITTED = ""
    ASIDE = "bad"
    PARTIAL = "partial"
    DELETING = "deleting"
    UNUSABLE = "unusable"  # a name that begins with `step-`, on what is no checkpoint, for the reason in `fault`

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Entry:
    """One name under `checkpoints/`. `step` is what the name says; `target` what a link leads to."""

    path: Path
    kind: Kind
    step: int | None
    target: str | None = None
    fault: str | None = None

    @property
    def is_link(self) -> bool:
        return self.target is not None

    @property
    def may_be_newer(self) -> bool:
        """Whether a person may take this for the checkpoint of `step`: its name is `step-` and a number."""
        return _ANY_STEP.fullmatch(self.path.name) is not None


def checkpoint_name(step: int) -> str:
    """The folder of a committed checkpoint."""
    return f"step-{step:08d}"


def name_fault(path: Path, step: int) -> str | None:
    """Why a checkpoint that holds `step` may not have this name; None when it may. A copy may have any name."""
    match = _OURS.fullmatch(path.name)
    return f"it holds step {step}" if match and match[1] != checkpoint_name(step) else None


def entry_at(path: Path) -> Entry | None:
    """What this name is; None when it does not begin with `step-`, or is just being deleted."""
    if not path.name.startswith("step-"):
        return None
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    match, any_step = _OURS.fullmatch(path.name), _ANY_STEP.match(path.name)
    step = int(any_step[1]) if any_step else None
    target = os.readlink(path) if stat.S_ISLNK(mode) else None
    try:
        fault = _spelling_fault(match) or kind_fault(path, folder=True)
    except OSError as error:  # a link into a folder that is closed to us, or with a name that is too long
        fault = f"it cannot be looked at: {error.strerror}"
    kind = Kind(match[2] or "") if match else Kind.UNUSABLE
    if fault is None and target is not None and kind in (Kind.PARTIAL, Kind.DELETING):
        fault = f"it is a link to {target}, and only a folder can be {kind.value}"
    return Entry(path, Kind.UNUSABLE if fault else kind, step, target, fault)


def _spelling_fault(match: re.Match[str] | None) -> str | None:
    if match is None or match[1] != checkpoint_name(int(match[1].removeprefix("step-"))):
        return "no checkpoint has such a name"
    return None


def entries(checkpoints: Path) -> list[Entry]:
    """Every entry, ascending by step and name; none when there is no such folder."""
    try:
        names = os.listdir(checkpoints)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [entry for name in names if (entry := entry_at(checkpoints / name)) is not None]
    return sorted(found, key=lambda entry: (-1 if entry.step is None else entry.step, entry.path.name))


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending. Whether they are good is not asked here."""
    return [entry.step for entry in entries(checkpoints) if entry.kind is Kind.COMMITTED and entry.step is not None]


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest committed checkpoint; None without one. Raises UserError as `refuse_to_pass_over` does."""
    steps = committed_steps(checkpoints)
    refuse_to_pass_over(checkpoints, steps[-1] if steps else None)
    return checkpoints / checkpoint_name(steps[-1]) if steps else None


def passed_over(checkpoints: Path, newest: int | None) -> list[Entry]:
    """Unusable entries that may be newer than the step `newest`; all unusable ones when that is None."""
    unusable = [entry for entry in entries(checkpoints) if entry.kind is Kind.UNUSABLE]
    if newest is None:
        return unusable
    return [entry for entry in unusable if entry.may_be_newer and entry.step is not None and entry.step > newest]


def refuse_to_pass_over(checkpoints: Path, newest: int | None) -> None:
    """Raise UserError when an entry that cannot be used may be newer than the newest checkpoint, or the only one: going
    on would lose the steps in between without a word."""
    found = passed_over(checkpoints, newest)
    if not found:
        return
    named = ", ".join(f"{entry.path} is no usable checkpoint ({entry.fault})" for entry in found[:_SHOWN])
    more = f", nor are {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    it, them = ("it", "it") if len(found) == 1 else ("one", "them")
    why = "there is no other" if newest is None else f"{it} may be newer than step {newest}"
    raise UserError(f"{named}{more}, and {why}\nmend {them}, or move {them} out of {checkpoints}")
