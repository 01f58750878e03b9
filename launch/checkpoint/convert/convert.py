"""Convert checkpoints: from Muster, a file of torch.save, a folder of torch.distributed.checkpoint or of DeepSpeed, to
any of the first three kinds.

Nothing in a source is run. Tensors stream through a few buffers, so memory does not grow with the checkpoint. The
target is written under a partial name, fsynced and renamed: a target is whole, or does not exist.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from launch.checkpoint.convert.dcp import read_dcp, write_dcp
from launch.checkpoint.convert.deepspeed import read_deepspeed
from launch.checkpoint.convert.muster import write_muster
from launch.checkpoint.convert.state import State, state_of
from launch.checkpoint.convert.torch_file import read_torch, write_torch
from trainer.checkpoint.format import disk
from trainer.checkpoint.load.kinds import Kind, Target, find_kind, open_checkpoint
from trainer.host.console import gib
from trainer.host.locks import lock


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    source: Path
    source_kind: Kind
    target: Path
    target_kind: Target
    step: int
    tensors: int
    nbytes: int
    seconds: float
    left_out: list[str] = field(default_factory=list)


def convert(
    source: Path,
    target: Path,
    to: Target,
    kind: Kind | None = None,
    weights_only: bool = False,
    progress: Callable[[int], None] | None = None,
    begin: Callable[[State], None] = lambda state: None,
) -> Conversion:
    """Write `source` (a checkpoint of any kind, or a run folder: its newest) as a new `target` of the kind `to`.

    `progress` gets the bytes of each part. `begin` gets the state before anything is written. Raises UserError or
    BadCheckpoint, and then leaves nothing behind.
    """
    began = time.monotonic()
    _check_target(source, target)
    state = open_state(source, kind, weights_only)
    try:
        _check_space(state, target)
        begin(state)
        with _partial(target, to == "torch") as (partial, file):
            if file is not None:
                write_torch(state, file, progress)
            elif to == "dcp":
                write_dcp(state, partial, progress)
            else:
                write_muster(state, partial, progress)
            if os.path.lexists(target):
                raise UserError(f"{target} has come into being meanwhile; nothing was written")
            disk.rename(str(partial), str(target))
            disk.fsync_dir(str(target.parent))
    finally:
        state.close()
    seconds = time.monotonic() - began
    return Conversion(
        state.path, state.kind, target, to, state.step, len(state.tensors), state.nbytes, seconds, state.left_out
    )


def open_state(path: Path, kind: Kind | None = None, weights_only: bool = False) -> State:
    """The state in a checkpoint. `kind` None: the files tell the kind."""
    kind, path = find_kind(path, kind)
    if kind == "torch":
        return read_torch(path, weights_only)
    if kind == "dcp":
        return read_dcp(path, weights_only)
    if kind == "deepspeed":
        return read_deepspeed(path, weights_only)
    return state_of(open_checkpoint(path), weights_only)


def _check_target(source: Path, target: Path) -> None:
    try:
        os.lstat(target)
        raise UserError(f"{target} is there already; nothing is overwritten: name another target")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from None
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")
    if source.is_dir() and target.parent.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} would lie inside {source}; name a target beside it")


def _check_space(state: State, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < state.nbytes:
        raise UserError(
            f"{target.parent} has {gib(free)} free, {gib(state.nbytes)} are needed, "
            f"{gib(state.nbytes - free)} more; nothing was written"
        )


@contextmanager
def _partial(target: Path, is_file: bool) -> Iterator[tuple[Path, disk.NewFile | None]]:
    """Make and lock the partial name; remove what a crash left there. At the end remove it, unless it was renamed."""
    partial = target.with_name(f"{target.name}.partial-convert")
    file: disk.NewFile | None = None
    descriptor = -1
    try:
        _clear(partial, target)
        if is_file:
            file = disk.NewFile(str(partial))
        else:
            disk.mkdir(str(partial))
        descriptor, _ = _lock(partial, target)
        yield partial, file
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(f"{target} cannot be written: {why}; nothing of it was left") from None
    finally:
        if file is not None:
            file.close()
        if descriptor >= 0:
            _discard(partial)
            os.close(descriptor)


def _clear(partial: Path, target: Path) -> None:
    """Remove what a killed conversion left. A conversion that still runs holds its lock, so its files stay."""
    if os.path.lexists(partial):
        descriptor, locked = _lock(partial, target)
        if not locked:
            os.close(descriptor)
            raise UserError(f"{partial} is of another conversion; if you know that it has ended, remove it")
        _discard(partial)
        os.close(descriptor)


def _lock(partial: Path, target: Path) -> tuple[int, bool]:
    """(descriptor of the lock, whether the filesystem has locks)."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(partial, os.O_RDWR | flags)  # NFS cannot lock a file that is open for reading only
    except IsADirectoryError:
        descriptor = os.open(partial, os.O_RDONLY | flags)
    try:
        return descriptor, lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{target} is being written by another conversion") from None


def _discard(partial: Path) -> None:
    with suppress(OSError):
        if partial.is_dir():
            disk.remove_tree(str(partial))
        elif os.path.lexists(partial):
            disk.unlink(str(partial))
