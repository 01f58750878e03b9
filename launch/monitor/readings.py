"""What is read from one GPU. A reading that a GPU or driver does not have is left out from then on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pynvml

from launch.monitor.devices import DRIVER_GONE, Device
from launch.monitor.gpm import Gpm

Values = dict[str, Any]

_GPU_GONE = {
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
    pynvml.NVML_ERROR_INSUFFICIENT_POWER,
    pynvml.NVML_ERROR_IRQ_ISSUE,
    pynvml.NVML_ERROR_RESET_REQUIRED,
}
_PASSING = {  # errors after which asking again is worthwhile
    pynvml.NVML_ERROR_TIMEOUT,
    pynvml.NVML_ERROR_IN_USE,
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_NOT_READY,
    pynvml.NVML_ERROR_MEMORY,
    pynvml.NVML_ERROR_UNKNOWN,
}
THROTTLES = {
    pynvml.nvmlClocksThrottleReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "sw_thermal",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hw_thermal",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "hw_power_brake",
    pynvml.nvmlClocksThrottleReasonSyncBoost: "sync_boost",
}
_COUNTERS = {  # field -> (name of the rate, MiB per count)
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: ("nvlink_tx_mib_s", 2**-10),
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: ("nvlink_rx_mib_s", 2**-10),
    pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES: ("pcie_tx_mib_s", 2**-20),
    pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES: ("pcie_rx_mib_s", 2**-20),
}
_ALL_LINKS = 0xFFFFFFFF
_FIELDS = [(field, _ALL_LINKS if "nvlink" in name else 0) for field, (name, _) in _COUNTERS.items()]


class DriverGone(Exception):
    """NVML answers nothing any more."""


class GpuLost(Exception):
    """This GPU answers nothing any more. Others may still answer."""


def _utilization(d: Device) -> Values:
    rates = pynvml.nvmlDeviceGetUtilizationRates(d.gpu)
    return {"gpu_pct": rates.gpu, "memory_bus_pct": rates.memory}


def _memory(d: Device) -> Values:
    # Version 2 does not count the driver's own memory as used. nvidia-smi shows the same.
    memory = pynvml.nvmlDeviceGetMemoryInfo(d.handle, version=pynvml.nvmlMemory_v2)
    return {"memory_gib": round(memory.used / 2**30, 3), "memory_total_gib": round(memory.total / 2**30, 3)}


def _power(d: Device) -> Values:
    return {"power_w": pynvml.nvmlDeviceGetPowerUsage(d.gpu) / 1000}


def _power_limit(d: Device) -> Values:
    return {"power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(d.gpu) / 1000}


def _temperature(d: Device) -> Values:
    return {"temperature_c": pynvml.nvmlDeviceGetTemperature(d.gpu, pynvml.NVML_TEMPERATURE_GPU)}


def _sm_clock(d: Device) -> Values:
    return {"sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(d.gpu, pynvml.NVML_CLOCK_SM)}


def _memory_clock(d: Device) -> Values:
    return {"memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(d.gpu, pynvml.NVML_CLOCK_MEM)}


def _most_sm_clock(d: Device) -> Values:
    return {"most_sm_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(d.gpu, pynvml.NVML_CLOCK_SM)}


def _throttled(d: Device) -> Values:
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(d.gpu)
    return {"throttled": [word for bit, word in THROTTLES.items() if reasons & bit]}


def _ecc_corrected(d: Device) -> Values:
    kind = pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
    return {"ecc_corrected": pynvml.nvmlDeviceGetTotalEccErrors(d.gpu, kind, pynvml.NVML_VOLATILE_ECC)}


def _ecc_uncorrected(d: Device) -> Values:
    kind = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    return {"ecc_uncorrected": pynvml.nvmlDeviceGetTotalEccErrors(d.gpu, kind, pynvml.NVML_VOLATILE_ECC)}


def _retired_pages(d: Device) -> Values:
    causes = range(pynvml.NVML_PAGE_RETIREMENT_CAUSE_COUNT)
    return {"retired_pages": sum(len(pynvml.nvmlDeviceGetRetiredPages(d.gpu, cause)) for cause in causes)}


def _remapped_rows(d: Device) -> Values:
    corrected, uncorrected, pending, failed = pynvml.nvmlDeviceGetRemappedRows(d.gpu)
    return {"remapped_rows": corrected + uncorrected, "remap_pending": bool(pending), "remap_failed": bool(failed)}


def _pcie_link(d: Device) -> Values:
    return {
        "pcie_generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration(d.gpu),
        "pcie_width": pynvml.nvmlDeviceGetCurrPcieLinkWidth(d.gpu),
    }


def _most_pcie_width(d: Device) -> Values:
    return {"most_pcie_width": pynvml.nvmlDeviceGetMaxPcieLinkWidth(d.gpu)}


def _processes(d: Device) -> Values:
    running = pynvml.nvmlDeviceGetComputeRunningProcesses(d.handle)
    told = [{"pid": p.pid, "memory_gib": round((p.usedGpuMemory or 0) / 2**30, 3)} for p in running]
    return {"processes": told}


Reading = Callable[[Device], Values]
EACH_TIME: tuple[Reading, ...] = (_utilization, _memory, _power, _temperature, _sm_clock, _memory_clock, _throttled)
NOW_AND_THEN: tuple[Reading, ...] = (  # these change slowly
    _power_limit,
    _most_sm_clock,
    _ecc_corrected,
    _ecc_uncorrected,
    _retired_pages,
    _remapped_rows,
    _pcie_link,
    _most_pcie_width,
    _processes,
)
NOW_AND_THEN_S = 10.0


class Gpu:
    """One GPU or MIG instance of the job. `read` gives a row. `left_out` holds missing readings with their reasons."""

    def __init__(self, device: Device, gpm: Gpm | None) -> None:
        self.device, self.gpm = device, gpm
        self.left_out: dict[str, str] = {}
        self._error: str | None = None  # the last error during this read
        self._slow: Values = {}
        self._slow_time_s = float("-inf")
        self._counts: dict[int, tuple[float, int]] = {}

    def read(self) -> Values:
        """A row of readings. Raises GpuLost or DriverGone when nothing can be read any more."""
        if self.device.refusal is not None:
            raise GpuLost(self.device.refusal)
        values: Values = {"uuid": self.device.uuid, "index": self.device.index}
        known, self._error = dict(self.left_out), None
        for reading in EACH_TIME:
            values |= self._try(reading.__name__[1:], partial(reading, self.device))
        if self._error is not None and values.keys() == {"uuid", "index"}:
            self.left_out = known  # not single readings are missing: the whole GPU is lost
            raise GpuLost(self._error)
        if self.gpm is not None:
            values |= self._try("gpm", self.gpm.read)
        if "pcie_tx_mib_s" not in values:
            values |= self._try("counters", self._rates)
        now = time.monotonic()
        if now - self._slow_time_s >= NOW_AND_THEN_S:
            self._slow_time_s, self._slow = now, {}
            for reading in NOW_AND_THEN:
                self._slow |= self._try(reading.__name__[1:], partial(reading, self.device))
        return values | self._slow

    def _try(self, name: str, read: Callable[[], Values]) -> Values:
        if name in self.left_out:
            return {}
        try:
            return read()
        except pynvml.NVMLError as error:
            if error.value in DRIVER_GONE:
                raise DriverGone(str(error)) from error
            if error.value in _GPU_GONE:
                raise GpuLost(str(error)) from error
            self._error = str(error)
            if error.value not in _PASSING:
                self.left_out[name] = str(error)
            return {}

    def _rates(self) -> Values:
        """NVLink and PCIe traffic since the last call. A counter that went backwards was reset or overflowed."""
        values: Values = {}
        now = time.monotonic()
        for field in pynvml.nvmlDeviceGetFieldValues(self.device.gpu, _FIELDS):
            if field.nvmlReturn != pynvml.NVML_SUCCESS:
                continue
            name, mib = _COUNTERS[field.fieldId]
            count = field.value.ullVal if field.valueType != pynvml.NVML_VALUE_TYPE_UNSIGNED_INT else field.value.uiVal
            before = self._counts.get(field.fieldId)
            self._counts[field.fieldId] = (now, count)
            if before is not None and count >= before[1] and now > before[0]:
                values[name] = round((count - before[1]) * mib / (now - before[0]), 1)
        return values
