"""Tokens/s, MFU and memory of Muster's loop on one GPU, for the shapes and lengths people compare by.

    python benchmarks/gpu_speed.py [--rows 8b@8192,1b@4096] [--steps 10] [--limit-s 420] [--json FILE] [key=value]

Random tokens, one document per sample, bf16, per-block compile, full activation checkpointing, fused AdamW. Nothing is
saved, so a row needs less than 1 MB of disk.

Every row fits a GPU of 80 GB, by arithmetic. 1 B and 3 B with fp32 masters take 22 and 58 GB. 8 B with parameters and
optimizer state in bf16 takes 64 GB, and 3 GB for its head. Activations take up to 3 GB.

The most telling rows come first. Each row is printed and written as soon as it is measured. A row that does not fit the
time left is skipped, and a row that is cut off keeps the steps it made. `tiny@64` is a row for a machine without a GPU:
it shows that the command works.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.table import about, line, show, write_rows
from configs.config import Config
from configs.load import load
from tests.distributed import RanksFailed, run_ranks
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

TITLE = "Muster on one device"
SHAPES: dict[str, tuple[str, list[str]]] = {
    "1b": ("llama3-1b", []),
    "3b": ("llama3-1b", ["model.dim=3072", "model.layers=28", "model.heads=24", "model.head_dim=128"]),
    "8b": ("llama3-8b", ["precision.params=bf16"]),
    "tiny": ("demo", ["parallel.compile=false"]),
}
# Seconds from the start of a row to its end on an H100, by arithmetic until they are measured. The process and the
# compiler take 45, ten steps of 16,384 tokens the rest.
ABOUT_S = {"8b": 90, "3b": 60, "1b": 50, "tiny": 5}
ROWS = "8b@8192,1b@4096,3b@4096,8b@4096,1b@2048,3b@2048,1b@8192,3b@8192,8b@2048"
SAMPLES_PER_STEP = {2048: 8, 4096: 4, 8192: 2}
WARM_UP = 3
_TO_END_S = 5.0  # to kill a row that is cut off, and to read its files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit-s", type=float, default=420.0)
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    ends_s = time.monotonic() + options.limit_s
    # 8 B leaves few GB free, which fixed segments would break up. Set before the first process starts, which reads it.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    names = [(shape, int(length)) for shape, _, length in (name.partition("@") for name in options.rows.split(","))]
    (device,) = run_ranks(1, about)  # in a process of its own: this one would keep GPU memory from then on
    if device.startswith("CPU") and any(shape != "tiny" for shape, _ in names):
        sys.exit("these shapes need an NVIDIA GPU, and torch sees none; without one: --rows tiny@64")
    rows: list[dict[str, Any]] = []
    for number, (shape, length) in enumerate(names, 1):
        left_s = ends_s - time.monotonic()
        enough = left_s > ABOUT_S[shape] + _TO_END_S
        told = f"about {ABOUT_S[shape]} s" if enough else "left out"
        print(f"[{number}/{len(names)}] {shape}@{length}: {told}; {left_s:.0f} s left", flush=True)
        if enough:
            with tempfile.TemporaryDirectory(prefix="muster-gpu-") as folder:
                config = make_config(shape, length, options.steps, Path(folder), options.overrides)
                rows.append(measure(shape, config, left_s - _TO_END_S))
            print(line(rows[-1]), flush=True)
            write_rows(options.json, TITLE, device, rows)
    if not rows:
        sys.exit(f"--limit-s {options.limit_s:g} is too short for any of these rows")
    show(TITLE, rows, options.json, device)
    return 1 if any(row["note"] for row in rows) else 0


def make_config(shape: str, length: int, steps: int, folder: Path, overrides: list[str]) -> Config:
    """The preset of a shape over random tokens at one length."""
    preset, changes = SHAPES[shape]
    vocab_size = load(preset, []).most_words
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
        "task.sample_tokens=0",
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


def train_unsaved(config: Config) -> int:
    """Start as the trainer does, with a run that writes no checkpoint and needs no disk. Returns the exit code."""
    from trainer.life.stop import StopWish
    from trainer.run import Run
    from trainer.start import start

    class Unsaved(Run):
        def save(self) -> None:
            self.saved_step = self.progress.step

        def check_space(self) -> None:
            pass

        def reserve_memory(self) -> None:
            pass

    return start(config, StopWish(), Unsaved)


def measure(shape: str, config: Config, limit_s: float) -> dict[str, Any]:
    """Train for at most `limit_s` seconds; take the medians from metrics.jsonl, over the steps after the warm-up."""
    from models import Decoder, build_model
    from models.flops import causal_flops_per_token, flops_per_token, parameter_count

    folder = RunFolder(Path(config.run_dir))
    note = ""
    try:
        (code,) = run_ranks(1, train_unsaved, config, timeout_s=limit_s)
        if code != 0:
            errors = [event["error"] for event in read_events(folder) if event["event"] == "rank_failed"]
            note = f"failed: {(errors or [f'exit code {code}'])[-1]:.120}"
    except RanksFailed as failure:
        note = f"failed: {' '.join(str(failure).split()[-20:])}"
    found = read_rows(folder.metrics)[WARM_UP:]
    middle = lambda key: statistics.median(row[key] for row in found) if found and found[-1][key] else None  # noqa: E731
    with torch.device("meta"):
        model = build_model(config.model).module
    assert isinstance(model, Decoder)
    mfu = middle("mfu")
    ratio = causal_flops_per_token(model, config.seq_len) / flops_per_token(model, config.seq_len)
    return {
        "shape": shape,
        "parameters (B)": parameter_count(model) / 1e9,
        "sequence": config.seq_len,
        "tokens/step": config.train.global_batch * config.seq_len,
        "steps": len(found),
        "tokens/s": middle("tokens_per_s") or "not measured",
        "MFU": mfu or "n/a",
        "MFU, causal count": mfu * ratio if mfu else "n/a",
        "memory (GiB)": max((row["memory_gib"] for row in found), default="n/a"),
        "note": note or ("" if found else f"no step after {WARM_UP} of warm-up"),
    }


if __name__ == "__main__":
    sys.exit(main())
