"""How busy the parts of a GPU really were: NVML's GPM, on Hopper and newer.

"Utilization" tells that some kernel ran. GPM tells how much of the chip worked. A reading compares two samples of the
GPU's own counters, so it is the mean over the time between the samples.
"""

from __future__ import annotations

from typing import Any

import psutil
import pynvml

from launch.monitor.devices import Device

METRICS = {
    pynvml.NVML_GPM_METRIC_SM_UTIL: "sm_pct",
    pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: "occupancy_pct",
    pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: "tensor_pct",
    pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: "dram_pct",
    pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: "pcie_tx_mib_s",
    pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: "pcie_rx_mib_s",
    pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC: "nvlink_tx_mib_s",
    pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC: "nvlink_rx_mib_s",
}
_DCGM = {"nv-hostengine", "dcgm-exporter"}


class Gpm:
    """The two samples of one GPU. They take turns as the newer one."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._samples = [pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()]
        self._taken = 0
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(METRICS)
        for number, metric in enumerate(METRICS):
            self._request.metrics[number].metricId = metric

    @staticmethod
    def is_supported(device: Device) -> bool:
        """Whether the device has GPM. Raises NVMLError when the driver cannot answer."""
        return bool(pynvml.nvmlGpmQueryDeviceSupport(device.gpu).isSupportedDevice)

    def read(self) -> dict[str, Any]:
        """Means since the last call; empty at the first call. Raises NVMLError."""
        newest = self._samples[self._taken % 2]
        if self._device.instance is None:
            pynvml.nvmlGpmSampleGet(self._device.gpu, newest)
        else:
            pynvml.nvmlGpmMigSampleGet(self._device.gpu, self._device.instance, newest)
        self._taken += 1
        if self._taken < 2:
            return {}
        self._request.sample1, self._request.sample2 = self._samples[self._taken % 2], newest
        pynvml.nvmlGpmMetricsGet(self._request)
        values = {}
        for number, name in enumerate(METRICS.values()):
            metric = self._request.metrics[number]
            if metric.nvmlReturn == pynvml.NVML_SUCCESS and metric.value == metric.value:
                values[name] = round(metric.value, 2)
        return values


def dcgm_process() -> str | None:
    """The name of DCGM's process on this node; None without one. DCGM's profiling and ours would disturb each other."""
    for process in psutil.process_iter(["name"]):
        if process.info["name"] in _DCGM:
            return f"{process.info['name']} (pid {process.pid})"
    return None
