"""The work of a pool's ranks: a whole attempt of a run, by the trainer's own parts, and the content of their memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from configs.config import Config
from configs.errors import UserError
from configs.schema.parallel import ParallelSection
from tests.matrix.model import Gain, register
from trainer import attempt
from trainer.checkpoint.save.store import SaveResult
from trainer.engines import fsdp
from trainer.life.attempts import FINISHED
from trainer.life.layout import resolve
from trainer.life.stop import StopWish
from trainer.ranks import world
from trainer.run import Run

_state: dict[str, Any] = {"calls": 0}


class Part(NamedTuple):
    """A piece of a tensor as bytes."""

    key: str
    group: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int | None  # of a flat range; None for a box
    content: bytes


@dataclass
class Memory:
    """What one rank held at one moment."""

    parts: list[Part]
    step_counts: dict[str, int]
    progress: dict[str, Any]
    trainable: set[str]


@dataclass
class Told:
    """What one rank returns about an attempt. `refused`: the words of a UserError, the same on all ranks."""

    loaded: Memory | None = None
    ended: Memory | None = None
    errors: list[str] = field(default_factory=list)
    refused: str | None = None


def memory(run: Run) -> Memory:
    parts = []
    for piece in run.engine.pieces():
        content = piece.tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(piece.tensor.dtype).removeprefix("torch.")
        place = piece.offsets, piece.sizes, piece.start
        parts.append(Part(piece.key, piece.group, dtype, piece.shape, *place, content))
    return Memory(parts, run.engine.step_counts(), run.progress.state(), run.engine.trainable())


def go(config: dict[str, Any], reads: bool) -> Told:
    """One attempt. A reader saves what it has loaded before it makes a step."""
    told = Told()

    class Watched(Run):
        def build(self) -> None:
            super().build()
            told.loaded = memory(self)
            if reads:
                super().save()
                self.poll_saves(wait=True)

        def save(self) -> None:
            if not reads:
                gain = self.engine.model.get_submodule("drop")
                assert isinstance(gain, Gain)
                gain.change()
            super().save()

        def _tell(self, result: SaveResult) -> None:
            if result.error:
                told.errors.append(result.error)
            super()._tell(result)

        def close(self) -> None:
            told.ended = memory(self)
            super().close()

    built = Config.model_validate(config)
    try:
        end = attempt.run_attempt(built, StopWish(), _join(built), Watched)
    except UserError as error:
        told.refused = str(error)
    else:
        assert end.exit_code == FINISHED, end
    return told


def _join(config: Config) -> world.World:
    """A world of the pool's ranks for one attempt, with the attempt's layout, and a store that nobody else uses."""
    if "world" not in _state:
        register()
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN, so elements not loaded show
        fsdp.make_mesh = _mesh
        gc.collect()
        gc.freeze()  # an engine collects when it is built: to look at torch would take half of a cell's time
        _state["world"] = world.start(config)
    _state["calls"] += 1
    joined: world.World = _state["world"]
    kv = None if joined.kv is None else PrefixStore(f"call-{_state['calls']}", joined.kv)
    return replace(joined, kv=kv, tensor=config.parallel.tensor)


_new_mesh = fsdp.make_mesh


def _mesh(parallel: ParallelSection, joined: world.World) -> Any:
    layout = resolve(parallel, joined.size)
    return _mesh_of(layout.replicate, layout.shard, layout.tensor)


@cache
def _mesh_of(replicate: int, shard: int, tensor: int) -> Any:
    """One mesh, with its process groups, per layout."""
    parallel = ParallelSection(replicate=replicate, shard=shard, tensor=tensor)
    return _new_mesh(parallel, _state["world"])
