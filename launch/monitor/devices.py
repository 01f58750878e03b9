"""Which GPUs of this node are the job's: what CUDA_VISIBLE_DEVICES says, read as CUDA reads it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import pynvml

from trainer.environment import CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class Device:
    """A GPU, or a MIG instance of one. `gpu` is the whole GPU's handle, `handle` the instance's."""

    uuid: str
    index: int  # of the whole GPU among those that this job may open, in the order of their PCI addresses
    name: str
    gpu: Any
    handle: Any
    instance: int | None = None  # MIG GPU instance
    other_names: tuple[str, ...] = ()

    def is_called(self, name: str) -> bool:
        """Whether an entry of CUDA_VISIBLE_DEVICES means this one: by its index, its UUID or the UUID's beginning."""
        if name.isdigit():
            return self.instance is None and int(name) == self.index
        return len(name) > 4 and any(full.startswith(name) for full in (self.uuid, *self.other_names))


def all_devices() -> list[Device]:
    """Every GPU that this process may open, each followed by its MIG instances."""
    found: list[Device] = []
    index = 0
    for number in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
        except pynvml.NVMLError as error:
            if error.value in (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_GPU_IS_LOST):
                continue  # another job's, which CUDA does not count either; or gone
            raise
        uuid, name = pynvml.nvmlDeviceGetUUID(gpu), pynvml.nvmlDeviceGetName(gpu)
        found.append(Device(uuid, index, name, gpu, gpu))
        found += _instances(uuid, index, gpu)
        index += 1
    return found


def _instances(uuid: str, index: int, gpu: Any) -> list[Device]:
    try:
        if pynvml.nvmlDeviceGetMigMode(gpu)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
        most = pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except pynvml.NVMLError:
        return []  # no MIG on this kind of GPU
    found = []
    for number in range(most):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)
            instance, compute = pynvml.nvmlDeviceGetGpuInstanceId(mig), pynvml.nvmlDeviceGetComputeInstanceId(mig)
            old_name = f"MIG-{uuid}/{instance}/{compute}"
            names = pynvml.nvmlDeviceGetUUID(mig), index, pynvml.nvmlDeviceGetName(mig)
            found.append(Device(*names, gpu, mig, instance, (old_name,)))
        except pynvml.NVMLError:
            continue  # this place holds no instance, or not one of ours
    return found


def named(visible: str) -> tuple[list[str], str | None]:
    """(Indices and UUIDs in CUDA_VISIBLE_DEVICES, the entry that ended the list before its end).

    As torch reads it, after CUDA: the first entry that cannot be a GPU hides itself and all after it, so `-1`, `none`
    and `NoDevFiles` hide all. An index is as many digits as there are. UUIDs stay among UUIDs. One that is named twice
    hides all, those before it too.
    """
    if not visible.strip():
        return [], None
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if visible.strip().startswith(prefix)), "")
    found: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        number = re.match(r"\+?([0-9]+)", entry)
        name = entry if prefix and entry.startswith(prefix) else str(int(number[1])) if number and not prefix else None
        if name is None or name in found:
            return [] if name else found, entry
        found.append(name)
    return found, None


def count_visible() -> int:
    """How many GPUs a process of this job can use, told without CUDA, which would take memory of each."""
    visible = CUDA_VISIBLE_DEVICES.read(os.environ)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: what the variable says is all that is known
        names = named(visible or "")[0]
        return min(len(names), 1) if "MIG-" in "".join(names) else len(names)
    try:
        chosen, _ = choose(all_devices(), visible)
    finally:
        pynvml.nvmlShutdown()
    instances = [device for device in chosen if device.instance is not None]
    return 1 if instances else len(chosen)  # a process sees one MIG instance, however many are named


def choose(devices: list[Device], visible: str | None) -> tuple[list[Device], str | None]:
    """(The job's devices in the order of its local ranks, the first entry that means none).

    As in CUDA: such an entry hides itself and all after it. Without the variable every GPU is the job's, and of one
    that is cut into MIG instances these.
    """
    if visible is None:
        cut = {d.index for d in devices if d.instance is not None}
        return [d for d in devices if d.instance is not None or d.index not in cut], None
    names, ended_by = named(visible)
    chosen: list[Device] = []
    for name in names:
        called = [d for d in devices if d.is_called(name)]
        if len(called) != 1:
            return chosen, name
        chosen += called
    return chosen, ended_by
