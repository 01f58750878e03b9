"""Which engine runs: the only place that knows. No torch until one is built."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from configs.config import Config
from configs.deepspeed import secondary_size
from configs.errors import UserError
from configs.schema.parallel import ParallelSection

if TYPE_CHECKING:
    from trainer.engines.base import Engine
    from trainer.ranks.world import World
    from trainer.tasks.base import Task

# Before 0.19.8 a step full of NaN was applied, and gradients were off in bf16; after 0.19 its inside may lie otherwise.
DEEPSPEED = (0, 19, 8), (0, 20)


def check_engine(parallel: ParallelSection, world_size: int) -> None:
    """Raise UserError when the engine cannot run on so many ranks, before anything is touched."""
    if parallel.engine == "zero":
        size = min(secondary_size(parallel), world_size)
        if world_size % size:
            raise UserError(f"parallel.deepspeed: zero_hpz_partition_size {size} does not divide {world_size} ranks")
    elif parallel.cpu_offload and world_size == 1:
        raise UserError("parallel.cpu_offload needs at least 2 ranks: one process keeps everything on its device")


def check_package(parallel: ParallelSection) -> None:
    """Raise UserError when the engine's package is missing, or is another version."""
    if parallel.engine != "zero":
        return
    wanted = "parallel.engine=zero needs deepspeed>=0.19.8,<0.20"
    how = "install it: pip install 'muster[deepspeed]', or use parallel.engine=fsdp"
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError(f"{wanted}, and there is none\n{how}") from None
    low, high = DEEPSPEED
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not low <= numbers < high:
        raise UserError(f"{wanted}, and {version} is installed\n{how}")


def build_engine(config: Config, world: World, task: Task) -> Engine:
    """The engine that the config names."""
    if config.parallel.engine == "zero":
        from trainer.engines.zero.engine import ZeroEngine

        return ZeroEngine(config, world, task)
    from trainer.engines.fsdp import FsdpEngine

    return FsdpEngine(config, world, task)
