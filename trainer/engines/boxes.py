"""Which box of a whole tensor this rank holds, and how many ranks hold the same."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of `tensor`, as a plain tensor that shares it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of this rank's part in the whole tensor; the whole when it is not sharded.

    Computed here, as FSDP cuts the part that tensor parallelism left. torch's own
    `compute_local_shape_and_global_offset` is wrong where such a part cannot be cut evenly, as with 7 rows over a mesh
    of 3 x 2.
    """
    offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        for mesh_dim in _in_order_of_cutting(tensor):
            dim = tensor.placements[mesh_dim].dim  # type: ignore[attr-defined]
            ranks, rank = tensor.device_mesh.size(mesh_dim), tensor.device_mesh.get_local_rank(mesh_dim)
            size = -(-sizes[dim] // ranks)  # to each; what is left to the last, nothing beyond
            start = min(size * rank, sizes[dim])
            offsets[dim] += start
            sizes[dim] = min(size, sizes[dim] - start)
    return tuple(offsets), tuple(sizes)


def _in_order_of_cutting(tensor: DTensor) -> list[int]:
    """Mesh dimensions along which the tensor is cut. `_StridedShard` says: after what is cut by later dimensions."""
    strided = [i for i, p in enumerate(tensor.placements) if isinstance(p, _StridedShard)]
    plain = [i for i, p in enumerate(tensor.placements) if isinstance(p, Shard) and i not in strided]
    return plain + strided[::-1]


def replica_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(number of this rank, how many): the ranks that hold the same box."""
    number, count = 0, 1
    if isinstance(tensor, DTensor):
        for mesh_dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Replicate):
                ranks = tensor.device_mesh.size(mesh_dim)
                number, count = number * ranks + tensor.device_mesh.get_local_rank(mesh_dim), count * ranks
    return number, count
