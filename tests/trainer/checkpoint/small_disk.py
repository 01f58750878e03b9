"""Saves to a filesystem of a few MB until it is full, makes room, and saves again. Run this inside its own mount
namespace (`unshare --mount`). Prints what happened as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from configs.schema.checkpoint import KeepSection
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore


def main(folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True)
    store = CheckpointStore(folder / "checkpoints", asynchronous=False, keep=KeepSection(last=99), say=print)
    rows = []
    for step in range(1, 8):
        if step == 2:  # with it there is room for two checkpoints of 0.8 MB, without it for four
            (folder / "filler").write_bytes(bytes(2 << 20))
        if step == 6:
            (folder / "filler").unlink()
        tensor = torch.full((200_000,), float(step))
        store.save(step, [Piece("w", "model", tensor, (200_000,), (0,), (200_000,))], RunState())
        (result,) = store.wait()
        left = sorted(path.name for path in store.root.iterdir())
        rows.append({"step": step, "ok": result.ok, "error": result.error, "left": left})
    values = [(step, float(Checkpoint(store.shelf.path(step)).read("w")[-1])) for step in store.shelf.steps()]
    print(json.dumps({"saves": rows, "values": values}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
