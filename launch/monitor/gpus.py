"""All GPUs of the job on this node, read together. An error of one GPU does not affect the others."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import pynvml

from launch.monitor.devices import Device, all_devices, choose
from launch.monitor.gpm import Gpm, dcgm_process
from launch.monitor.readings import DriverGone, Gpu, GpuLost
from trainer.host.environment import CUDA_VISIBLE_DEVICES

Tell = Callable[..., None]  # (event, line for people, facts): reports an event
_AGAIN_S = 60.0  # until a driver or GPU that was lost is asked again


class Gpus:
    """`read` gives a row per GPU, whatever happens to the driver meanwhile."""

    def __init__(self, tell: Tell, gpm: Literal["auto", "on", "off"]) -> None:
        self._tell, self._gpm = tell, gpm
        self._gpus: list[Gpu] = []
        self._lost: dict[str, float] = {}
        self._open = False
        self._again_s = 0.0
        self._said_left_out: set[str] = set()
        self.driver: str | None = None
        self._start()

    def names(self) -> list[dict[str, Any]]:
        """Facts of each GPU that do not change."""
        return [{"uuid": g.device.uuid, "index": g.device.index, "name": g.device.name} for g in self._gpus]

    def read(self) -> list[dict[str, Any]]:
        """A row per GPU in the order of local ranks; the row of a lost GPU says so. Empty while there is no driver."""
        if not self._open:
            if time.monotonic() < self._again_s:
                return []
            self._start(again=True)
        if any(gpu.device.refusal is not None for gpu in self._gpus) and time.monotonic() >= self._again_s:
            self._ask_again()
        rows = []
        for gpu in self._gpus:
            try:
                rows.append(self._read(gpu))
            except DriverGone as gone:
                self._stop(str(gone))
                return []
        self._say_left_out()
        return rows

    def _read(self, gpu: Gpu) -> dict[str, Any]:
        device = gpu.device
        lost = {"uuid": device.uuid, "index": device.index, "lost": True}
        since = self._lost.get(device.uuid)
        if since is not None and time.monotonic() < since + _AGAIN_S:
            return lost
        try:
            row = gpu.read()
        except GpuLost as error:
            if since is None:
                self._tell("gpu_lost", f"GPU {device.index} ({device.uuid}) is lost: {error}", gpu=device.uuid)
            self._lost[device.uuid] = time.monotonic()
            return lost
        if since is not None:
            del self._lost[device.uuid]
            self._tell("gpu_back", f"GPU {device.index} ({device.uuid}) answers again", gpu=device.uuid)
        return row

    def _start(self, again: bool = False) -> None:
        self._again_s = time.monotonic() + _AGAIN_S
        try:
            pynvml.nvmlInit()
            self._open = True
            self.driver = pynvml.nvmlSystemGetDriverVersion()
            devices, unknown = _devices()
        except pynvml.NVMLError as error:
            self._close()
            if not again:
                self._tell("no_gpus", f"no GPU is watched, only the host: {error}", error=str(error))
            return
        if again:
            self._tell("driver_back", "the NVIDIA driver answers again")
        if unknown is not None:
            line = f"CUDA_VISIBLE_DEVICES: {unknown!r} is no GPU of this node; it and what follows is left out"
            self._tell("unknown_gpu", line, entry=unknown)
        self._gpus = [Gpu(device, None) for device in devices]
        self._lost = {}
        self._start_gpm(self._gpus)

    def _ask_again(self) -> None:
        """Whether GPUs that did not tell their UUID tell it now. The other GPUs stay as they are."""
        self._again_s = time.monotonic() + _AGAIN_S
        try:
            devices, _ = _devices()
        except pynvml.NVMLError:
            return  # the next reading meets and reports the same error
        known = {gpu.device.uuid: gpu for gpu in self._gpus if gpu.device.refusal is None}
        back = [device for device in devices if device.refusal is None and device.uuid not in known]
        for device in back:
            self._tell("gpu_back", f"GPU {device.index} ({device.uuid}) answers again", gpu=device.uuid)
        self._lost = {uuid: since for uuid, since in self._lost.items() if uuid not in {d.uuid for d in back}}
        self._gpus = [known.get(device.uuid) or Gpu(device, None) for device in devices]
        self._start_gpm([gpu for gpu in self._gpus if gpu.device in back])

    def _start_gpm(self, gpus: list[Gpu]) -> None:
        gpus = [gpu for gpu in gpus if gpu.device.refusal is None]
        dcgm = dcgm_process() if gpus and self._gpm == "auto" else None
        if dcgm is not None:
            line = (
                f"SM, tensor and DRAM activity are left out: {dcgm} may profile too; monitor.gpm=on reads all the same"
            )
            self._tell("gpm_left_out", line, cause=dcgm)
        if dcgm is not None or self._gpm == "off":
            return
        for gpu in gpus:
            try:
                gpu.gpm = Gpm(gpu.device) if Gpm.is_supported(gpu.device) else None
            except pynvml.NVMLError as error:
                gpu.left_out["gpm"] = str(error)

    def _say_left_out(self) -> None:
        """Report once per reading what no row will hold."""
        for gpu in self._gpus:
            for name, reason in gpu.left_out.items():
                if name not in self._said_left_out:
                    self._said_left_out.add(name)
                    self._tell("reading_left_out", None, reading=name, gpu=gpu.device.uuid, error=reason)

    def _stop(self, reason: str) -> None:
        self._close()
        self._again_s = time.monotonic() + _AGAIN_S
        self._tell("driver_gone", f"the NVIDIA driver went away ({reason}): only the host is watched", error=reason)

    def _close(self) -> None:
        self._gpus = []
        if self._open:
            self._open = False
            with contextlib.suppress(pynvml.NVMLError):  # the driver may fail here, too
                pynvml.nvmlShutdown()


def _devices() -> tuple[list[Device], str | None]:
    return choose(all_devices(), CUDA_VISIBLE_DEVICES.read(os.environ))
