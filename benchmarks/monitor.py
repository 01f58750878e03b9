"""What the monitor costs: its CPU time at several rates, with eight stand-in GPUs, as a Markdown table.

    python benchmarks/monitor.py [--seconds 20] [--hz 0.1 1 ...] [--json FILE]
    python benchmarks/monitor.py --pairs 10          the steps of a run with the monitor and without, in turns

The stand-in comes from the tests: the real nvidia-ml-py calls a library that answers at once. So the figures leave out
the time that a real driver takes. CPU seconds are the kernel's count for the monitor's process, without its start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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
from trainer.host.console import Console
from trainer.life.events import Events
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Heartbeat, Heartbeats
from trainer.life.rows import read_rows

GPUS = 8
TURN_S = 5.0  # shorter than the ten seconds after which the monitor reports that it stood still


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


def compare(folder: Path, pairs: int, seconds: float) -> list[dict[str, Any]]:
    """One run of the demo on two ranks, whose monitor is stopped and continued in turns. Other work of the machine
    comes and goes over minutes, so it slows both kinds of turns. `seconds` is the length of a turn."""
    run = RunFolder(folder / "demo")
    command = [sys.executable, "-m", "launch", "run", "demo", "--nproc", "2", f"run.dir={run.root}"]
    command += ["train.steps=100000", "checkpoint.every_steps=0", "train.validate_every_steps=0"]
    command += ["run.log_every_steps=1", "run.tensorboard=false", f"data.cache={folder / 'cache'}"]
    found: list[dict[str, Any]] = []
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as launcher:
        try:
            _wait(lambda: len(read_rows(run.metrics)) > 20, 120)
            processes = psutil.Process(launcher.pid).children(recursive=True)
            (monitor,) = [process for process in processes if "launch.monitor" in process.cmdline()]
            ranks = [process.pid for process in processes if "trainer" in process.cmdline()[:4]]
            for number in range(pairs):
                turns = ((True, False), (False, True))[number % 2]
                both = {watched: turn(run, monitor, ranks, watched, seconds) for watched in turns}
                found.append({name: both[True][name] / both[False][name] for name in both[True]})
                print(f"pair {number}: {both[True]} / {both[False]}", flush=True)
        finally:
            launcher.send_signal(signal.SIGINT)
    for name in found[0]:
        low, middle, high = statistics.quantiles([ratios[name] for ratios in found], n=4)
        print(f"{name} with the monitor / without: median {middle:.3f}, the middle half {low:.3f} to {high:.3f}")
    return found


def turn(run: RunFolder, monitor: psutil.Process, ranks: list[int], watched: bool, seconds: float) -> dict[str, float]:
    """The median time of the turn's steps, and the mean CPU time of a step, summed over all ranks."""
    if watched:
        monitor.resume()
    else:
        monitor.suspend()
    before, cpu_s = len(read_rows(run.metrics)), sum(map(_cpu_s, ranks))
    time.sleep(seconds)
    rows, cpu_s = read_rows(run.metrics)[before:], sum(map(_cpu_s, ranks)) - cpu_s
    monitor.resume()
    # The first step began before this turn.
    return {"step_s": statistics.median(row["step_s"] for row in rows[1:]), "step_cpu_s": round(cpu_s / len(rows), 4)}


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process's threads. The scheduler counts nanoseconds; a row takes less than one clock tick."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in threads) / 1e9


def _wait(condition: Any, timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--hz", type=float, nargs="+", default=[0.1, 0.5, 1, 2, 5, 10, 20])
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-bench-") as name:
        folder = Path(name)
        if options.pairs:
            rows = compare(folder, options.pairs, TURN_S)
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
