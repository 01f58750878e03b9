"""Files that hold what of an engine does not lie in memory: a folder of them for each rank, and each as a tensor.

DeepSpeed reads and writes these files past the page cache (O_DIRECT), whole tensors at a time; a mapping shows what it
wrote, and `flush` what was written here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from trainer.world import World

PREFIX = "muster-swap-"
STALE_LOCK_S = 1800.0  # no compiler takes as long


class SwapFolder:
    """A folder of this rank's own in `parent`, locked for as long as this process lives: what a killed one left is
    known by being unlocked, whatever its machine and container were, and goes when the next one is made."""

    def __init__(self, parent: Path) -> None:
        for left in parent.glob(f"{PREFIX}*"):
            _remove_if_left(left)
        made = Path(tempfile.mkdtemp(prefix="new-", dir=parent))
        self._lock = _locked(made)
        self.path = made.rename(parent / f"{PREFIX}{made.name.removeprefix('new-')}")

    def remove(self) -> None:
        """With all that is in it."""
        shutil.rmtree(self.path)
        os.close(self._lock)


def _locked(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_if_left(folder: Path) -> None:
    try:
        lock = _locked(folder)
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return  # its process lives, another rank was quicker, or it is another user's
    shutil.rmtree(folder, ignore_errors=True)  # another rank may be at it
    os.close(lock)


class Swapping:
    """What DeepSpeed's settings swap to disk, and where: each engine that is built gets folders of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        offloaded = [settings["zero_optimization"].get(key, {}) for key in ("offload_optimizer", "offload_param")]
        self.sections = [section for section in offloaded if section.get("device") == "nvme"]
        self._parents = [Path(section["nvme_path"]).absolute() for section in self.sections]
        self._folders: list[SwapFolder] = []

    def check(self, world: World) -> None:
        """Raise UserError, on all ranks alike, when any of them could not swap. A collective."""
        if not self.sections:
            return
        faults = [fault for fault in world.gather(self._fault()) if fault is not None]

        def refuse() -> None:
            if faults:
                raise UserError(faults[0])

        world.from_first(refuse)

    def _fault(self) -> str | None:
        try:
            for parent in self._parents:
                _check_folder(parent)
            _check_extension()
        except UserError as error:
            return str(error)
        return None

    def set_buffers(self, largest: int, in_a_block: int) -> None:
        """How many and how large, if the settings do not say; page-locked, and taken in any case. `largest`: elements
        of the largest parameter that are this rank's."""
        for optimizer in self.sections[:1]:  # master, gradient, two moments: of a group in use, one read, one written
            groups = 1 + sum(bool(optimizer.get(f"pipeline_{what}")) for what in ("read", "write"))
            optimizer.setdefault("buffer_count", 4 * groups)
        for parameters in self.sections[1:]:  # a block may be gathered at once, beside what lies outside of blocks
            parameters.setdefault("buffer_size", largest)
            parameters.setdefault("buffer_count", in_a_block + 4)

    def make_folders(self) -> None:
        for section, parent in zip(self.sections, self._parents, strict=True):
            self._folders.append(SwapFolder(parent))
            section["nvme_path"] = str(self._folders[-1].path)

    def remove_folders(self) -> None:
        """With all that is in them."""
        while self._folders:
            self._folders.pop().remove()


class Mappings:
    """Files as tensors that share their content. Held until `close`."""

    def __init__(self) -> None:
        self._maps: dict[Path, np.memmap] = {}

    def tensor(self, path: Path, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """The first `numel` elements of a file that is there."""
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, "r+")
        return torch.from_numpy(self._maps[path])[: numel * dtype.itemsize].view(dtype)

    def zeros(self, path: Path, dtype: torch.dtype, numel: int, file_bytes: int) -> torch.Tensor:
        """The same of a new file. Its space is taken now: a full disk would end the process when it is written to."""
        self._maps.pop(path, None)
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, file_bytes)
        return self.tensor(path, dtype, numel)

    def flush(self) -> None:
        """To the disk, before DeepSpeed reads there."""
        for mapped in self._maps.values():
            mapped.flush()

    def close(self) -> None:
        self.flush()
        self._maps.clear()


def _check_folder(parent: Path) -> None:
    """Raise UserError when DeepSpeed could not swap to this folder."""
    key = f"parallel.deepspeed: nvme_path {parent}"
    if not parent.is_dir():
        raise UserError(f"{key} is no folder here: make it on every node, on a local disk")
    try:
        with tempfile.NamedTemporaryFile(dir=parent) as probe:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise UserError(f"{key} must be writable, and on a disk that takes O_DIRECT: {error.strerror}") from error


def _check_extension() -> None:
    """Raise UserError when DeepSpeed's extension for files cannot be had. It is compiled at the first start."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    for name in ("pin_memory", "async_io"):  # the first is part of the second
        lock = Path(_get_build_directory(name, False)) / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > STALE_LOCK_S:
            raise UserError(f"{lock} was left by a start that was killed, and every later one would wait: remove it")
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # whatever a compiler and its absence may raise
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"device nvme needs DeepSpeed's extension async_io, which does not build here: {why}\n"
            "install libaio's headers (apt: libaio-dev), a C++ compiler and ninja, or use device: cpu"
        ) from error
