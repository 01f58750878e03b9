"""The monitor on a real GPU: its readings equal those of nvidia-smi, to 5 %, while the GPU works."""

from __future__ import annotations

import statistics
import subprocess
import threading
from typing import Any

import pytest
import torch

from launch.monitor.gpus import Gpus

pytestmark = pytest.mark.gpu

SAME = {
    "memory_gib": ("memory.used", 1 / 1024),
    "power_w": ("power.draw", 1.0),
    "temperature_c": ("temperature.gpu", 1.0),
    "sm_clock_mhz": ("clocks.sm", 1.0),
    "gpu_pct": ("utilization.gpu", 1.0),
    "power_limit_w": ("enforced.power.limit", 1.0),
    "pcie_width": ("pcie.link.width.current", 1.0),
}
SAMPLES = 10


def nvidia_smi(uuid: str) -> list[float]:
    query = f"--query-gpu={','.join(name for name, _ in SAME.values())}"
    command = ["nvidia-smi", f"--id={uuid}", query, "--format=csv,noheader,nounits"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    return [float(cell) for cell in text.split(",")]


def test_readings_are_those_of_nvidia_smi() -> None:
    told: list[tuple[str, Any]] = []
    gpus = Gpus(lambda event, line, **facts: told.append((event, facts)), "on")
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            for _ in range(20):
                torch.matmul(matrix, matrix)
            torch.cuda.synchronize()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        pairs: list[tuple[dict[str, Any], list[float]]] = []
        for number in range(SAMPLES + 3):
            row = gpus.read()[0]
            pairs.append((row, nvidia_smi(row["uuid"])))
            done.wait(1.0)
            if number < 3:
                pairs.clear()  # the GPU is still warming up
    finally:
        done.set()
        worker.join()
    assert not [one for one in told if one[0] in ("no_gpus", "gpu_lost", "driver_gone")]
    for place, (name, (asked, unit)) in enumerate(SAME.items()):
        ours = statistics.median(row[name] for row, _ in pairs)
        theirs = statistics.median(cells[place] for _, cells in pairs) * unit
        assert ours == pytest.approx(theirs, rel=0.05), f"{name} against {asked}"
    if torch.cuda.get_device_capability() >= (9, 0):
        newest = pairs[-1][0]
        assert newest["sm_pct"] > 80
        assert newest["tensor_pct"] > 20
