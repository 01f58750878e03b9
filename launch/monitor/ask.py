"""Asks a hung rank where it is: the stacks of its threads, its collectives, and the kernel's state of its process."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.host.stacks import FLIGHT, FLIGHT_SIGNAL, STACKS, STACKS_SIGNAL
from trainer.life.events import tolerate_unwritable
from trainer.life.heartbeat import Beat
from trainer.life.rows import parsed, whole

STOPPED = "T"
_ANSWER_S = 3.0
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')
_COLLECTIVES = re.compile(r"/torch/distributed/(?!tensor/)")  # not DTensor's own code, which computes as well
_NEAR = 3  # how many frames count, from the innermost one on


@dataclass(frozen=True)
class Standstill:
    """One hung rank. `place`: the innermost line of its main thread. `waits`: whether that line is in a collective.
    `collectives`: how many the rank has begun. Each is None where the rank could not tell."""

    rank: int
    node: str
    pid: int
    step: int
    phase: str
    still_s: float
    state: str  # as in /proc: R runs, S sleeps, D waits for a device, T was stopped; X: no such process
    place: str | None
    waits: bool | None
    collectives: int | None

    @property
    def gone(self) -> bool:
        return self.state in "XZ"


def ask(beats: list[Beat], node: str, folder: Path) -> list[Standstill]:
    """Ask all ranks of a node at once. The answers also go to `folder`: `stack-<rank>.txt` and `flight-<rank>.json`.

    A rank whose process was stopped does not answer until `wake`."""
    states = {beat.rank: _state(beat.pid) for beat in beats}
    files = {beat.rank: (_memory(beat.pid, STACKS), _memory(beat.pid, FLIGHT)) for beat in beats}
    for beat in beats:
        # Signal only a process that has our memory open: its number may belong to another process by now.
        if all(files[beat.rank]):
            os.kill(beat.pid, STACKS_SIGNAL)
            os.kill(beat.pid, FLIGHT_SIGNAL)
    _wait_for([path for rank, pair in files.items() for path in pair if path and states[rank] != STOPPED])
    found = []
    for beat in beats:
        stacks, flight = _keep(beat.rank, files[beat.rank], folder)
        place, waits = where(stacks.decode(errors="replace"))
        still_s = round(time.monotonic() - beat.time_s, 1)
        who = (beat.rank, node, beat.pid, beat.step, beat.phase.word, still_s)
        found.append(Standstill(*who, states[beat.rank], place, waits, collectives(flight)))
    return found


def wake(found: list[Standstill], folder: Path) -> None:
    """Continue the stopped ranks, so that they answer. Call this after all nodes have looked: the waiting ranks
    continue too, and a later monitor would see no hang."""
    for standstill in found:
        if standstill.state != STOPPED:
            continue
        files = _memory(standstill.pid, STACKS), _memory(standstill.pid, FLIGHT)
        if all(files):
            os.kill(standstill.pid, signal.SIGCONT)
            _wait_for([path for path in files if path])
            _keep(standstill.rank, files, folder)


def _keep(rank: int, files: tuple[str | None, str | None], folder: Path) -> tuple[bytes, bytes]:
    """Write down a rank's answer: its record of collectives, then its stacks. Others wait for the stacks."""
    stacks, flight = (_read(path) for path in files)
    with tolerate_unwritable():  # on a full disk the culprit is still reported
        if flight:
            (folder / f"flight-{rank:05d}.json").write_bytes(flight)
        if stacks:
            stacks_of(rank, folder).write_bytes(stacks)
    return stacks, flight


def stacks_of(rank: int, folder: Path) -> Path:
    return folder / f"stack-{rank:05d}.txt"


def _state(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return "X"
    return chr(stat[stat.rindex(b")") + 2])


def _memory(pid: int, name: str) -> str | None:
    """Path of a process's shared memory of that name."""
    folder = f"/proc/{pid}/fd"
    try:
        for descriptor in os.listdir(folder):
            if os.readlink(f"{folder}/{descriptor}").startswith(f"/memfd:{name} "):
                return f"{folder}/{descriptor}"
    except OSError:
        return None  # the process has just ended
    return None


def _wait_for(paths: list[str]) -> None:
    """Wait until all paths have been written to and no longer grow, or until the time is over."""
    deadline = time.monotonic() + _ANSWER_S
    before: list[int] = []
    while time.monotonic() < deadline:
        sizes = [os.stat(path).st_size if os.path.exists(path) else 1 for path in paths]
        if all(sizes) and sizes == before:
            return
        before = sizes
        time.sleep(0.2)


def _read(path: str | None) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError:
        return b""


def where(stacks: str) -> tuple[str | None, bool | None]:
    """(innermost line of the main thread, whether it is in a collective), from faulthandler's dumps (main thread
    last)."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)
    frames = [match for line in threads[-1].splitlines() if (match := _FRAME.fullmatch(line))]
    if not frames:
        return None, None
    waits = any(_COLLECTIVES.search(frame["file"]) for frame in frames[:_NEAR])
    return "{file}:{line} in {function}".format(**frames[0].groupdict()), waits


def collectives(flight: bytes) -> int | None:
    """How many collectives a rank has begun, over all its groups."""
    told = parsed(flight)
    entries = told.get("entries") if isinstance(told, dict) else None
    if not isinstance(entries, list):
        return None
    last: dict[str, int] = {}
    for entry in entries:
        number = whole(entry, "collective_seq_id") if isinstance(entry, dict) else None
        if number is not None:
            group = str(entry.get("process_group"))
            last[group] = max(last.get(group, 0), number)
    return sum(last.values())
