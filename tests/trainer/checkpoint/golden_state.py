"""The content of the golden checkpoint of format 1, and how it was made.

`python tests/trainer/checkpoint/golden_state.py FOLDER` wrote it once, and it stays: later versions must read it. Every
value follows from a formula, so that the check needs no random generator and no reader of ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from trainer.checkpoint.format.pieces import DTYPES, Piece
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

STEP = 500
FOLDER = Path(__file__).with_name("golden") / "step-00000500"


def tensors() -> dict[str, torch.Tensor]:
    """Every tensor, whole: parameters cut in several ways, one of each dtype, a scalar, one without elements."""
    state = {
        "blocks.0.wq.weight": torch.arange(35, dtype=torch.float32).reshape(7, 5) / 8,
        "blocks.0.wq.weight.exp_avg": -torch.arange(35, dtype=torch.float32).reshape(7, 5),
        "blocks.0.wq.weight.exp_avg_sq": torch.arange(35, dtype=torch.float32).reshape(7, 5) ** 2,
        "embed.weight": (torch.arange(24) / 4).bfloat16().reshape(4, 6),
        "scale": torch.tensor(0.75, dtype=torch.float64),
        "nothing": torch.empty(0, 3),
    }
    for name, dtype in DTYPES.items():
        state[f"dtype.{name}"] = torch.arange(6).remainder(2).to(dtype)
    return state


def pieces(rank: int) -> list[Piece]:
    """The pieces of rank 0 or 1: rows cut 4 and 3, a moment as flat ranges, columns frozen, the rest on both."""
    full = tensors()
    rows, flat, columns = [
        (slice(0, 4), slice(0, 17), slice(0, 2)),
        (slice(4, 7), slice(17, 35), slice(2, 6)),
    ][rank]
    cut: list[Piece] = []
    for key in ("blocks.0.wq.weight", "blocks.0.wq.weight.exp_avg"):
        part = full.pop(key)[rows]
        group = "optim" if key.endswith("avg") else "model"
        cut.append(Piece(key, group, part, (7, 5), (rows.start, 0), tuple(part.shape)))  # type: ignore[arg-type]
    ranges = full.pop("blocks.0.wq.weight.exp_avg_sq").view(-1)[flat]
    cut.append(Piece("blocks.0.wq.weight.exp_avg_sq", "optim", ranges, (7, 5), (), (), start=flat.start))
    frozen = full.pop("embed.weight")[:, columns]
    cut.append(Piece("embed.weight", "frozen", frozen, (4, 6), (0, columns.start), tuple(frozen.shape)))
    for key, tensor in full.items():
        shape = tuple(tensor.shape)
        cut.append(Piece(key, "model", tensor, shape, (0,) * tensor.ndim, shape, replica=rank, replicas=2))
    return cut


def state() -> RunState:
    return RunState(
        position={"consumed_samples": 4000},
        loop={"best_loss": 2.5, "nonfinite": 0},
        config={"train": {"steps": 1000}},
        fingerprint="0123456789abcdef",
        model={"name": "golden"},
        layout={"world_size": 2},
        data={"corpus": "00ff"},
        step_counts={"blocks.0.wq.weight": 498},
        aliases={"head.weight": "embed.weight"},
        trained_steps={"embed.weight": 300},
    )


def make(root: Path) -> None:
    kv = HashStore()
    stores = [CheckpointStore(root, rank, 2, kv, attempt=2) for rank in (0, 1)]
    for rank, store in enumerate(stores):
        store.save(STEP, pieces(rank), state(), metric=2.5)
    assert [result.error for store in stores for result in store.wait()] == [None, None]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
