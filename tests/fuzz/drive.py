"""Runs many inputs in a forked process. An input that raises, takes too long or ends the process is kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.kinds import Kind

MOST_S = 5.0  # of processor time, per input
MOST_WAITED_S = 30.0  # of clock time: an input that waits for ever uses no processor, and a busy machine is slow
MOST_BYTES = 4 << 30
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2  # capabilities(7) that let root open everything


class TooLong(BaseException):
    """No Exception, which the code under test might catch."""


@dataclass
class Tally:
    """The results for the inputs of one kind. `defects`: (input, what it caused)."""

    kind: str
    inputs: int = 0
    used: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    defects: list[tuple[bytes, str]] = field(default_factory=list)

    @property
    def refused(self) -> int:
        return self.inputs - self.used - len(self.defects)


def fresh(kind: Kind, count: int, seed: int) -> Iterator[bytes]:
    """Inputs of a kind. The same seed and corpus give the same inputs."""
    for number in range(count):
        yield kind.mutate(Random(f"{seed}-{kind.name}-{number}"), kind.seeds)


def drive(kind: Kind, inputs: Iterable[bytes]) -> Tally:
    """Call the target with each input in a forked process, and start another process after an input that ended it."""
    every, tally = list(inputs), Tally(kind.name)
    began = time.monotonic()
    while tally.inputs < len(every):
        status = _in_a_fork(kind, every, tally)
        if tally.inputs < len(every):
            tally.defects.append((every[tally.inputs], f"the process ended, status {status}"))
            tally.inputs += 1
    tally.seconds = time.monotonic() - began
    return tally


def _in_a_fork(kind: Kind, every: list[bytes], tally: Tally) -> int:
    """Continue where `tally` is, until all inputs are done or the process ends. Returns its status."""
    here, there = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(here)
            _alone()
            signal.signal(signal.SIGALRM, _look_at_the_clock)
            with open(there, "wb", buffering=0) as file:
                for data in every[tally.inputs :]:
                    file.write(pickle.dumps(_one(kind, data)))
        except BaseException:  # noqa: BLE001 - the forked process must never go on as its parent
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(there)
    with open(here, "rb") as file:
        while file.peek(1):
            defect, used, seconds = pickle.load(file)
            if defect is not None:
                tally.defects.append((every[tally.inputs], defect))
            tally.inputs += 1
            tally.used += used
            tally.slowest_s = max(tally.slowest_s, seconds)
    return os.waitpid(child, 0)[1]


def _one(kind: Kind, data: bytes) -> tuple[str | None, bool, float]:
    """(the traceback of a defect, whether the input was used, seconds of processor time)."""
    began = time.process_time()
    defect, used = None, False
    _LIMITS[:] = began + MOST_S, time.monotonic() + MOST_WAITED_S
    try:
        signal.setitimer(signal.ITIMER_REAL, MOST_S, MOST_S / 5)
        used = bool(kind.target(data))
    except (Exception, TooLong):  # noqa: BLE001 - any exception is a defect
        defect = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return defect, used, time.process_time() - began


_LIMITS = [0.0, 0.0]


def _look_at_the_clock(number: int, frame: Any) -> None:
    if time.process_time() > _LIMITS[0] or time.monotonic() > _LIMITS[1]:
        raise TooLong(f"more than {MOST_S:g} s of processor time, or {MOST_WAITED_S:g} s of waiting")


def _alone() -> None:
    """Drop what this process inherited: job, launcher and Slurm variables, and root's right to open everything."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    os.environ.clear()
    os.environ.update(PATH="", HOME="/nowhere", SLURMD_NODENAME="node2", LANG="C.UTF-8")
    if os.geteuid() == 0:
        _give_up_opening_everything()


def _give_up_opening_everything() -> None:
    """Make root meet unreadable files, too. Root's own files stay readable."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this thread
    words = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: low words, then high ones
    if libc.capget(header, words):
        raise OSError(ctypes.get_errno(), "capget")
    sets = list(struct.unpack("=6I", words.raw))
    sets[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    if libc.capset(header, struct.pack("=6I", *sets)):
        raise OSError(ctypes.get_errno(), "capset")


def keep(tally: Tally, folder: Path) -> list[Path]:
    """Write each input that caused a defect, named by its hash, with the defect in a file beside it."""
    kept = []
    for data, told in tally.defects:
        path = folder / tally.kind / hashlib.sha256(data).hexdigest()[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(told, "utf-8", "backslashreplace")
        kept.append(path)
    return kept


def table(tallies: list[Tally]) -> str:
    lines = [f"{'kind':<16}{'inputs':>8}{'refused':>9}{'used':>8}{'defects':>9}{'seconds':>9}{'slowest':>9}"]
    for t in tallies:
        lines.append(
            f"{t.kind:<16}{t.inputs:>8}{t.refused:>9}{t.used:>8}{len(t.defects):>9}{t.seconds:>9.1f}{t.slowest_s:>9.2f}"
        )
    return "\n".join(lines)
