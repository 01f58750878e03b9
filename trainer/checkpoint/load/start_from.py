"""What `start.from` names: a checkpoint, or a run, whose newest one counts. All else is refused. No torch."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from configs.errors import UserError
from trainer.life.entries import MANIFEST, checkpoint_name, committed_steps, newest_checkpoint
from trainer.life.folder import RunFolder

_WANTED = "name a run folder or a checkpoint in it"


def checkpoint_named(path: Path) -> Path:
    """The folder of the checkpoint. Raises UserError, which tells what the path holds instead, and what to name."""
    try:
        if (path / MANIFEST).exists():
            return path
        found = newest_checkpoint(RunFolder(path).checkpoints)  # raises where another entry may be newer
        instead = _instead(path) if found is None else ""
    except OSError as error:  # may not be read, or is no file, such as a pipe
        raise UserError(f"start.from: {path} cannot be read: {error.strerror or error}; {_WANTED}") from error
    if found is None:
        raise UserError(f"start.from: {path} {instead}")
    return found


def _has_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).exists() or RunFolder(path).newest_checkpoint()[1] is not None


def _instead(path: Path) -> str:
    """What the path holds, and what to name in its place."""
    from trainer.checkpoint.load.kinds import (  # late: it imports numpy, which most starts do not need
        KIND_WORDS,
        find_other,
    )

    if not os.path.lexists(path):
        beside = [checkpoint_name(step) for step in committed_steps(path.parent)]
        return "does not exist; " + (f"there are {', '.join(beside[-3:])}" if beside else _WANTED)
    if not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist; {_WANTED}"
    around = next((parent for parent in path.absolute().parents if _has_checkpoint(parent)), None)
    if around is not None:
        return f"is only a part of {'a checkpoint' if (around / MANIFEST).exists() else 'a run'}; name {around}"
    other = find_other(path)
    if other is not None:
        words = f"python -m launch checkpoint convert {shlex.quote(str(path))} NEW"
        return f"is {KIND_WORDS[other[0]]}\nmake a checkpoint of it, and name that: {words}"
    if not path.is_dir():
        what = "a file of safetensors without a checkpoint around it" if path.suffix == ".safetensors" else "a file"
        return f"is {what}; {_WANTED}"
    runs = [below for below in sorted(path.iterdir()) if _has_checkpoint(below)]
    return "holds no committed checkpoint; " + (f"name one of its runs, such as {runs[0]}" if runs else _WANTED)
