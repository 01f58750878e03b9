"""The boxes that `benchmarks/simulate.py` computes for a thousand ranks equal those of real FSDP2 and tensor groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulate import STATES, Shapes, pieces, simulate
from configs.load import load
from tests.distributed import run_ranks

SMALL = [
    "model.dim=48",
    "model.layers=1",
    "model.heads=4",
    "model.kv_heads=2",
    "model.mlp_dim=13",
    "model.vocab_size=264",
    "parallel.replicate=1",
    "parallel.shard=-1",
]


def cut_by_torch(overrides: list[str]) -> dict[str, Any]:
    """For each parameter, this rank's (offsets, sizes, number among ranks with this box, how many such ranks)."""
    import torch
    from torch.distributed.fsdp import fully_shard

    from models import build_model
    from trainer.engines.boxes import box_of, replica_of
    from trainer.engines.fsdp import make_mesh
    from trainer.engines.tensor import data_mesh, split_model, tensor_mesh
    from trainer.ranks import world as worlds

    config = load("demo", overrides)
    world = worlds.start(config)
    mesh = make_mesh(config.parallel, world)
    assert mesh is not None
    with torch.device("meta"):
        built = build_model(config.model)
    group = tensor_mesh(mesh)
    if group is not None:
        split_model(built, group)
    model: Any = built.module
    for block in built.blocks:
        fully_shard(block, mesh=data_mesh(mesh))
    fully_shard(model, mesh=data_mesh(mesh))
    found = {name: (*box_of(p), *replica_of(p)) for name, p in model.named_parameters()}
    worlds.leave()
    return found


@pytest.mark.parametrize(("ranks", "tensor"), [(3, 1), (2, 2), (4, 2)])
def test_simulated_boxes_are_the_real_ones(tmp_path: Path, ranks: int, tensor: int) -> None:
    overrides = [*SMALL, f"parallel.tensor={tensor}", f"run.dir={tmp_path}/run"]
    shapes = Shapes("demo", overrides)
    real = run_ranks(ranks, cut_by_torch, overrides)
    for rank in range(ranks):
        mine = {p.key: (p.offsets, p.sizes, p.replica, p.replicas) for p in pieces(shapes, tensor, ranks, rank)}
        assert mine.keys() == {name + state for name in real[rank] for state in STATES}
        assert {name: mine[name] for name in real[rank]} == real[rank]


def test_a_small_simulation_adds_up(tmp_path: Path) -> None:
    shapes = Shapes("demo", [*SMALL, f"run.dir={tmp_path}/run"])
    row = simulate(shapes, 2, 8)
    assert row["files"] == 16
    assert row["readers"] == 6
    assert row["read / own bytes"] >= 1
