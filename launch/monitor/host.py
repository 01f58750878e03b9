"""What the host does: CPU, memory, swap, disks, network; and each rank's process, from /proc."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

from trainer.heartbeat import Beat

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Rates:
    """Counters that only grow, as rates since the last call. One that went backwards was reset: no rate this time."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, float]] = {}

    def of(self, name: str, count: float, now: float) -> float | None:
        before = self._before.get(name)
        self._before[name] = (now, count)
        if before is None or count < before[1] or now <= before[0]:
            return None
        return (count - before[1]) / (now - before[0])

    def forget(self, prefix: str) -> None:
        for name in [name for name in self._before if name.startswith(prefix)]:
            del self._before[name]


class Host:
    """The whole node, other people's processes included."""

    def __init__(self) -> None:
        self.cpus = psutil.cpu_count() or 1
        self._rates = Rates()

    def read(self) -> dict[str, Any]:
        now = time.monotonic()
        cpu = psutil.cpu_times()
        busy_s = sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0.0) - getattr(cpu, "guest", 0.0)
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
        values: dict[str, Any] = {
            "cpu_pct": self._rate("cpu", busy_s * 100 / self.cpus, now),
            "memory_gib": round((memory.total - memory.available) / 2**30, 3),
            "swap_gib": round(swap.used / 2**30, 3),
        }
        if disk is not None:
            values["disk_read_mib_s"] = self._rate("read", disk.read_bytes / 2**20, now)
            values["disk_write_mib_s"] = self._rate("write", disk.write_bytes / 2**20, now)
        if network is not None:
            values["network_in_mib_s"] = self._rate("in", network.bytes_recv / 2**20, now)
            values["network_out_mib_s"] = self._rate("out", network.bytes_sent / 2**20, now)
        return {name: value for name, value in values.items() if value is not None}

    def _rate(self, name: str, count: float, now: float) -> float | None:
        rate = self._rates.of(name, count, now)
        return None if rate is None else round(rate, 2)


class Processes:
    """The ranks' processes: what they use, and what they had to wait for."""

    def __init__(self) -> None:
        self._rates = Rates()

    def read(self, beat: Beat) -> dict[str, Any]:
        """`cpu_pct` of one core over all threads; `cpu_wait_pct`: how much of the time its main thread could have run
        and had no core. Nothing but `gone` for a process that is not there."""
        try:
            with open(f"/proc/{beat.pid}/stat", "rb") as file:
                stat = file.read()
            with open(f"/proc/{beat.pid}/task/{beat.pid}/schedstat", "rb") as file:
                schedule = file.read().split()
        except OSError:
            self._rates.forget(f"{beat.pid}.")
            return {"gone": True}
        fields = stat[stat.rindex(b")") + 2 :].split()  # from the third field on: the name may hold anything
        now = time.monotonic()
        busy_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        values: dict[str, Any] = {
            "state": fields[0].decode(),
            "memory_gib": round(int(fields[21]) * _PAGE_BYTES / 2**30, 3),
        }
        main = (int(schedule[0]) / 1e9, int(schedule[1]) / 1e9)  # seconds on a core, seconds ready for one
        for name, seconds in (("cpu_pct", busy_s), ("main_cpu_pct", main[0]), ("cpu_wait_pct", main[1])):
            rate = self._rates.of(f"{beat.pid}.{name}", seconds, now)
            if rate is not None:
                values[name] = round(rate * 100, 1)
        return values
