"""Where each rank of a node stands, in memory that the node's monitor reads. No torch.

One record per local rank, in a file that lives in memory (the launcher's memfd: it is gone with the last process that
holds it, however that ends). Writing one costs microseconds and no system call, and never waits: there is no lock. A
reader that meets a write sees a mixture, which its checksum tells.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.host.environment import FromLauncher, Ranks


class Phase(enum.IntEnum):
    """What a rank is at."""

    STARTING = 0
    PREPARING = 1  # data is being tokenised, which takes as long as it takes
    COMPILING = 2  # the first step, when it compiles
    WAITING_FOR_DATA = 3
    COMMUNICATING = 4  # waiting for the other ranks, where the host can see it
    COMPUTING = 5
    SAVING = 6
    VALIDATING = 7
    LEAVING = 8

    @property
    def word(self) -> str:
        return self.name.lower()


# pid, rank, attempt, phase, beats, step, times of the last beat and of entering the phase, seconds in each phase until
# it was left; then a CRC-32
_RECORD = struct.Struct(f"=IiiIQQdd{len(Phase)}d")
_CHECKSUM = struct.Struct("=I")
_SIZE = _RECORD.size + _CHECKSUM.size
RECORD_BYTES = 128  # two cache lines of its own, so that ranks do not slow each other down
assert _SIZE <= RECORD_BYTES
_TRIES = 100


class Heartbeat:
    """This rank's own record: `enter` says what it is at, `beat` that it is still moving.

    Without a launcher nobody reads it, and the seconds of each phase are counted all the same.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.attempt, self.step, self.phase = rank, -1, 0, Phase.STARTING
        self._record: memoryview = memoryview(bytearray(RECORD_BYTES))
        self._beats = 0
        self._pid = os.getpid()
        self._since = time.monotonic()
        self._seconds = [0.0] * len(Phase)

    @classmethod
    def of(cls, ranks: Ranks, launcher: FromLauncher | None) -> Heartbeat:
        """The record that the launcher has for this rank; one that nobody reads without a launcher."""
        return cls(ranks.rank) if launcher is None else cls.at(launcher.heartbeats, ranks.local_rank, ranks.rank)

    @classmethod
    def at(cls, path: str | Path, place: int, rank: int) -> Heartbeat:
        """A record of the node's file."""
        heartbeat = cls(rank)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            records = mmap.mmap(descriptor, 0)  # kept for as long as this process lives
        finally:
            os.close(descriptor)
        heartbeat._record = memoryview(records)[place * RECORD_BYTES : (place + 1) * RECORD_BYTES]
        heartbeat.beat()
        return heartbeat

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """From now on this rank is at `phase`; a beat."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self._since
        self._since, self.phase = now, phase
        if step is not None:
            self.step = step
        self._write(now)

    def count_as(self, phase: Phase, seconds: float) -> None:
        """Of the time that was counted to computing, so much was spent at `phase`: a GPU tells it afterwards."""
        seconds = min(seconds, self._seconds[Phase.COMPUTING])
        self._seconds[Phase.COMPUTING] -= seconds
        self._seconds[phase] += seconds

    def beat(self) -> None:
        """This rank is still moving, within its phase."""
        self._write(time.monotonic())

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be at `phase` for a while, then at what was before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """How long this process has been at each phase, up to now; those it was never at are left out."""
        total = list(self._seconds)
        total[self.phase] += time.monotonic() - self._since
        return {phase.word: round(total[phase], 3) for phase in Phase if total[phase] > 0}

    def _write(self, now: float) -> None:
        self._beats += 1
        head = (self._pid, self.rank, self.attempt, self.phase, self._beats, self.step, now, self._since)
        data = _RECORD.pack(*head, *self._seconds)
        self._record[:_SIZE] = data + _CHECKSUM.pack(zlib.crc32(data))  # in one go: pack_into would write zeros first


@dataclass(frozen=True)
class Beat:
    """What a rank's record says. `time_s` is the last beat's by `time.monotonic`, alike in all processes of a node.
    `since_s` likewise when it entered its phase, `seconds` those of the phases until it left them."""

    pid: int
    rank: int
    attempt: int
    phase: Phase
    beats: int
    step: int
    time_s: float
    since_s: float
    seconds: tuple[float, ...]


class Heartbeats:
    """A node's records: made by its launcher, read by its monitor, which has the last one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._records = mmap.mmap(descriptor, 0)
        self._last: list[Beat | None] = [None] * (len(self._records) // RECORD_BYTES)

    @classmethod
    def make(cls, ranks: int) -> Heartbeats:
        """Empty records for as many local ranks and a monitor, in memory that has no name on any disk."""
        descriptor = os.memfd_create("muster-heartbeats")
        os.ftruncate(descriptor, (ranks + 1) * RECORD_BYTES)
        return cls(descriptor)

    @classmethod
    def open(cls, path: str) -> Heartbeats:
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @property
    def path(self) -> str:
        """Under which other processes of this user open it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def places(self) -> int:
        return len(self._last)

    def ranks(self) -> list[Beat | None]:
        """Every local rank's record; None for one that has not begun."""
        return [self._read(place) for place in range(len(self._last) - 1)]

    def monitor(self) -> Beat | None:
        """The monitor's own."""
        return self._read(len(self._last) - 1)

    def clear(self) -> None:
        """Before other processes take the records: none of them has begun."""
        self._records[:] = bytes(len(self._records))
        self._last = [None] * len(self._last)

    def _read(self, place: int) -> Beat | None:
        """One that stays a mixture was left in the middle of a write: what it said before holds."""
        begin = place * RECORD_BYTES
        for _ in range(_TRIES):
            data = self._records[begin : begin + _SIZE]
            if zlib.crc32(data[: _RECORD.size]) == _CHECKSUM.unpack_from(data, _RECORD.size)[0] and any(data[:4]):
                pid, rank, attempt, phase, beats, step, time_s, since_s, *seconds = _RECORD.unpack_from(data)
                self._last[place] = Beat(pid, rank, attempt, Phase(phase), beats, step, time_s, since_s, tuple(seconds))
                break
            if not any(data):
                break  # not begun
        return self._last[place]

    def close(self) -> None:
        self._records.close()
        os.close(self._descriptor)
