"""What the monitor costs: its CPU time at several rates, with eight stand-in GPUs, as a Markdown table.

    python benchmarks/monitor.py [--seconds 20] [--hz 0.1 1 ...] [--json FILE]
    python benchmarks/monitor.py --pairs 3 [--steps 70]    the speed of a run with the monitor and without, in turns

The stand-in is the tests': the real nvidia-ml-py through a library that answers at once, so the time that a real driver
takes is not in it. CPU seconds are the kernel's count of the monitor's process, start-up left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.load import load
from launch.monitor.keeper import Keeper
from tests.launch.monitor.standin import build
from trainer.console import Console
from trainer.events import Events, read_rows
from trainer.folder import RunFolder
from trainer.heartbeat import Heartbeat, Heartbeats

GPUS = 8


def measure(folder: Path, hz: float, seconds: float) -> dict[str, Any]:
    """CPU seconds of one monitor over `seconds`, after its first rows."""
    run = RunFolder(folder / f"run-{hz:g}")
    run.root.mkdir()
    run.config.write_text("run: {}\n")
    heartbeats = Heartbeats.make(GPUS)
    console, events = Console(rank=1), Events(run, "bench", "launcher")
    keeper = Keeper(load("demo", [f"monitor.interval_s={1 / hz:g}"]), run, heartbeats, run.root, console, events)
    keeper.start()
    for place in range(GPUS):
        Heartbeat.at(heartbeats.path, place, rank=place).attempt = 0
    assert keeper.process is not None
    process = psutil.Process(keeper.process.pid)
    (path,) = _wait(lambda: list(run.gpu.glob("*.jsonl")))
    time.sleep(2.0)
    before, rows, began = _cpu_s(process.pid), len(read_rows(path)), time.monotonic()
    time.sleep(seconds)
    cpu_s, passed = _cpu_s(process.pid) - before, time.monotonic() - began
    memory_mib = process.memory_info().rss / 2**20
    keeper.stop()
    made = len(read_rows(path)) - rows
    size = len(path.read_bytes().splitlines()[-2]) if made else 0
    return {
        "hz": hz,
        "rows": made,
        "cpu_s": round(cpu_s, 2),
        "share_pct": round(100 * cpu_s / passed, 3),
        "ms_per_row": round(1000 * cpu_s / max(made, 1), 2),
        "row_bytes": size,
        "memory_mib": round(memory_mib),
    }


def speed(folder: Path, number: int, enabled: bool, steps: int) -> float:
    """Median tokens/s of the demo on two ranks, its first rows left out."""
    run = folder / f"speed-{number}-{enabled}"
    settings = [f"run.dir={run}", f"data.cache={folder / 'cache'}", f"monitor.enabled={str(enabled).lower()}"]
    settings += [f"train.steps={steps}", "checkpoint.every_steps=0", "run.log_every_steps=5", "run.tensorboard=false"]
    command = [sys.executable, "-m", "launch", "run", "demo", "--nproc", "2", *settings]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, timeout=300)
    rows = [row for row in read_rows(run / "metrics.jsonl") if "tokens_per_s" in row]
    return statistics.median(row["tokens_per_s"] for row in rows[4:])


def compare(folder: Path, pairs: int, steps: int) -> list[dict[str, Any]]:
    """Pairs of runs, the one with the monitor first in every other pair."""
    ratios = []
    for number in range(pairs):
        found = {
            enabled: speed(folder, number, enabled, steps) for enabled in ((True, False), (False, True))[number % 2]
        }
        ratios.append(found[True] / found[False])
        print(f"pair {number}: {found[True]:,.0f} / {found[False]:,.0f} tokens/s = {ratios[-1]:.3f}", flush=True)
    print(f"with the monitor / without: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    return [{"ratio": ratio} for ratio in ratios]


def _cpu_s(pid: int) -> float:
    """In nanoseconds as the scheduler counts them: a row takes less than one tick of the clock."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in threads) / 1e9


def _wait(condition: Any) -> Any:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--hz", type=float, nargs="+", default=[0.1, 0.5, 1, 2, 5, 10, 20])
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--steps", type=int, default=70, help="of each run of a pair")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-bench-") as name:
        folder = Path(name)
        if options.pairs:
            rows = compare(folder, options.pairs, options.steps)
        else:
            rows = curve(folder, options.hz, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def curve(folder: Path, rates: list[float], seconds: float) -> list[dict[str, Any]]:
    """A row per rate."""
    rows = []
    os.environ["LD_LIBRARY_PATH"] = str(build(folder / "nvml"))
    os.environ["STANDIN_NVML"] = str(folder / "gpus.txt")
    (folder / "gpus.txt").write_text(f"gpus {GPUS}\n")
    print("| rows/s | rows | CPU s | of one core | ms per row | bytes per row | memory |")
    print("|---|---|---|---|---|---|---|")
    for hz in rates:
        row = measure(folder, hz, max(seconds, 3 / hz))
        rows.append(row)
        print(
            f"| {row['hz']:g} | {row['rows']} | {row['cpu_s']:.2f} | {row['share_pct']:.2f} % | "
            f"{row['ms_per_row']:.1f} | {row['row_bytes']:,} | {row['memory_mib']} MiB |",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
