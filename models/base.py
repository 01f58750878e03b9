"""What an engine must know of a model: one object beside the module, not a base class of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.tensor import TensorPlan


def _nothing(module: nn.Module) -> None:
    """A model without buffers that must be made again."""


@dataclass(frozen=True)
class Model:
    """A built model. On the meta device nothing is allocated.

    An engine relies on one thing: a weight is used only inside the forward of a module of its unit, for that is when
    sharded weights are whole.
    """

    module: nn.Module
    # In forward order: what is recomputed, compiled and gathered ahead.
    blocks: Sequence[nn.Module]
    # Modules to be sharded together, in forward order; the root takes what is left.
    units: Sequence[Sequence[nn.Module]]
    # Fills a whole parameter or persistent buffer of that name in place, from the generator alone.
    initialise: Callable[[str, Tensor, torch.Generator], None]
    # FLOPs of forward and backward for the tensors of a batch, for what trains now.
    flops: Callable[[Mapping[str, Tensor]], float]
    # Whether a tensor is a matrix: weight decay touches it, and so does Muon where `muon` says so.
    matrices: Callable[[str, int], bool]
    muon: Callable[[str, int], bool] = lambda name, dims: False
    # Makes buffers that no checkpoint holds, after memory was taken.
    rebuild_buffers: Callable[[nn.Module], None] = _nothing
    # How it is split over ranks that compute each sample together; None: `parallel.tensor` must be 1.
    plan: TensorPlan | None = None
