"""Which box of a whole tensor this rank holds."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of `tensor`, as a plain tensor that shares it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of this rank's part in the whole tensor; the whole when it is not sharded."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets), tuple(sizes)
