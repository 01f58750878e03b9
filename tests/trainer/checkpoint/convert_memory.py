"""The memory that converting takes: `python convert_memory.py FOLDER MEGABYTES`.

Converts a state of that size from each kind to each other kind, each time in a new process. Prints as JSON how many
bytes the peak memory of the process grew beyond its imports.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from launch.checkpoint.convert.convert import convert
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.kinds import TARGETS, Kind
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_a_process(folder: Path, source: Path, target: Path, to: Kind) -> int:
    """The growth of the peak, which a forked child reports."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = peak_bytes()
        convert(source, target, to)
        os.write(tell, str(peak_bytes() - before).encode())
        os._exit(0)
    os.close(tell)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    with os.fdopen(told) as file:
        return int(file.read())


def save(root: Path, megabytes: int) -> Path:
    """Save three tensors of a third each. The largest is one piece."""
    count = megabytes * 1_000_000 // 12

    def piece(key: str, group: str) -> Piece:
        tensor = torch.randn(count // 1000, 1000)
        return Piece(key, group, tensor, tuple(tensor.shape), (0, 0), tuple(tensor.shape))  # type: ignore[arg-type]

    store = CheckpointStore(root, asynchronous=False)
    store.save(
        1,
        [piece("w", "model"), piece("w.exp_avg", "optim"), piece("w.exp_avg_sq", "optim")],
        RunState(step_counts={"w": 1}),
    )
    assert [result.error for result in store.poll()] == [None]
    return store.shelf.path(1)


def main(folder: Path, megabytes: int) -> None:
    import torch.distributed.checkpoint  # noqa: F401 - its import must not count as growth

    os.fsync = lambda descriptor: None  # fsync takes most of the time, and no memory
    pid = os.fork()  # so that this process never holds the state
    if pid == 0:
        save(folder / "checkpoints", megabytes)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    sources = {"muster": folder / "checkpoints" / "step-00000001"}
    grown = {}
    for kind in ("torch", "dcp"):
        sources[kind] = folder / kind
        grown[f"muster to {kind}"] = in_a_process(folder, sources["muster"], sources[kind], kind)  # type: ignore[arg-type]
    for kind in ("torch", "dcp"):
        for to in TARGETS:
            if to != kind:
                target = folder / f"{kind}-{to}"
                grown[f"{kind} to {to}"] = in_a_process(folder, sources[kind], target, to)
                os.system(f"rm -rf {target}")
    print(json.dumps(grown))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
