"""How the ranks are laid out: groups that replicate the model, and ranks that share one copy. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import UserError
from configs.schema import ParallelSection


@dataclass(frozen=True)
class Layout:
    """`replicate` groups of `shard` ranks; their product is the world size."""

    replicate: int
    shard: int


def resolve(parallel: ParallelSection, world_size: int) -> Layout:
    """The layout for this many ranks. Raises UserError when they do not fit."""
    replicate, shard = parallel.replicate, parallel.shard
    given = f"parallel.replicate={replicate}, parallel.shard={shard}"
    if replicate == -1:
        replicate = world_size // shard
    if shard == -1:
        shard = world_size // replicate
    if replicate * shard != world_size:
        raise UserError(
            f"{given}: {replicate} x {shard} is not the {world_size} rank(s) of this run; "
            f"parallel.replicate=1 parallel.shard=-1 fits any number"
        )
    if parallel.cpu_offload and world_size == 1:
        raise UserError("parallel.cpu_offload needs at least 2 ranks: one process keeps everything on its device")
    return Layout(replicate, shard)
