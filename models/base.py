"""What an engine must know of a model. It is an object beside the module, not a base class of the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.tensor import TensorPlan


def _nothing(module: nn.Module) -> None:
    """For a model that has no buffers to make again."""


@dataclass(frozen=True)
class Model:
    """A built model. On the meta device nothing is allocated.

    An engine relies on one rule: a weight is used only inside the forward of a module of its unit. Only then are
    sharded weights whole.
    """

    module: nn.Module
    # In forward order: the modules that are recomputed, compiled and gathered ahead.
    blocks: Sequence[nn.Module]
    # Modules to be sharded together, in forward order. The root shards the remaining parameters.
    units: Sequence[Sequence[nn.Module]]
    # Fills the whole parameter or persistent buffer of that name in place. Draws from the generator alone.
    initialise: Callable[[str, Tensor, torch.Generator], None]
    # FLOPs of forward and backward for the tensors of a batch, with the parameters that train now.
    flops: Callable[[Mapping[str, Tensor]], float]
    # (name, dimensions) -> whether the tensor is a matrix. Weight decay applies to it, and Muon where `muon` is true.
    matrices: Callable[[str, int], bool]
    muon: Callable[[str, int], bool] = lambda name, dims: False
    # Computes buffers that no checkpoint holds, after memory was allocated.
    rebuild_buffers: Callable[[nn.Module], None] = _nothing
    # Whether a block draws random numbers while it trains. If it does, a recomputation must draw the same ones.
    random: bool = True
    # How the model is split over ranks that compute each sample together. None: `parallel.tensor` must be 1.
    plan: TensorPlan | None = None
