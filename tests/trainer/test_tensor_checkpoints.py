"""Checkpoints of tensor groups: every element once, at its place, and any layout goes on from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.config import Config
from tests.distributed import run_ranks, tiny, train
from tests.stored import Stored
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

ORDER_OF_SUMMATION = 2e-5  # of losses; see tests/test_train.py
STEP = 3
BOTTOM = ["embed.*", "blocks.0.*"]
# With 7 and 13 rows on 2 x 3 ranks, FSDP's pieces of a tensor group's part differ from what torch reports.
SHAPE: dict[str, Any] = {
    "model__vocab_size": 263,
    "model__mlp_dim": 13,
    "model__qkv_bias": True,
    "model__out_bias": True,
    "model__qk_norm": True,
    "model__tie_embeddings": True,
    "freeze__frozen": ["blocks.0.mlp.*", "blocks.1.attn.wo.*"],
    "train__steps": STEP,
    "train__global_batch": 12,
    "checkpoint__every_steps": STEP,
    "optim__schedule": "constant",
}


def write(config: dict[str, Any], place: str) -> int:
    """A run that, when it saves, also writes the whole tensors as torch reports them."""
    from trainer.life.stop import StopWish
    from trainer.run import Run
    from trainer.start import start

    class Writing(Run):
        def save(self) -> None:
            whole = {name: full(p) for name, p in self.engine.stored.items()}
            for optimizer in self.engine.optimizers:
                for parameter, state in optimizer.state.items():
                    (name,) = (n for n, p in self.engine.stored.items() if p is parameter)
                    whole |= {f"{name}.{key}": full(state[key]) for key in ("exp_avg", "exp_avg_sq")}
            if self.world.first:
                torch.save(whole, place)
            super().save()

    return start(Config.model_validate(config), StopWish(), Writing)


def stored(config: dict[str, Any], step: int) -> Stored:
    return Stored(Path(config["run"]["dir"], f"checkpoints/step-{step:08d}"))


def full(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


WRITERS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {}),
    "tensor-shard": (4, {}),
    "tensor-replicate": (4, {"parallel__replicate": 2, "parallel__shard": 1}),
    "tensor-shard-uneven": (6, {}),
    "tensor-shard-replicate": (8, {"parallel__replicate": 2}),
}


ONCE = "tensor-shard-uneven"


@pytest.mark.parametrize("layout", [ONCE, *(pytest.param(w, marks=pytest.mark.full) for w in WRITERS if w != ONCE)])
def test_every_element_is_written_once_and_at_its_place(layout: str, tmp_path: Path) -> None:
    size, changes = WRITERS[layout]
    config = tiny(tmp_path, **{**SHAPE, **changes, "parallel__tensor": 2})
    assert run_ranks(size, write, config, str(tmp_path / "whole")) == [0] * size
    expected = torch.load(tmp_path / "whole", weights_only=True)
    whole = stored(config, STEP).tensors  # raises for elements that occur twice, or not at all
    assert whole.keys() == expected.keys()
    assert any(key.endswith(".exp_avg") for key in whole)
    for key, tensor in expected.items():
        assert torch.equal(whole[key], tensor), key


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[float]]:
    """A run written at 2 x 2 up to STEP, and the losses of one process that went on from a copy of it."""
    config = tiny(tmp_path_factory.mktemp("written"), **SHAPE, parallel__tensor=2)
    assert train(config, 4) == [0] * 4
    return config, go_on(config, 1, {}, tmp_path_factory.mktemp("one"))


def go_on(config: dict[str, Any], size: int, parallel: dict[str, Any], folder: Path) -> list[float]:
    """Losses of three more steps, from a copy."""
    shutil.copytree(config["run"]["dir"], folder / "run")
    train_section = {**config["train"], "steps": STEP + 3}
    copy = {
        **config,
        "run": {**config["run"], "dir": str(folder / "run")},
        "parallel": parallel,
        "train": train_section,
    }
    assert train(copy, size) == [0] * size
    found = [row for row in read_rows(RunFolder(folder / "run").metrics) if "loss" in row and row["attempt"] == 1]
    assert [row["step"] for row in found] == [4, 5, 6]
    return [row["loss"] for row in found]


@pytest.mark.parametrize(
    ("size", "tensor"),
    [(3, 1), *(pytest.param(size, 2, marks=pytest.mark.full) for size in (2, 4, 6))],
)
def test_any_layout_goes_on(
    size: int, tensor: int, written: tuple[dict[str, Any], list[float]], tmp_path: Path
) -> None:
    config, losses = written
    assert go_on(config, size, {"tensor": tensor}, tmp_path) == pytest.approx(losses, abs=ORDER_OF_SUMMATION)


@pytest.mark.full
def test_resuming_equals_going_on_bit_for_bit(tmp_path: Path) -> None:
    changes = {**SHAPE, "model__dropout": 0.1, "parallel__tensor": 2}
    straight = tiny(tmp_path / "straight", **{**changes, "train__steps": 6})
    broken = tiny(tmp_path / "broken", **changes)
    broken["data"] = straight["data"]
    assert train(straight, 4) == [0] * 4
    assert train(broken, 4) == [0] * 4
    broken["train"]["steps"] = 6
    assert train(broken, 4) == [0] * 4
    ours, theirs = stored(broken, 6), stored(straight, 6)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(ours.same(theirs, key) for key in ours.tensors)


def test_freezing_and_unfreezing_goes_on_in_tensor_groups_and_out_of_them(tmp_path: Path) -> None:
    """The bottom is frozen at 2, and the head instead at 4. Restarted at 3 and 5 in other layouts."""
    schedule = [{"step": 2, "frozen": BOTTOM}, {"step": 4, "frozen": ["blocks.1.attn.*", "norm.*"]}]
    changes = {**SHAPE, "train__steps": 6, "freeze__frozen": [], "freeze__schedule": schedule}
    changes |= {"checkpoint__every_steps": 1, "checkpoint__keep": {"last": 100}, "optim__warmup_steps": 0}
    alone, config = tiny(tmp_path / "alone", **changes), tiny(tmp_path / "tensor", **changes)
    config["data"] = alone["data"]
    assert train(alone) == [0]
    for size, tensor, steps in ((4, 2, 3), (1, 1, 5), (2, 2, 6)):
        config |= {"parallel": {"tensor": tensor}, "train": {**alone["train"], "steps": steps}}
        assert train(config, size) == [0] * size
    found = [row["loss"] for row in read_rows(RunFolder(Path(config["run"]["dir"])).metrics) if "loss" in row]
    expected = [row["loss"] for row in read_rows(RunFolder(Path(alone["run"]["dir"])).metrics) if "loss" in row]
    assert found == pytest.approx(expected, abs=ORDER_OF_SUMMATION)
    assert stored(config, 6).manifest["step_counts"] == stored(alone, 6).manifest["step_counts"]
    before, after = stored(config, 2), stored(config, 4)
    for key in before.tensors:
        assert after.same(before, key) == key.startswith(("embed.", "blocks.0.")), key


def boxes() -> list[tuple[tuple[int, ...], list[Any]]]:
    """(sizes, [our box is right, torch's is]) of tensors of 2 to 14 rows, cut twice along rows or both ways."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from trainer.engines.boxes import box_of, local_part
    from trainer.engines.tensor import _Cut

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("shard", "tensor"))
    found = []
    for rows, columns, dim in [(n, 2, 0) for n in range(2, 15)] + [(4, 7, 1), (7, 5, 1), (2, 3, 1)]:
        module = nn.Module()
        whole = torch.arange(float(rows * columns)).view(rows, columns)
        module.weight = nn.Parameter(whole.clone())
        _Cut(mesh["tensor"])(module, weight=Shard(dim))
        fully_shard(module, mesh=mesh["shard"])
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        theirs = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
        good = []
        for offsets, sizes in (box_of(weight), theirs[::-1]):
            box = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            good.append(tuple(sizes) == tuple(local_part(weight).shape) and torch.equal(box, local_part(weight)))
        found.append(((rows, columns, dim), good))
    return found


def test_boxes_of_what_is_cut_twice() -> None:
    """Our boxes are right for every number of rows. torch's are not, so we compute our own."""
    ranks = run_ranks(6, boxes)
    for row in zip(*ranks, strict=True):
        assert all(good[0] for _, good in row), row[0][0]
    assert not all(good[1] for rank in ranks for _, good in rank)
