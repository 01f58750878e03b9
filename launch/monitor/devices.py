"""Which GPUs of this node belong to the job, by CUDA_VISIBLE_DEVICES, read as CUDA reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pynvml

from trainer.host.environment import CUDA_VISIBLE_DEVICES

DRIVER_GONE = {
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
}
_NO_INSTANCE = {pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_NO_PERMISSION}
_UNKNOWN_UUID = "unknown-"


@dataclass(frozen=True)
class Device:
    """A GPU, or a MIG instance of one. `gpu` is the whole GPU's handle, `handle` the instance's. A GPU that answered
    with an error when asked for its UUID has neither, and `refusal` holds the reason."""

    uuid: str
    index: int  # of the whole GPU among those that this job may open, by PCI address
    name: str
    gpu: Any
    handle: Any
    instance: int | None = None  # MIG GPU instance
    other_names: tuple[str, ...] = ()
    refusal: str | None = None

    @classmethod
    def refused(cls, index: int, error: pynvml.NVMLError, instance: int | None = None) -> Device:
        place = f"{index}" if instance is None else f"{index}-{instance}"
        return cls(f"{_UNKNOWN_UUID}{place}", index, "", None, None, instance, refusal=str(error))

    def is_called(self, name: str) -> bool:
        """Whether an entry of CUDA_VISIBLE_DEVICES means this device: by index, UUID, or start of the UUID."""
        if name.isdigit():
            return self.instance is None and int(name) == self.index
        return len(name) > 4 and any(full.startswith(name) for full in (self.uuid, *self.other_names))


def all_devices() -> list[Device]:
    """Every GPU that this process may open, each followed by its MIG instances. A GPU that answers with an error keeps
    its index, so that the others keep theirs. Raises NVMLError when the driver itself answers so."""
    found: list[Device] = []
    index = 0
    for number in range(pynvml.nvmlDeviceGetCount()):
        try:
            found += _devices(number, index)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                continue  # another job's GPU; CUDA does not count it either
            if error.value in DRIVER_GONE:
                raise
            found.append(Device.refused(index, error))
        index += 1
    return found


def _devices(number: int, index: int) -> list[Device]:
    gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
    uuid, name = pynvml.nvmlDeviceGetUUID(gpu), pynvml.nvmlDeviceGetName(gpu)
    return [Device(uuid, index, name, gpu, gpu), *_instances(uuid, index, gpu)]


def _instances(uuid: str, index: int, gpu: Any) -> Iterator[Device]:
    try:
        if pynvml.nvmlDeviceGetMigMode(gpu)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return
        most = pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except pynvml.NVMLError:
        return  # this kind of GPU has no MIG
    for number in range(most):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)
            instance, compute = pynvml.nvmlDeviceGetGpuInstanceId(mig), pynvml.nvmlDeviceGetComputeInstanceId(mig)
            names = pynvml.nvmlDeviceGetUUID(mig), index, pynvml.nvmlDeviceGetName(mig)
            yield Device(*names, gpu, mig, instance, (f"MIG-{uuid}/{instance}/{compute}",))
        except pynvml.NVMLError as error:
            if error.value in DRIVER_GONE:
                raise
            if error.value not in _NO_INSTANCE:  # else the place holds no instance, or another job's
                yield Device.refused(index, error, number)


def named(visible: str) -> tuple[list[str], str | None]:
    """(indices and UUIDs in CUDA_VISIBLE_DEVICES, the entry at which CUDA stops reading; None when it reads all).

    torch and CUDA agree: the first entry that cannot be a GPU hides itself and all entries after it. So `-1`, `none`
    and `NoDevFiles` hide all GPUs. Of an entry like `3x` the digits count. Indices and UUIDs cannot be mixed. A GPU
    that is named twice hides all GPUs, also those before it.
    """
    if not visible.strip():
        return [], None
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if visible.strip().startswith(prefix)), "")
    found: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        number = re.match(r"\+?([0-9]+)", entry)
        name = (
            entry
            if prefix and entry.startswith(prefix)
            else (number[1].lstrip("0") or "0")
            if number and not prefix
            else None
        )
        if name is None or name in found:
            return [] if name else found, entry
        found.append(name)
    return found, None


def count_visible() -> int:
    """How many GPUs a process of this job can use. Found without CUDA, which would take memory of each GPU."""
    visible = CUDA_VISIBLE_DEVICES.read(os.environ)
    try:
        pynvml.nvmlInit()
        try:
            chosen = [device for device in choose(all_devices(), visible)[0] if device.refusal is None]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no driver: only the variable is known
        names = named(visible or "")[0]
        instances, count = any(name.startswith("MIG-") for name in names), len(names)
    else:
        instances, count = any(device.instance is not None for device in chosen), len(chosen)
    return min(count, 1) if instances else count  # a process sees only one MIG instance, however many are named


def choose(devices: list[Device], visible: str | None) -> tuple[list[Device], str | None]:
    """(the job's devices in the order of its local ranks, the first entry that means no device).

    As in CUDA, such an entry hides itself and all entries after it. Without the variable the job has every GPU. Of a
    GPU that is cut into MIG instances, it has the instances. A GPU may not tell its UUID. The first such GPU then
    stands for a UUID that no other GPU has.
    """
    if visible is None:
        cut = {d.index for d in devices if d.instance is not None}
        return [d for d in devices if d.instance is not None or d.index not in cut], None
    names, ended_by = named(visible)
    chosen: list[Device] = []
    silent = [d for d in devices if d.refusal is not None]
    for name in names:
        called = [d for d in devices if d.is_called(name)]
        if len(called) == 1:
            chosen += called
            silent = [d for d in silent if d not in called]
        elif not called and silent and not name.isdigit():
            chosen.append(replace(silent.pop(0), uuid=name))
        else:
            return chosen, name
    return chosen, ended_by
