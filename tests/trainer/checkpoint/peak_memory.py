"""Saves 200 MB of tensors twice. Prints their bytes, and by how many bytes the process's peak memory grew."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def piece(key: str, group: Group, size: int) -> Piece:
    return Piece(key, group, torch.ones(size), (size,), (0,), (size,))


def main(folder: Path) -> None:
    warm = CheckpointStore(folder / "warm")
    warm.save(1, [piece("a", "model", 10)], RunState())
    warm.wait()
    pieces = [piece(f"p{i}", "optim" if i % 2 else "model", 5_000_000) for i in range(10)]
    frozen = [piece(f"f{i}", "frozen", 5_000_000) for i in range(5)]
    store = CheckpointStore(folder / "checkpoints")
    before = peak_bytes()
    for step in (1, 2):
        store.save(step, [*pieces, *frozen], RunState())
        assert [result.error for result in store.wait()] == [None]
    print(sum(p.nbytes for p in pieces), peak_bytes() - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
