"""How the ranks are laid out: who replicates the model, shards it, or splits each sample's work. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import UserError
from configs.schema.parallel import ParallelSection


@dataclass(frozen=True)
class Layout:
    """`replicate` groups of `shard` groups of `tensor` ranks; the product is the world size.

    Neighbours form a tensor group, so that its traffic stays on a node: rank // tensor numbers the groups, and all
    ranks of one get the same samples.
    """

    replicate: int
    shard: int
    tensor: int = 1


def resolve(parallel: ParallelSection, world_size: int) -> Layout:
    """The layout for this many ranks. Raises UserError when they do not fit."""
    replicate, shard, tensor = parallel.replicate, parallel.shard, parallel.tensor
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {world_size} rank(s) of this run; "
            f"use a number of ranks that is a multiple of it, or parallel.tensor=1"
        )
    given = f"parallel.replicate={replicate}, parallel.shard={shard}"
    given += f", parallel.tensor={tensor}" if tensor > 1 else ""
    if replicate == -1:
        replicate = world_size // tensor // shard
    if shard == -1:
        shard = world_size // tensor // replicate
    if replicate * shard * tensor != world_size:
        product = f"{replicate} x {shard}" + (f" x {tensor}" if tensor > 1 else "")
        raise UserError(
            f"{given}: {product} is not the {world_size} rank(s) of this run; "
            f"parallel.replicate=1 parallel.shard=-1 fits any number"
        )
    return Layout(replicate, shard, tensor)
