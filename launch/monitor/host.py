"""What the host does: CPU, memory, swap, disks, network. What each rank's process does, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from trainer.life.heartbeat import Beat

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # the kernel counts guests in user and nice already
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Rates:
    """Rates since the last call, of counters that only grow. One that went backwards was reset: it gives no rate."""

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
    """The whole node, with other people's processes. Values that cannot be read are left out, and reported once."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self.cpus = psutil.cpu_count() or 1
        self._tell = tell
        self._left_out: set[str] = set()
        self._rates = Rates()

    def read(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for reading in (self._cpu, self._memory, self._swap, self._disk, self._network):
            name = reading.__name__[1:]
            try:
                values |= reading(time.monotonic())
            except Exception as error:  # noqa: BLE001 - psutil: TypeError, AssertionError, ..., depending on /proc
                if name not in self._left_out:
                    self._left_out.add(name)
                    self._tell("reading_left_out", None, reading=name, error=f"{type(error).__name__}: {error}")
        return {name: value for name, value in values.items() if value is not None}

    def _cpu(self, now: float) -> dict[str, Any]:
        cpu = psutil.cpu_times()
        # The busy times are summed. All time less the idle time would run backwards on an idle machine, by rounding,
        # and give no rate.
        busy_s = sum(getattr(cpu, name, 0.0) for name in _BUSY)
        return {"cpu_pct": self._rate("cpu", busy_s * 100 / self.cpus, now)}

    def _memory(self, now: float) -> dict[str, Any]:
        memory = psutil.virtual_memory()
        return {"memory_gib": round((memory.total - memory.available) / 2**30, 3)}

    def _swap(self, now: float) -> dict[str, Any]:
        return {"swap_gib": round(psutil.swap_memory().used / 2**30, 3)}

    def _disk(self, now: float) -> dict[str, Any]:
        disk = psutil.disk_io_counters()
        if disk is None:
            return {}
        return {
            "disk_read_mib_s": self._rate("read", disk.read_bytes / 2**20, now),
            "disk_write_mib_s": self._rate("write", disk.write_bytes / 2**20, now),
        }

    def _network(self, now: float) -> dict[str, Any]:
        network = psutil.net_io_counters()
        if network is None:
            return {}
        return {
            "network_in_mib_s": self._rate("in", network.bytes_recv / 2**20, now),
            "network_out_mib_s": self._rate("out", network.bytes_sent / 2**20, now),
        }

    def _rate(self, name: str, count: float, now: float) -> float | None:
        rate = self._rates.of(name, count, now)
        return None if rate is None else round(rate, 2)


class Processes:
    """The ranks' processes: what they use, and how long they wait for a core."""

    def __init__(self) -> None:
        self._rates = Rates()

    def read(self, beat: Beat) -> dict[str, Any]:
        """`cpu_pct`: of one core, over all threads. `cpu_wait_pct`: the share of time in which its main thread was
        ready to run and had no core. Only `gone` for a process that does not exist."""
        try:
            with open(f"/proc/{beat.pid}/stat", "rb") as file:
                stat = file.read()
        except OSError:
            self._rates.forget(f"{beat.pid}.")
            return {"gone": True}
        fields = stat[stat.rindex(b")") + 2 :].split()  # from the third field on: the name before may hold anything
        now = time.monotonic()
        values: dict[str, Any] = {
            "state": fields[0].decode(),
            "memory_gib": round(int(fields[21]) * _PAGE_BYTES / 2**30, 3),
        }
        spent_s = {"cpu_pct": (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, **_main_thread_s(beat.pid)}
        for name, seconds in spent_s.items():
            rate = self._rates.of(f"{beat.pid}.{name}", seconds, now)
            if rate is not None:
                values[name] = round(rate * 100, 1)
        return values


def _main_thread_s(pid: int) -> dict[str, float]:
    """Seconds that the main thread was on a core, and that it waited for one. Empty where the kernel does not count."""
    try:
        with open(f"/proc/{pid}/task/{pid}/schedstat", "rb") as file:
            on_core, ready = map(int, file.read().split()[:2])
    except (OSError, ValueError):
        return {}
    return {"main_cpu_pct": on_core / 1e9, "cpu_wait_pct": ready / 1e9}
