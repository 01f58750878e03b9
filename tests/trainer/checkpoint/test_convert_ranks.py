"""Folders that torch.distributed.checkpoint wrote on several ranks: FSDP2 with AdamW, and tensors cut along columns.

torch itself gathers the expected content on the ranks that wrote them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_convert import Net, check_net, same_bits, step
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from launch.checkpoint.convert.convert import convert
from tests.distributed import run_ranks
from trainer.checkpoint.load.checkpoint import Checkpoint


def write_fsdp(folder: str, flatten: bool, told: str) -> None:
    """Train and save as PyTorch's tutorial does. Rank 0 writes the whole state, by Muster's names, to `told`."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.manual_seed(5)
    model = Net()
    fully_shard(model.inner)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": states, "step": 3}, checkpoint_id=folder)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimizer, options=whole)
    if dist.get_rank() == 0:
        found = dict(weights)
        for name, kinds in states["state"].items():
            found |= {f"{name}.{key}": value for key, value in kinds.items()}
        torch.save(found, told)
    dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "flatten"), [(2, False), (3, True)])
def test_fsdp2_and_adamw(tmp_path: Path, ranks: int, flatten: bool) -> None:
    run_ranks(ranks, write_fsdp, str(tmp_path / "d"), flatten, str(tmp_path / "told"))
    expected = torch.load(tmp_path / "told", weights_only=True)
    assert len(list((tmp_path / "d").glob("*.distcp"))) == ranks
    done = convert(tmp_path / "d", tmp_path / "m", "muster")
    assert (done.source_kind, done.step, done.left_out) == ("dcp", 3, [])
    check_net(tmp_path / "m", expected, 3)


def cuts() -> dict[str, tuple[tuple[int, ...], list[Any]]]:
    """Name -> (whole shape, placements on a mesh of 2 x 1 or 2 x 2): rows, columns, both, copies."""
    return {
        "rows": ((5, 7), [Shard(0), Replicate()]),
        "columns": ((5, 7), [Shard(1), Replicate()]),
        "both": ((9, 7, 3), [Shard(0), Shard(1)]),
        "last": ((2, 3, 11), [Replicate(), Shard(2)]),
        "copies": ((4,), [Replicate(), Replicate()]),
    }


def write_cut(folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    tensors: dict[str, DTensor] = {}
    for name, (shape, placements) in cuts().items():
        tensors[name] = distribute_tensor(whole(shape), mesh, placements)
    dcp.save({"model": tensors}, checkpoint_id=folder)
    dist.destroy_process_group()


def whole(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensors_cut_along_any_dimension(tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(ranks, write_cut, str(tmp_path / "d"))
    monkeypatch.setattr("launch.checkpoint.convert.state.PART_BYTES", 40)  # parts then begin and end inside rows
    convert(tmp_path / "d", tmp_path / "m", "muster")
    checkpoint = Checkpoint(tmp_path / "m")
    checkpoint.verify()
    for name, (shape, _) in cuts().items():
        assert same_bits(checkpoint.read(name), whole(shape)), name
