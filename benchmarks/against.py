"""This checkout against another one of Muster: whether both compute the same bits, and whether this one is as fast.

    python benchmarks/against.py bits OTHER [--processes 1 2 3] [key=value ...]
    python benchmarks/against.py speed OTHER [--processes 2] [--rounds 14] [key=value ...]

OTHER is a checkout in which `make .venv/.test` was run. `bits` trains the demo in both checkouts. It compares the
losses of each row and each tensor of the last checkpoint. `speed` keeps one run of each checkout alive, and lets them
take turns of some steps. Each round draws a new order, so a slow minute of the machine is slow for both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("against_worker.py")
SEGMENT_STEPS = 10
SHORT = ("train.steps=12", "train.validate_every_steps=6", "run.log_every_steps=1", "run.tensorboard=false")
Times = dict[tuple[str, str], list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bits", "speed"))
    parser.add_argument("other", type=Path)
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    sides = {"then": options.other.resolve(), "now": ROOT}
    for side in sides.values():
        if not python(side).exists():
            parser.error(f"{python(side)} is missing: run `make .venv/.test` in {side}")
    good = True
    for processes in options.processes or (1, 2, 3):
        with tempfile.TemporaryDirectory(prefix="muster-against-") as folder:
            if options.what == "bits":
                good &= same_bits(sides, processes, Path(folder), [options.preset, *SHORT, *options.overrides])
            else:
                speed(sides, processes, options.rounds, Path(folder), [options.preset, *options.overrides])
    return 0 if good else 1


def python(checkout: Path) -> Path:
    return checkout / ".venv/bin/python"


def same_bits(sides: dict[str, Path], processes: int, folder: Path, words: list[str]) -> bool:
    """Whether both runs wrote the same losses and the same last checkpoint."""
    found = {}
    for name, checkout in sides.items():
        run = folder / name
        command = [str(python(checkout)), "-m", "launch", "run", *words, f"run.dir={run}", f"data.cache={run}-cache"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--nproc", str(processes)], cwd=checkout, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found[name] = (losses(run), tensors(run))
    then, now = found["then"], found["now"]
    same = [loss for loss in then[0] if loss in now[0]]
    print(
        f"{processes} processes: {len(same)} of {len(then[0])} losses the same, last {now[0][-1]}; "
        f"{sum(now[1].get(name) == data for name, data in then[1].items())} of {len(then[1])} tensors the same",
        flush=True,
    )
    return then == now and bool(then[0]) and bool(then[1])


def losses(run: Path) -> list[tuple[int, str, float]]:
    """(step, which, value) of every loss that was written."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(row["step"], key, row[key]) for row in rows for key in ("loss", "validation_loss") if key in row]


def tensors(run: Path) -> dict[str, bytes]:
    """Label -> bytes of every whole tensor of the newest checkpoint, read by this checkout's reader."""
    sys.path.insert(0, str(ROOT))
    import torch

    from trainer.checkpoint.load.checkpoint import Checkpoint

    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.startswith("step-"))
    checkpoint = Checkpoint(newest)
    found = {
        key: bytes(checkpoint.read(key).flatten().view(torch.uint8).numpy()) for key in checkpoint.manifest.tensors
    }
    checkpoint.close()
    return found


def speed(sides: dict[str, Path], processes: int, rounds: int, folder: Path, words: list[str]) -> None:
    """Print the ratios of steps per second: the median, and the middle 95 % of its bootstrap over the rounds."""
    files = contextlib.ExitStack()
    workers, asked, told = {}, {}, {}
    for name, checkout in sides.items():
        pipes = [folder / f"{name}-asked", folder / f"{name}-told"]
        for pipe in pipes:
            os.mkfifo(pipe)
        command = [str(python(checkout)), str(WORKER), str(processes), str(SEGMENT_STEPS), *map(str, pipes), *words]
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        workers[name] = subprocess.Popen([*command, f"data.cache={folder / name}-cache"], cwd=checkout, env=env)
        asked[name] = files.enter_context(open(pipes[0], "w", buffering=1))  # noqa: SIM115
        told[name] = files.enter_context(open(pipes[1]))  # noqa: SIM115
    turns = [(name, loop) for name in sides for loop in ("ours", "bare")]

    def take(turn: tuple[str, str]) -> float:
        asked[turn[0]].write(turn[1] + "\n")
        return float(told[turn[0]].readline())

    for turn in turns:
        take(turn)  # warms up
    times: Times = {turn: [] for turn in turns}
    draw = random.Random(0)
    for _ in range(rounds):
        draw.shuffle(turns)
        for turn in turns:
            times[turn].append(take(turn))
    files.close()
    for worker in workers.values():
        worker.wait()
    print(f"{processes} processes, {rounds} rounds of {SEGMENT_STEPS} steps")
    for what, a, b in (
        ("ours now / ours then", ("now", "ours"), ("then", "ours")),
        ("ours now / bare", ("now", "ours"), ("now", "bare")),
        ("ours then / bare", ("then", "ours"), ("then", "bare")),
    ):
        print(f"  {what:<22}{_ratio(times, a, b, draw)}")
    for turn in sorted(turns):
        each_ms = [seconds / SEGMENT_STEPS * 1000 for seconds in times[turn]]
        print(f"  {turn[1]} {turn[0]}: {statistics.median(each_ms):.1f} ms a step, at best {min(each_ms):.1f}")


def _ratio(times: Times, a: Any, b: Any, draw: random.Random) -> str:
    ratios = [slow / fast for fast, slow in zip(times[a], times[b], strict=True)]
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return f"{statistics.median(ratios):.3f} [{medians[25]:.3f}, {medians[975]:.3f}]"


if __name__ == "__main__":
    raise SystemExit(main())
