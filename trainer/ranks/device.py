"""How numbers go to the device and come back, so that the host waits for it once in a step, and late."""

from __future__ import annotations

import torch


def from_host(numbers: list[float], device: torch.device) -> torch.Tensor:
    """fp64 [n] on `device`. On a GPU the copy is queued, from page-locked memory: the host does not wait for it."""
    host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Reading:
    """A tensor [n] on its way to the host. The copy is queued behind what computes the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> list[float]:
        """The numbers. Waits until the device has come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.tolist()
        return values


class DeviceTime:
    """Seconds that the device's queue took between two points: what the host cannot see, as it only queues work.

    On the CPU the host itself does the work, and its own phases already say how long that took.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()

    def end(self) -> None:
        """Here is the second point."""
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """0 on the CPU. Call it only after a later result was read: before, the device may not have come so far."""
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events is not None else 0.0
