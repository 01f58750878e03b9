"""Which GPUs of this node are the job's: what CUDA_VISIBLE_DEVICES says, read as CUDA reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynvml


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


def choose(devices: list[Device], visible: str | None) -> tuple[list[Device], str | None]:
    """(The job's devices in the order of its local ranks, the first entry that means none).

    As in CUDA: such an entry hides itself and all after it. Without the variable every GPU is the job's, and of one
    that is cut into MIG instances these.
    """
    if visible is None:
        cut = {d.index for d in devices if d.instance is not None}
        return [d for d in devices if d.instance is not None or d.index not in cut], None
    chosen: list[Device] = []
    for entry in (part.strip() for part in visible.split(",")) if visible.strip() else ():
        called = [d for d in devices if d.is_called(entry)]
        if len(called) != 1:
            return chosen, entry
        chosen += called
    return chosen, None
