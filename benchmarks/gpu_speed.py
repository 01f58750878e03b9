"""Tokens/s, MFU and memory of Muster's loop on one GPU, for the shapes and lengths people compare by.

    python benchmarks/gpu_speed.py [--shapes 1b,3b,8b] [--lengths 2048,4096,8192] [--steps 12] [--json FILE] [key=value]

Random tokens, one document per sample, bf16, per-block compile, full activation checkpointing, fused AdamW. The 8 B
shape keeps parameters and optimizer state in bf16, as one GPU of 141 GB cannot hold fp32 masters beside them. `tiny`
is a shape for a machine without a GPU, to see that the command works.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.table import show
from configs.load import load
from configs.schema import Config
from tests.distributed import run_ranks

SHAPES: dict[str, tuple[str, list[str]]] = {
    "1b": ("llama3-1b", []),
    "3b": ("llama3-1b", ["model.dim=3072", "model.layers=28", "model.heads=24", "model.head_dim=128"]),
    "8b": ("llama3-8b", ["precision.params=bf16"]),
    "tiny": ("demo", ["data.document_mask=false"]),
}
SAMPLES_PER_STEP = {2048: 8, 4096: 4, 8192: 2}
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,3b,8b")
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    rows: list[dict[str, Any]] = []
    for shape in options.shapes.split(","):
        for length in map(int, options.lengths.split(",")):
            with tempfile.TemporaryDirectory(prefix="muster-gpu-") as folder:
                config = make_config(shape, length, options.steps, Path(folder), options.overrides)
                rows.append(run_ranks(1, measure, shape, config, timeout_s=900)[0])
                print(rows[-1], flush=True)
    show("Muster on one device", rows, options.json)


def make_config(shape: str, length: int, steps: int, folder: Path, overrides: list[str]) -> Config:
    """The preset of a shape over random tokens at one length."""
    preset, changes = SHAPES[shape]
    vocab_size = load(preset, []).model.vocab_size
    batch = SAMPLES_PER_STEP.get(length, 4)
    rng = np.random.default_rng(0)
    np.save(folder / "tokens.npy", rng.integers(0, min(vocab_size, 256), (steps + 4) * batch * length, dtype=np.uint16))
    fixed = [
        f"run.dir={folder}/run",
        f"train.steps={steps}",
        f"train.global_batch={batch}",
        "train.micro_batch=1" if length == 8192 else "train.micro_batch=2",
        "train.validate_every_steps=0",
        "run.log_every_steps=1",
        "run.tensorboard=false",
        "checkpoint.every_steps=0",
        f"data.seq_len={length}",
        f"model.max_seq_len={length}",
        "data.tokenizer=bytes",
        "data.document_mask=false",
        "data.validation_fraction=0",
        f"data.sources=[{{name: random, kind: tokens, path: {folder}/tokens.npy}}]",
        "parallel.compile=true",
        "parallel.activation_checkpoint=full",
    ]
    return load(preset, [*fixed, *changes, *overrides])


def measure(shape: str, config: Config) -> dict[str, Any]:
    """Train, without a save, and take the median step after warm-up from metrics.jsonl."""
    from models import build_model
    from models.flops import causal_flops_per_token, flops_per_token, parameter_count
    from trainer.events import read_rows
    from trainer.run import Run
    from trainer.start import start
    from trainer.stop import StopWish

    class Unsaved(Run):
        def save(self, best: bool) -> None:
            self.saved_step = self.progress.step

    code = start(config, StopWish(), Unsaved)
    assert code == 0, "the run failed: see above"
    found = read_rows(Path(config.run_dir) / "metrics.jsonl")[WARM_UP:]
    tokens_per_s = statistics.median(row["tokens_per_s"] for row in found)
    with torch.device("meta"):
        model = build_model(config.model)
    mfu = found[-1]["mfu"] and statistics.median(row["mfu"] for row in found)
    ratio = causal_flops_per_token(model, config.data.seq_len) / flops_per_token(model, config.data.seq_len)
    return {
        "shape": shape,
        "parameters (B)": parameter_count(model) / 1e9,
        "sequence": config.data.seq_len,
        "tokens/step": config.train.global_batch * config.data.seq_len,
        "tokens/s": tokens_per_s,
        "MFU": mfu if mfu is not None else "n/a",
        "MFU, causal count": mfu * ratio if mfu is not None else "n/a",
        "memory (GiB)": max(row["memory_gib"] for row in found),
    }


if __name__ == "__main__":
    main()
