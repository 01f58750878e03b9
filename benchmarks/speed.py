"""Muster's loop against a bare PyTorch loop: the same model, the same batches, the same optimizer, interleaved.

    python benchmarks/speed.py --processes 2 [--pairs 9] [--preset demo] [--json FILE] [key=value ...]

Each pair runs a segment of steps of one loop, then of the other, in the same processes. "ours" is the real loop
(`trainer.loop`) with its loader, agreement and logging, without a save. `--saving` adds rows with a save every 50
steps. "bare" is what a person would write: forward, cross-entropy over all logits, backward, `clip_grad_norm_`, fused
AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from benchmarks.table import show
from configs.config import Config
from configs.load import load
from tests.distributed import run_ranks

SEGMENT_STEPS = 10
SAVING_STEPS = 50  # long enough for one save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--saving", action="store_true", help="also measure logging and a save every 50 steps")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="muster-speed-") as folder:
        fixed = [
            f"run.dir={folder}/run",
            "train.steps=1000000",
            "train.validate_every_steps=0",
            "run.tensorboard=false",
        ]
        config = load(options.preset, [*fixed, "checkpoint.every_steps=0", *options.overrides])
        rows = run_ranks(options.processes, measure, config, options.pairs, options.saving, timeout_s=3600)[0]
    show(f"tokens/s against a bare loop, {options.preset}, {options.processes} processes", rows, options.json)


def measure(config: Config, pairs: int, saving: bool) -> list[dict[str, Any]]:
    """One rank's part. Only rank 0's rows are used."""
    from trainer.ranks import world as worlds

    world = worlds.start(config)
    run = open_run(config, world)
    bare = BareLoop(run)
    ours = partial(train_on, run)
    tokens = config.train.global_batch * config.seq_len
    rows = [_row("ours / bare", ours, bare.run, SEGMENT_STEPS, pairs, tokens, world)]
    if saving:
        with_saves: Callable[[int], None] = lambda steps: ours(steps, SAVING_STEPS)  # noqa: E731
        rows.append(_row("ours with a save / without", with_saves, ours, SAVING_STEPS, pairs, tokens, world))
    run.close()
    worlds.leave()
    return rows


def open_run(config: Config, world: Any) -> Any:
    """A run that prints nothing, built and ready to train."""
    from trainer.life.attempts import Attempt
    from trainer.life.folder import RunFolder
    from trainer.life.stop import StopWish
    from trainer.run import Run

    folder = RunFolder(Path(config.run_dir))
    attempt = Attempt(folder, world.from_first(lambda: Attempt.open(folder).number))
    run = Run(config, world, folder, attempt, StopWish())
    run.console.rank = -1  # else its lines would stand between the figures
    run.build()
    return run


def train_on(run: Any, steps: int, save_every: int = 0) -> None:
    """Train `steps` more steps in the real loop."""
    from trainer.loop import train

    train_section = run.config.train.model_copy(update={"steps": run.progress.step + steps})
    checkpoint = run.config.checkpoint.model_copy(update={"every_steps": save_every})
    run.config = run.config.model_copy(update={"train": train_section, "checkpoint": checkpoint})
    train(run)
    run.poll_saves(wait=True)


def _row(
    name: str, a: Callable[[int], None], b: Callable[[int], None], steps: int, pairs: int, tokens: int, world: Any
) -> dict[str, Any]:
    for warm_up in (a, b):
        warm_up(steps)
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        first, second = (a, b) if pair % 2 == 0 else (b, a)
        measured = [seconds(first, steps, world), seconds(second, steps, world)]
        times.append((measured[0], measured[1]) if pair % 2 == 0 else (measured[1], measured[0]))
    ratios = sorted(y / x for x, y in times)
    return {
        "what": name,
        "pairs": pairs,
        "tokens/s (first)": steps * tokens / statistics.median(x for x, _ in times),
        "tokens/s (second)": steps * tokens / statistics.median(y for _, y in times),
        "ratio (median)": statistics.median(ratios),
        "ratio (min)": ratios[0],
        "ratio (max)": ratios[-1],
    }


def seconds(function: Callable[[int], None], steps: int, world: Any) -> float:
    world.barrier()
    began = time.perf_counter()
    function(steps)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class BareLoop:
    """A training loop without Muster, on the rebuilt model of a run and on batches taken from its loader beforehand."""

    def __init__(self, run: Any) -> None:
        from models import build_model
        from trainer.engines.fsdp import make_mesh
        from trainer.engines.named import DTYPES

        self.config, self.world = run.config, run.world
        compute = DTYPES[self.config.precision.compute]
        torch.manual_seed(0)
        built = build_model(self.config.model)
        self.model = built.module
        for name, parameter in self.model.named_parameters():
            built.initialise(name, parameter.data, torch.Generator().manual_seed(0))
        self.model.to(self.world.device)
        mesh = make_mesh(self.config.parallel, self.world)
        self.autocast = mesh is None and compute != torch.float32
        if mesh is not None:
            precision = MixedPrecisionPolicy(param_dtype=compute if compute != torch.float32 else None)
            for block in built.blocks:
                fully_shard(block, mesh=mesh, mp_policy=precision)
            fully_shard(self.model, mesh=mesh, mp_policy=precision)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.optim.lr, fused=True)
        batches = list(itertools.islice(run.loader, 4))
        run.progress.step, run.progress.consumed_samples = batches[-1].step, batches[-1].consumed_samples
        self.batches: Iterator[Any] = itertools.cycle(batches)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches)
            for micro in batch.batches:
                tensors = micro.to(self.world.device).tensors
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
                    logits = self.model(tensors["tokens"], documents=tensors.get("documents"))
                loss = F.cross_entropy(logits.float().flatten(0, 1), tensors["targets"].flatten())
                (loss / len(batch.batches)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


if __name__ == "__main__":
    main()
