"""What is measured, and where it goes: metrics.jsonl, the series, the live line. Rank 0 only, but for the sums."""

from __future__ import annotations

import resource
from typing import Any

import torch

from configs.config import Config
from trainer.host.clock import now_s
from trainer.host.console import Console, duration, si
from trainer.life.events import append_row
from trainer.life.folder import RunFolder
from trainer.ranks.world import World
from trainer.shown.peaks import peak_flops_per_s
from trainer.shown.series import Readings, Series, open_series


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


_SHOWN = 5  # metrics of a validation on the terminal; the row has all


class Meter:
    """Adds up steps between two rows, and writes the row.

    Speeds are over the time between rows without validation and without waiting for a save, as steps take it.
    """

    def __init__(
        self, config: Config, world: World, folder: RunFolder, console: Console, attempt: int, unit: str
    ) -> None:
        self.config, self.world, self.folder, self.console, self.attempt = config, world, folder, console, attempt
        self.unit, self.flops_per_unit = unit, 0.0
        self._peak = peak_flops_per_s(world.device, config.precision.compute)
        self._series: list[Series] = []
        self._readings = Readings(folder.readings)
        self._steps, self._seconds, self._wait_s, self._cost = 0, 0.0, 0.0, 0

    def begin_series(self, first_step: int) -> None:
        """From here on rows also go where the config asks for. Raises UserError."""
        self._series = open_series(self.config, self.folder, first_step, self.console.say)

    def add(self, seconds: float, wait_s: float, cost: int) -> None:
        """One step: this rank's time, and the tokens (or samples) of all ranks."""
        self._steps += 1
        self._seconds += seconds
        self._wait_s += wait_s
        self._cost += cost

    def row(
        self, step: int, consumed_samples: int, values: dict[str, float], lr_factor: float, grad_norm: float | None
    ) -> dict[str, Any]:
        """Write the row of `step` and begin a new interval. `values`: the task's numbers over all ranks; `grad_norm`:
        None after a skipped update."""
        per_s = self._cost / self._seconds
        mfu = per_s * self.flops_per_unit / (self._peak * self.world.size) if self._peak else None
        row = {
            "step": step,
            **values,
            "consumed_samples": consumed_samples,
            "lr": self.config.optim.lr * lr_factor,
            "grad_norm": grad_norm,
            "step_s": round(self._seconds / self._steps, 6),
            "data_wait_s": round(self._wait_s / self._steps, 6),
            f"{self.unit}_per_s": round(per_s, 1),
            "mfu": round(mfu, 4) if mfu is not None else None,
            "memory_gib": round(memory_gib(self.world.device), 3),
        }
        self._steps, self._seconds, self._wait_s, self._cost = 0, 0.0, 0.0, 0
        self.write(row)
        self.console.live(self._line(row))
        return row

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Write a validation's row."""
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in list(values.items())[:_SHOWN])
        self.console.say(f"step {step}: {told}")
        self.write({"step": step, **values})

    def write(self, row: dict[str, Any]) -> None:
        """One row to metrics.jsonl and the series. NaN is no JSON: such a number is written as null.

        `phases_s` are rank 0's seconds in each phase since its process began, so that a lost row loses no time.
        """
        clean = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in row.items()}
        head = {"time_s": round(now_s(), 3), "attempt": self.attempt}
        append_row(self.folder.metrics, {**head, **clean, "phases_s": self.world.heartbeat.seconds()})
        scalars = {k: float(v) for k, v in clean.items() if k != "step" and isinstance(v, int | float)}
        readings = self._readings.new() if self._series else {}
        for series in self._series:
            series.write(row["step"], scalars | readings)

    def _line(self, row: dict[str, Any]) -> str:
        last = self.config.train.steps
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "n/a"
        wait = row["data_wait_s"] / row["step_s"] if row["step_s"] else 0.0
        per_s = f"{si(row[f'{self.unit}_per_s'])} {self.unit}/s"
        return (
            f"step {row['step']}/{last} | loss {row['loss']:.4f} | {per_s} | MFU {mfu} | "
            f"memory {row['memory_gib']:.2f} GiB | data wait {wait:.0%} | "
            f"left {duration((last - row['step']) * row['step_s'])}"
        )

    def close(self) -> None:
        for series in self._series:
            series.close()
