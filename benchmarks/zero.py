"""FSDP2 against DeepSpeed ZeRO 1, 2 and 3, and our ZeRO against bare DeepSpeed: interleaved medians.

    python benchmarks/zero.py engines|memory|bare|saving [--processes 2] [--pairs 7] [--only ENGINE ...] [key=value ...]

engines  steps/s of the real loop, and seconds to save and to load, under each engine in turn, in the same processes
memory   the most that each engine adds to a rank's memory over three steps, each engine in its own processes bare
our loop against `deepspeed.initialize`, forward, backward, step: the same batches, formats, groups, bucket saving   the
same state into new files: ours until it is committed and durable, and until training goes on ("begun");
         `save_checkpoint`, which nothing makes durable ("bare"), and the same with its files fsynced ("durable")
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.nn import functional as F

from benchmarks.speed import open_run, seconds, train_on
from benchmarks.table import show
from configs.config import Config
from configs.load import load
from tests.distributed import run_ranks

SEGMENT_STEPS = 5
ENGINES = {
    "FSDP2": ["parallel.engine=fsdp"],
    **{f"ZeRO {stage}": ["parallel.engine=zero", f"parallel.zero_stage={stage}"] for stage in (1, 2, 3)},
}
LAYOUT = ["parallel.replicate=1", "parallel.shard=-1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engines", "memory", "bare", "saving"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="muster-zero-") as folder:
        configs = {name: config_of(folder, name, options.overrides) for name in options.only}
        if options.what == "memory":
            rows = [
                max(run_ranks(options.processes, memory, name, config, timeout_s=600), key=lambda row: row["GiB"])
                for name, config in configs.items()
            ]
        else:
            measure = {"engines": engines, "bare": bare, "saving": saving}[options.what]
            rows = run_ranks(options.processes, measure, configs, options.pairs, timeout_s=3600)[0]
    show(f"{options.what}, {options.processes} processes, {options.pairs} rounds", rows, options.json)


def config_of(folder: str, name: str, overrides: list[str]) -> Config:
    place = name.replace(" ", "-").lower()
    fixed = [
        *(f"run.dir={folder}/{place}", f"data.cache={folder}/cache", "run.tensorboard=false", "train.steps=1000000"),
        *("train.validate_every_steps=0", "checkpoint.every_steps=0", "checkpoint.keep.last=100"),
    ]
    return load("demo", [*fixed, *LAYOUT, *ENGINES[name], *overrides])


def start(configs: dict[str, Config]) -> tuple[Any, dict[str, Any]]:
    """The ranks' world, and a run of each engine in it, trained for one segment."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    from trainer.ranks import world as worlds

    world = worlds.start(next(iter(configs.values())))
    runs = {}
    for name, config in configs.items():
        own = replace(world, kv=None if world.kv is None else PrefixStore(name, world.kv))
        runs[name] = open_run(config, own)
        train_on(runs[name], SEGMENT_STEPS)
    return world, runs


def in_turn(
    functions: dict[str, Callable[[], None]], rounds: int, world: Any, tidy: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Name -> seconds of each round. Each round runs all functions, beginning with the next. `tidy` is not timed."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            times[name].append(seconds(lambda steps, name=name: functions[name](), 0, world))  # type: ignore[misc]
            world.barrier()
            tidy()
    return times


def engines(configs: dict[str, Config], rounds: int) -> list[dict[str, Any]]:
    world, runs = start(configs)

    def stepping(run: Any) -> Callable[[], None]:
        return lambda: train_on(run, SEGMENT_STEPS)

    times = in_turn({name: stepping(run) for name, run in runs.items()}, rounds, world)
    saves = in_turn({name: saver(run) for name, run in runs.items()}, rounds, world)
    loads = in_turn({name: loader(run) for name, run in runs.items()}, max(rounds // 2, 3), world)
    return [
        {
            "engine": name,
            "steps/s": SEGMENT_STEPS / statistics.median(times[name]),
            "of FSDP2 (median)": statistics.median(f / z for f, z in zip(times["FSDP2"], times[name], strict=True)),
            "save (s)": statistics.median(saves[name]),
            "load (s)": statistics.median(loads[name]),
        }
        for name in runs
    ]


def saver(run: Any) -> Callable[[], None]:
    def save() -> None:
        run.progress.step += 1  # so that the save writes another checkpoint
        run.save_now()

    return save


def loader(run: Any) -> Callable[[], None]:
    """Load as a start does: build the engine anew, then fill it."""
    from trainer.checkpoint.load.checkpoint import Checkpoint
    from trainer.life.entries import checkpoint_name

    def again() -> None:
        path = run.folder.checkpoints / checkpoint_name(run.progress.step)
        begin = run.beginning
        origin = run.world.from_first(lambda: begin.origin_at(Checkpoint(path), everything=True, continuing=True))
        assert not isinstance(begin.load(origin), list)

    return again


def memory(name: str, config: Config) -> dict[str, Any]:
    """Highest resident memory in GiB, less what the imports took."""
    import deepspeed  # noqa: F401 - engines without DeepSpeed must pay for the import, too

    from trainer.ranks import world as worlds

    world = worlds.start(config)
    before = status_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the highest memory from here on
    run = open_run(config, world)
    train_on(run, 3)
    return {"engine": name, "GiB": status_gib("VmHWM") - before}


def status_gib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / (1 << 20)


def bare(configs: dict[str, Config], rounds: int) -> list[dict[str, Any]]:
    world, runs = start({name: config for name, config in configs.items() if name != "FSDP2"})
    rows = []
    for name, run in runs.items():
        theirs = BareZero(run)
        theirs.train(SEGMENT_STEPS)

        def both(run: Any = run, theirs: BareZero = theirs) -> dict[str, Callable[[], None]]:
            return {"ours": lambda: train_on(run, SEGMENT_STEPS), "bare": lambda: theirs.train(SEGMENT_STEPS)}

        rows.append({"stage": name, **_ratios(in_turn(both(), rounds, world), "steps/s", SEGMENT_STEPS)})
    return rows


def saving(configs: dict[str, Config], rounds: int) -> list[dict[str, Any]]:
    world, runs = start({name: config for name, config in configs.items() if name != "FSDP2"})
    rows = []
    for name, run in runs.items():
        theirs = BareZero(run)
        theirs.train(1)
        folder = run.folder.root / "theirs"

        def save_theirs(theirs: BareZero = theirs, folder: Path = folder) -> None:
            theirs.engine.save_checkpoint(str(folder), tag="one")

        def begin_ours(run: Any = run) -> None:
            run.progress.step += 1
            run.save()

        def tidy(run: Any = run, folder: Path = folder) -> None:
            run.poll_saves(wait=True)
            if world.first and folder.exists():
                shutil.rmtree(folder)

        def save_theirs_durably(save: Callable[[], None] = save_theirs, folder: Path = folder) -> None:
            save()
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in files[world.rank :: world.size]:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            world.barrier()

        saves = {"ours": saver(run), "begun": begin_ours, "bare": save_theirs, "durable": save_theirs_durably}
        times = in_turn(saves, rounds, world, tidy)
        row = {"stage": name, **{f"{what} (s)": statistics.median(taken) for what, taken in times.items()}}
        for a, b in (("durable", "ours"), ("bare", "ours"), ("bare", "begun")):
            row[f"{a} / {b}"] = statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        rows.append(row)
    return rows


def _ratios(times: dict[str, list[float]], unit: str, count: int) -> dict[str, Any]:
    ratios = sorted(b / a for a, b in zip(times["ours"], times["bare"], strict=True))
    return {
        f"{unit} (ours)": count / statistics.median(times["ours"]),
        f"{unit} (bare)": count / statistics.median(times["bare"]),
        "ratio (median)": statistics.median(ratios),
        "ratio (min)": ratios[0],
        "ratio (max)": ratios[-1],
    }


class BareZero:
    """What a person would write with DeepSpeed, on a run's model and batches."""

    def __init__(self, run: Any) -> None:
        import deepspeed
        import torch

        from models import build_model
        from trainer.ranks.seeds import generator

        config = run.config
        built = build_model(config.model)
        model = built.module
        for name, parameter in model.named_parameters():
            built.initialise(name, parameter.data, generator(torch.device("cpu"), 0, name))
        self.batches = itertools.cycle(list(itertools.islice(run.loader, 4)))
        micro_batches = len(next(self.batches).batches)
        settings = {
            "train_micro_batch_size_per_gpu": config.train.micro_batch,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": config.train.clip_norm,
            "bf16": {"enabled": config.precision.compute == "bf16"},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": config.parallel.zero_stage,
                "reduce_bucket_size": sum(p.numel() for p in model.parameters()),
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 40,
        }
        matrices, others = ([p for p in model.parameters() if (p.ndim > 1) is whether] for whether in (True, False))
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]  # as ours
        optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, weight_decay=config.optim.weight_decay, fused=True)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for micro in next(self.batches).batches:
                logits = self.engine(micro.tensors["tokens"], documents=micro.tensors.get("documents"))
                self.engine.backward(F.cross_entropy(logits.float().flatten(0, 1), micro.tensors["targets"].flatten()))
                self.engine.step()


if __name__ == "__main__":
    main()
