"""The one host copy of what changed, taken while training waits and written while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from trainer.checkpoint.format.writing import DATA_ALIGNMENT, bytes_of
from trainer.checkpoint.save.share import PlannedFile
from trainer.host.console import gib


class HostCopy:
    """One buffer in host memory, kept from save to save. Laid out as the files will be, so writing is streaming.

    For tensors on a GPU it is page-locked. Where the driver refuses that, copies are slower, which is said once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._unlock: Callable[[], None] = _nothing
        self._refused = False

    def reserve(self, files: Sequence[PlannedFile]) -> None:
        """Hold memory for such files from now on. On a GPU its pages are made and locked, which takes seconds; on the
        CPU none is touched. Raises RuntimeError when there is no memory for it."""
        changing = _changing(files)
        self._grow(_places(changing)[1], _device_of(changing))

    def take(self, files: Sequence[PlannedFile]) -> dict[str, memoryview]:
        """Copy all tensors that change and return each file's data bytes by path. On return the tensors may change.

        Device tensors are copied without waiting, with one synchronisation at the end. Raises RuntimeError when there
        is no memory for it.
        """
        changing = _changing(files)
        (begins, total), device = _places(changing), _device_of(changing)
        self._grow(total, device)
        copies = {}
        with torch.no_grad():
            for file, begin in zip(changing, begins, strict=True):
                for piece, start in zip(file.layout.pieces, file.layout.starts, strict=True):
                    slot = self._buffer[begin + start : begin + start + piece.nbytes]
                    slot.view(piece.tensor.dtype).view(piece.tensor.shape).copy_(piece.tensor, non_blocking=True)
                copies[file.path] = bytes_of(self._buffer[begin : begin + file.layout.data_bytes])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return copies

    def _grow(self, count: int, device: torch.device) -> None:
        if self._buffer.numel() >= count:
            return
        self._unlock()
        self._unlock = _nothing
        self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
        self._buffer = torch.empty(count, dtype=torch.uint8)
        if self._refused:
            return
        try:
            self._unlock = page_lock(self._buffer, device)
        except RuntimeError as error:
            self._refused = True
            self._buffer.zero_()  # makes its pages now, not while training waits for the first copy
            self._say(
                f"page-locking {gib(count)} for saves failed ({error}): training waits longer for each save's copy"
            )


def page_lock(buffer: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """Lock the pages of host memory, for fast copies from a GPU; for the CPU there is nothing to do. Returns what
    unlocks them, to be called before they are freed. Raises RuntimeError when the driver refuses.

    torch's own pinned allocator rounds up to a power of two, and never gives memory back. For the state of a large
    model that is up to another half of it.
    """
    if device.type == "cpu":
        return _nothing
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    try:
        torch.cuda.check_error(runtime.cudaHostRegister(address, buffer.numel(), 0))
    except RuntimeError:
        # CUDA keeps the error until some launch is checked. Let it be this one, not the next of training.
        with suppress(RuntimeError):
            torch.ones(1, device=device)
        raise
    return lambda: torch.cuda.check_error(runtime.cudaHostUnregister(address))


def _nothing() -> None:
    pass


def _changing(files: Sequence[PlannedFile]) -> list[PlannedFile]:
    return [file for file in files if file.group != "frozen"]


def _places(files: Sequence[PlannedFile]) -> tuple[list[int], int]:
    """Where each file's data begins in the buffer, and how long that is."""
    begins, total = [], 0
    for file in files:
        begins.append(total)
        total += -(-file.layout.data_bytes // DATA_ALIGNMENT) * DATA_ALIGNMENT
    return begins, total


def _device_of(files: Sequence[PlannedFile]) -> torch.device:
    """The GPU that any of the tensors is on, else the CPU."""
    devices = (piece.tensor.device for file in files for piece in file.layout.pieces)
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
