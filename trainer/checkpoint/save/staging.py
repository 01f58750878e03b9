"""The one host copy of what changed, taken while training waits and written while it goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.checkpoint.format.writing import DATA_ALIGNMENT, FileLayout, bytes_of


class HostCopy:
    """One buffer in host memory, kept from save to save. Laid out as the files will be, so writing is streaming."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, layouts: Sequence[FileLayout]) -> list[memoryview]:
        """Copy all tensors of the layouts and return each layout's data bytes. On return the tensors may change.

        Device tensors are copied through pinned memory, with one synchronisation at the end. Raises RuntimeError when
        there is no memory for it.
        """
        begins, total = [], 0
        for layout in layouts:
            begins.append(total)
            total += -(-layout.data_bytes // DATA_ALIGNMENT) * DATA_ALIGNMENT
        device = any(piece.tensor.is_cuda for layout in layouts for piece in layout.pieces)
        if self._buffer.numel() < total:
            if self._buffer.numel() and device:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = _pinned(total) if device else torch.empty(total, dtype=torch.uint8)
        with torch.no_grad():
            for layout, begin in zip(layouts, begins, strict=True):
                for piece, start in zip(layout.pieces, layout.starts, strict=True):
                    slot = self._buffer[begin + start : begin + start + piece.nbytes]
                    slot.view(piece.tensor.dtype).view(piece.tensor.shape).copy_(piece.tensor, non_blocking=True)
        if device:
            torch.cuda.synchronize()
        return [
            bytes_of(self._buffer[begin : begin + layout.data_bytes])
            for layout, begin in zip(layouts, begins, strict=True)
        ]


def _pinned(count: int) -> torch.Tensor:
    """Page-locked bytes of exactly this size: torch's own pinned allocator rounds up to a power of two, which for the
    state of a large model is another half of it, and never gives it back. Unregistered before it is freed."""
    buffer = torch.empty(count, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), count, 0))
    return buffer
