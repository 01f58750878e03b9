"""Draw the README's picture from two real runs of the demo: one left alone, one stopped, killed and resized.

python benchmarks/picture.py [--steps 100] [--out docs/pictures/resume.svg]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from trainer.life.rows import read_rows

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 360, 56, 20, 52, 44
# What each attempt of the broken run was, and how it ended.
ATTEMPTS = [
    ("2 processes", "Ctrl-C"),
    ("3 processes", "kill -9 of a rank"),
    ("restarted in place", "STOP file"),
    ("1 process", ""),
]
COLOURS = ["#1f77b4", "#ff7f0e", "#d62728", "#2ca02c"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="docs/pictures/resume.svg")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-picture-") as folder:
        alone = finish(start(Path(folder) / "alone", options.steps, 2))
        broken = break_and_resume(Path(folder) / "broken", options.steps)
        Path(options.out).write_text(draw(alone, broken, options.steps))
    last = max(broken)
    print(f"last losses: left alone {alone[last]['loss']:.4f}, broken {broken[last]['loss']:.4f}; wrote {options.out}")


def start(folder: Path, steps: int, processes: int) -> tuple[subprocess.Popen[bytes], Path]:
    command = [sys.executable, "-m", "launch", "run", "demo", "--nproc", str(processes), f"run.dir={folder}"]
    command += [f"train.steps={steps}", "run.log_every_steps=1", "checkpoint.every_steps=10", "run.tensorboard=false"]
    command += ["train.validate_every_steps=0", "task.sample_tokens=0"]
    return subprocess.Popen(command), folder


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> its row. After a rollback the row of the later attempt wins."""
    return {row["step"]: row for row in read_rows(folder / "metrics.jsonl") if "loss" in row}


def wait_for(folder: Path, step: int) -> None:
    while max(rows(folder), default=0) < step:
        time.sleep(0.1)


def finish(running: tuple[subprocess.Popen[bytes], Path]) -> dict[int, dict[str, Any]]:
    running[0].wait()
    return rows(running[1])


def break_and_resume(folder: Path, steps: int) -> dict[int, dict[str, Any]]:
    """Ctrl-C on 2 processes; kill -9 of one of 3, which restart in place; a STOP file; the rest on one process."""
    process, _ = start(folder, steps, 2)
    wait_for(folder, steps // 4)
    process.send_signal(signal.SIGINT)
    process.wait()
    process, _ = start(folder, steps, 3)
    wait_for(folder, steps // 2 - 4)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "trainer" in p.cmdline()]
    os.kill(workers[-1].pid, signal.SIGKILL)
    wait_for(folder, steps * 3 // 4)
    (folder / "STOP").touch()
    process.wait()
    return finish(start(folder, steps, 1))


def draw(alone: dict[int, dict[str, Any]], broken: dict[int, dict[str, Any]], steps: int) -> str:
    """The two curves as SVG. Each attempt of the broken run has its own colour."""
    losses = [row["loss"] for row in [*alone.values(), *broken.values()]]
    low, high = min(losses) - 0.1, max(losses) + 0.1

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / steps, 1)

    def y(loss: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low), 1)

    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in range(int(low) + 1, int(high) + 1):
        parts.append(f'<path d="M{LEFT} {y(loss)}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y(loss) + 4, loss, "#555", "end"))
    parts += [text(x(step), HEIGHT - 22, step, "#555") for step in range(0, steps + 1, max(steps // 5, 1))]
    parts += [text(WIDTH / 2, HEIGHT - 4, "step", "#555"), text(LEFT - 8, TOP - 12, "loss", "#555", "end")]
    line = " ".join(f"{x(s)},{y(row['loss'])}" for s, row in sorted(alone.items()))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#999" stroke-width="5" stroke-opacity="0.5"/>')
    for attempt, (label, end) in enumerate(ATTEMPTS):
        colour = COLOURS[attempt]
        mine = sorted((s, row["loss"]) for s, row in broken.items() if row["attempt"] == attempt)
        parts += [f'<circle cx="{x(s)}" cy="{y(v)}" r="2.6" fill="{colour}"/>' for s, v in mine]
        parts.append(text(x((mine[0][0] + mine[-1][0]) / 2), 20, label, colour))
        if end:
            last = x(mine[-1][0] + 0.5)
            parts.append(f'<path d="M{last} {TOP - 8}V{HEIGHT - BOTTOM}" stroke="{colour}" stroke-dasharray="4 3"/>')
            parts.append(text(last - 4, TOP - 12, end, colour, "end"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: object, colour: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


if __name__ == "__main__":
    main()
