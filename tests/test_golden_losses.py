"""What a small run learned at commit 7f8dd34, before there were tasks: later versions learn the same.

`golden/losses.json` holds its rows and the 2-norm of each tensor of its last checkpoint, at 1, 2 and 3 ranks. Bits
differ between processors; on one machine `benchmarks/against.py bits` compares them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed import tiny, train
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden").joinpath("losses.json").read_text("utf-8"))
LOSS = 1e-6  # of it; fp32 keeps 24 bits, and another processor adds up in another order
NORM = 1e-4  # of it: Adam divides by gradients that are almost 0, so their last bits show


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_same_is_learned_as_before_there_were_tasks(ranks: int, tmp_path: Path) -> None:
    config = tiny(tmp_path, train__validate_every_steps=3, train__clip_norm=0.5)
    assert train(config, ranks) == [0] * ranks
    folder, golden = RunFolder(Path(config["run"]["dir"])), GOLDEN[str(ranks)]
    rows = read_rows(folder.metrics)
    assert [row["step"] for row in rows] == [row["step"] for row in golden["rows"]]
    for row, old in zip(rows, golden["rows"], strict=True):
        for key in old:
            assert row[key] == pytest.approx(old[key], rel=NORM if key == "grad_norm" else LOSS), (row["step"], key)
    squares: dict[str, float] = {}
    for path in folder.checkpoints.glob("step-00000006/**/*.safetensors"):
        for key, part in load_file(path).items():
            name = key.partition("@")[0]
            squares[name] = squares.get(name, 0.0) + float(np.square(part, dtype=np.float64).sum())
    assert {name: math.sqrt(square) for name, square in squares.items()} == pytest.approx(golden["norms"], rel=NORM)
