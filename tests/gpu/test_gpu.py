"""What only a GPU can show. `make gpu` runs these tests; without a GPU they are not part of `make test`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks, tiny, train, train_here
from tests.test_begin import values
from tests.test_train import losses, tensors
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.staging import page_lock
from trainer.checkpoint.save.store import CheckpointStore
from trainer.life.rows import read_rows

pytestmark = pytest.mark.gpu


def test_there_is_a_gpu() -> None:
    assert torch.cuda.is_available(), "make gpu needs an NVIDIA GPU and a CUDA build of torch"


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_resuming_equals_going_on_bit_for_bit(compute: str, tmp_path: Path) -> None:
    fixed: dict[str, Any] = {
        "precision__deterministic": True,
        "precision__compute": compute,
        "optim__schedule": "constant",
        "checkpoint__every_steps": 10,
    }
    straight = tiny(tmp_path / "straight", train__steps=20, **fixed)
    broken = tiny(tmp_path / "broken", train__steps=10, **fixed)
    broken["data"] = straight["data"]
    assert train(straight) == [0]
    assert train(broken) == [0]
    broken["train"]["steps"] = 20
    assert train(broken) == [0]
    assert losses(broken) == losses(straight)
    assert tensors(broken["run"]["dir"], 20) == tensors(straight["run"]["dir"], 20)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel__compile": True},
        {"parallel__activation_checkpoint": "full"},
        {"parallel__activation_checkpoint": "selective", "parallel__compile": True},
        {"data__document_mask": False},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_bf16_learns_as_fp32_does(changes: dict[str, Any], tmp_path: Path) -> None:
    """bf16 keeps 8 bits of each product. Over 20 steps of this model the losses differ by at most 0.02."""
    found = []
    for compute in ("fp32", "bf16"):
        config = tiny(tmp_path / compute, precision__compute=compute, train__steps=20, **changes)
        assert train(config, timeout_s=300) == [0]
        found.append(losses(config))
    assert found[1] == pytest.approx(found[0], abs=0.02)
    assert found[0][-1] < found[0][0]


def test_rows_have_the_gpus_memory(tmp_path: Path) -> None:
    config = tiny(tmp_path, precision__compute="bf16")
    assert train(config) == [0]
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert all(0 < row["memory_gib"] < 4 for row in rows)


def test_a_checkpoint_moves_between_gpu_and_cpu(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert train(config) == [0]
    on_gpu = values(tmp_path / "run", 6)
    config["train"]["steps"] = 7
    config["optim"]["lr"] = 1e-30
    config["run"]["accept_changes"] = ["optim.lr"]
    # given to the rank itself: the server that forks it keeps its own first environment
    assert run_ranks(1, train_here, config, False, env={"CUDA_VISIBLE_DEVICES": ""}) == [0]
    layouts = [(tmp_path / f"run/attempts/{n:03d}/rank-00000.log").read_text() for n in (0, 1)]
    assert [", cuda" in text for text in layouts] == [True, False]
    assert values(tmp_path / "run", 7) == on_gpu


def test_page_locking_that_fails_leaves_no_error_to_training() -> None:
    """CUDA keeps the error of a call that failed; the next kernel's launch would raise it."""
    device, buffer = torch.device("cuda", 0), torch.empty(1 << 20, dtype=torch.uint8)
    unlock = page_lock(buffer, device)
    assert buffer.is_pinned()
    with pytest.raises(RuntimeError, match="already"):
        page_lock(buffer, device)
    assert float(torch.ones(3, device=device).sum()) == 3.0
    unlock()
    assert not buffer.is_pinned()


def test_frozen_tensors_are_saved_while_a_long_step_goes_on(tmp_path: Path) -> None:
    """Their blocks do not wait for what is queued on the default stream, and are the right ones."""
    device = torch.device("cuda", 0)
    trained, frozen = torch.ones(1000, device=device), torch.randn(15_000_000, device=device)
    pieces = [
        Piece("w", "model", trained, (1000,), (0,), (1000,)),
        Piece("f", "frozen", frozen, (15_000_000,), (0,), (15_000_000,)),
    ]
    for step in (1, 2):  # the first time page-locked buffers are made, for which a driver may wait for the GPU
        store = CheckpointStore(tmp_path / f"{step}")
        store.save(step, pieces, RunState())
        torch.cuda._sleep((step - 1) * 30 * 10**9)  # more than 10 s of any GPU's clock
        step_done = torch.cuda.Event()
        step_done.record()
        assert [result.error for result in store.wait()] == [None]
    assert not step_done.query()
    torch.cuda.synchronize()
    checkpoint = Checkpoint(store.shelf.path(2))
    checkpoint.verify()
    assert torch.equal(checkpoint.read("f"), frozen.cpu())
