"""Copies between host and device, such that the host waits once in a step: after it has queued the next one."""

from __future__ import annotations

from functools import cache

import torch
from torch.distributed import Work


def from_host(numbers: list[float], device: torch.device) -> torch.Tensor:
    """fp64 [n] on `device`. On a GPU it is an asynchronous copy from pinned memory: the host does not wait."""
    host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Reading:
    """An asynchronous copy of a tensor [n] to the host. It begins when the device has computed the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> list[float]:
        """The numbers. Waits until the device has finished this copy."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.tolist()
        return values


@cache
def _beside() -> torch.cuda.Stream:
    """One for all steps: torch hands out few, and a step must not wait for what another one's owner queued there."""
    return torch.cuda.Stream()


class DeviceTime:
    """Seconds of a GPU between two points of its queue. The host only queues work, so it cannot measure them.

    On the CPU it is 0: there the phases of the heartbeat already contain the time.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()

    def end(self, work: Work | None) -> None:
        """The second point: where `work`, a collective that has begun, ends. The GPU's queue goes on meanwhile."""
        if self._events is not None:
            beside = _beside()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                if work is not None:
                    work.wait()  # makes this stream wait, not the host
                self._events[1].record()

    def seconds(self) -> float:
        """Call it only after a later result was read: before that, the GPU may not have reached the second point."""
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events is not None else 0.0
