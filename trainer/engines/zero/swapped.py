"""Files that hold what of an engine does not lie in memory: a folder of them for each rank, and each as a tensor.

DeepSpeed reads and writes these files past the page cache (O_DIRECT), whole tensors at a time. A mapping shows what it
wrote, and `flush` what was written here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from trainer.host.console import gib
from trainer.host.environment import Ranks
from trainer.host.held import HeldFolder, remove_left
from trainer.host.locks import lock
from trainer.host.node_name import node_name
from trainer.ranks.world import World

PREFIX = "muster-swap-"
EXTENSIONS = ("pin_memory", "async_io")  # the second needs the first


class Swapping:
    """What DeepSpeed's settings swap to disk, and where: each engine that is built gets folders of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        offloaded = [settings["zero_optimization"].get(key, {}) for key in ("offload_optimizer", "offload_param")]
        self.sections = [section for section in offloaded if section.get("device") == "nvme"]
        self._parents = [Path(section["nvme_path"]).absolute() for section in self.sections]
        self._folders: list[HeldFolder] = []

    def check(self, world: World) -> None:
        """Raise UserError, on all ranks alike, when any of them could not swap. A collective."""

        def check() -> None:
            for parent in self._parents:
                _check_folder(parent)
            _check_extension()

        self._agree(world, check)

    def _agree(self, world: World, check: Callable[[], None]) -> None:
        """Raise, on all ranks alike, what any of them finds. A collective."""
        if not self.sections:
            return
        fault = None
        try:
            check()
        except (UserError, OSError) as error:
            fault = str(error)
        faults = [found for found in world.gather(fault) if found is not None]

        def refuse() -> None:
            if faults:
                raise UserError(faults[0])

        world.from_first(refuse)

    def set_buffers(self, world: World, largest: int, in_a_block: int) -> None:
        """How many and how large, if the settings do not say; page-locked, and taken in any case. `largest`: elements
        of the largest parameter that are this rank's. Raises UserError where DeepSpeed could not do with them."""
        least = []
        for optimizer in self.sections[:1]:  # master, gradient, two moments: of a group in use, one read, one written
            count = 4 * (1 + sum(bool(optimizer.get(f"pipeline_{what}")) for what in ("read", "write")))
            least.append(("offload_optimizer.buffer_count", optimizer.setdefault("buffer_count", count), count))
        for parameters in self.sections[1:]:  # a block may be gathered at once, beside what lies outside of blocks
            least.append(("offload_param.buffer_size", parameters.setdefault("buffer_size", largest), largest))
            parameters.setdefault("buffer_count", in_a_block + 4)

        def check() -> None:
            for key, value, needed in least:
                if value < needed:
                    raise UserError(f"parallel.deepspeed: {key} {value} is too little here: {needed}, or leave it out")

        self._agree(world, check)

    def check_space(self, world: World, needed_bytes: Sequence[int]) -> None:
        """`needed_bytes`: of this rank, masters with their state, and parameters. Raises UserError, on all ranks alike,
        when they do not fit: DeepSpeed takes a write that a full disk cut short for a good one. A collective."""
        ranks = Ranks.read(os.environ).local_size
        if self.sections:
            world.barrier()  # the other ranks' folders of the engine before are gone

        def check() -> None:
            wanted = list(zip(self._parents, needed_bytes, strict=False))
            for parent in dict.fromkeys(self._parents):
                remove_left(parent, PREFIX)
                free, need = shutil.disk_usage(parent).free, ranks * sum(n for place, n in wanted if place == parent)
                if free < need:
                    raise UserError(
                        f"parallel.deepspeed: nvme_path {parent} has {gib(free)} free, "
                        f"but {gib(need)} will lie there, {gib(need - free)} more: "
                        "free some space, or name another disk"
                    )

        self._agree(world, check)

    def make_folders(self) -> None:
        for section, parent in zip(self.sections, self._parents, strict=True):
            self._folders.append(HeldFolder(parent, PREFIX))
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
        if self._maps[path].size < numel * dtype.itemsize:  # a slice would be shorter, and nobody would notice
            raise RuntimeError(f"{path}: {self._maps[path].size} bytes instead of {numel * dtype.itemsize}; disk full?")
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

    builder = AsyncIOBuilder()
    try:
        if not builder.is_compatible():  # before anything is compiled
            raise RuntimeError("libaio is missing")
        with _building([Path(_get_build_directory(name, False)) for name in EXTENSIONS]):
            builder.load(verbose=False)
    except Exception as error:  # whatever a compiler and its absence may raise
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"device nvme needs DeepSpeed's extension async_io, which does not build here: {why}\n"
            "install libaio's headers (apt: libaio-dev), a C++ compiler and ninja, or use device: cpu"
        ) from error


@contextmanager
def _building(folders: Sequence[Path]) -> Iterator[None]:
    """Alone among this user's processes. torch has a lock of its own in each folder. If its owner is killed while it
    compiles, every later start waits for ever. The lock of a start that was killed in here is removed."""
    with (folders[0].parent / "muster-building").open("a+") as mark:
        lock(mark.fileno(), wait=True)
        mark.seek(0)
        if mark.read():
            for folder in folders:
                (folder / "lock").unlink(missing_ok=True)
        mark.write(f"{node_name()} {os.getpid()}\n")
        mark.flush()
        try:
            yield
        finally:
            mark.truncate(0)
