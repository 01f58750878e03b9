"""Whether a layout fits the ranks there are. No torch: asked before anything starts."""

from __future__ import annotations

from configs.errors import UserError
from configs.schema import Config


def check_layout(config: Config, size: int) -> None:
    """Raise UserError when the layout does not fit `size` ranks."""
    p = config.parallel
    if size % p.replicate:
        raise UserError(f"parallel.replicate={p.replicate} does not divide the {size} ranks of this run")
    if p.shard not in (-1, size // p.replicate):
        fits = size // p.replicate
        raise UserError(
            f"parallel.replicate={p.replicate} x parallel.shard={p.shard} is {p.replicate * p.shard} ranks, "
            f"but this run has {size}; shard={fits} or -1 fits"
        )
