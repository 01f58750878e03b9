"""Two forked ranks that save. The crash tests kill, trace and record them.

It runs as a program (`python two_ranks.py names|record|kill FOLDER`, JSON on stdout): only a process without other
threads may fork ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from configs.schema.checkpoint import KeepSection
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save import share
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

ATTEMPT = 3
KEEP = KeepSection(last=1, best=False)


def tensors(step: int) -> dict[str, torch.Tensor]:
    """The whole state at a step. The frozen tensor never changes."""
    generator = torch.Generator().manual_seed(step)
    fixed = torch.Generator().manual_seed(99)
    return {
        "w": torch.randn(5, 3, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
        "w.exp_avg": torch.randn(5, 3, generator=generator),
        "f": torch.randn(4, 2, generator=fixed).half(),
    }


def pieces(step: int, rank: int) -> list[Piece]:
    """The pieces of rank 0 or 1: `w` cut unevenly, `b` on both, the moment as flat ranges, the frozen one's columns."""
    full = tensors(step)
    rows = slice(0, 3) if rank == 0 else slice(3, 5)
    flat = slice(0, 7) if rank == 0 else slice(7, 15)
    return [
        Piece("w", "model", full["w"][rows], (5, 3), (rows.start, 0), (rows.stop - rows.start, 3)),
        Piece("b", "model", full["b"], (3,), (0,), (3,), replica=rank, replicas=2),
        Piece("w.exp_avg", "optim", full["w.exp_avg"].view(-1)[flat], (5, 3), (), (), start=flat.start),
        Piece("f", "frozen", full["f"][:, rank : rank + 1], (4, 2), (0, rank), (4, 1)),
    ]


def run_state(step: int) -> RunState:
    return RunState(position={"consumed_samples": 8 * step}, step_counts={"w": step}, trained_steps={"f": 0})


def is_whole(checkpoint: Checkpoint) -> None:
    """Check every block of a checkpoint, and assert that it holds exactly its step."""
    checkpoint.verify()
    expected = tensors(checkpoint.step)
    assert checkpoint.manifest.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(checkpoint.read(key).view(torch.uint8), tensor.view(torch.uint8)), key
    assert checkpoint.manifest.position == {"consumed_samples": 8 * checkpoint.step}


def must_succeed(store: CheckpointStore) -> None:
    for result in store.wait():
        if not result.ok:
            raise RuntimeError(result.error)


@dataclass
class Rank:
    """A forked rank. It reports that the first save is committed, waits for a signal, saves again and leaves."""

    pid: int
    said: int
    go: int

    def first_save_done(self) -> None:
        assert os.read(self.said, 1) == b"1"

    def proceed(self) -> None:
        os.write(self.go, b"g")

    def reap(self) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.said)
        os.close(self.go)
        return os.waitstatus_to_exitcode(status)


def fork_rank(root: Path, rank: int, watch: Callable[[int], None], whole: bool = False) -> Rank:
    """Start a rank. `watch(rank)` installs its observer before the second save, or (`whole`) before the first."""
    said_out, said_in = os.pipe()
    go_out, go_in = os.pipe()
    pid = os.fork()
    if pid:
        os.close(said_in)
        os.close(go_out)
        return Rank(pid, said_out, go_in)
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        kv = FileStore(str(root.parent.parent / f"kv-{root.parent.name}"), 2)
        if whole:
            watch(rank)
        store = CheckpointStore(root, rank, 2, kv, attempt=ATTEMPT, keep=KEEP, timeout_s=30, say=lambda line: None)
        store.save(1, pieces(1, rank), run_state(1))
        must_succeed(store)
        os.write(said_in, b"1")
        os.read(go_out, 1)
        if not whole:
            watch(rank)
        store.save(2, pieces(2, rank), run_state(2))
        must_succeed(store)
        store.close()
        code = 0
    except BaseException:  # noqa: BLE001 - the exit code tells the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def two_saves(root: Path, watch: Callable[[int], None], between: Callable[[], None], whole: bool) -> list[Rank]:
    """Fork both ranks. When the first save is committed, run `between` and let them go on."""
    ranks = [fork_rank(root, rank, watch, whole) for rank in (0, 1)]
    for rank in ranks:
        rank.first_save_done()
    between()
    for rank in ranks:
        rank.proceed()
    return ranks


def names_of_operations(folder: Path) -> list[list[str]]:
    """Save twice below `folder`; returns the names of each rank's operations in the second save, between two marks."""
    share.WRITING_THREADS = 1

    def watch(rank: int) -> None:
        @contextmanager
        def observe(operation: disk.Operation) -> Iterator[None]:
            with (folder / f"names-{rank}").open("a") as file:
                file.write(operation.name + "\n")
            yield

        disk.observer = observe

    (folder / "run").mkdir()
    ranks = two_saves(folder / "run" / "checkpoints", watch, (folder / "mark-begin").mkdir, whole=False)
    assert [rank.reap() for rank in ranks] == [0, 0]
    (folder / "mark-end").mkdir()
    return names_in(folder)


def record(folder: Path) -> None:
    """Save twice below `folder`. Its file `log` gets every operation of both ranks, one per line, in their real order.
    The ranks' threads write at the same time."""
    log, lock = folder / "log", folder / "lock"
    lock.touch()

    def watch(rank: int) -> None:
        @contextmanager
        def observe(operation: disk.Operation) -> Iterator[None]:
            with lock.open() as held:
                fcntl.flock(held, fcntl.LOCK_EX)  # one at a time over both ranks, so that the order is the real one
                data = None if operation.data is None else bytes(operation.data).hex()
                row = [operation.name, operation.path, operation.target, operation.offset, data]
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                yield

        disk.observer = observe

    (folder / "run").mkdir()
    ranks = two_saves(folder / "run" / "checkpoints", watch, lambda: None, whole=True)
    assert [rank.reap() for rank in ranks] == [0, 0]


def crash(root: Path, victim: int, point: int, after: bool) -> None:
    """Save twice. `victim` is killed right before (or right `after`) operation number `point` of its second save. The
    other rank is killed at once, as when a node dies, or (`after`) goes on for a while, as when only a process dies."""

    def watch(rank: int) -> None:
        seen = -1

        @contextmanager
        def observe(operation: disk.Operation) -> Iterator[None]:
            nonlocal seen
            seen += 1
            if seen == point and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

        if rank == victim:
            disk.observer = observe

    ranks = two_saves(root, watch, lambda: None, whole=False)
    assert ranks[victim].reap() == -signal.SIGKILL
    if after:
        time.sleep(0.05)
    os.kill(ranks[1 - victim].pid, signal.SIGKILL)
    ranks[1 - victim].reap()


def recover(root: Path) -> int:
    """Recover as a start does, check the checkpoint, and save again. Returns the step found."""
    said: list[str] = []
    shelf = Shelf(root, KEEP, said.append)
    shelf.clean()
    checkpoint = shelf.newest_good()
    assert checkpoint is not None
    is_whole(checkpoint)
    assert not said, said
    store = CheckpointStore(root, attempt=ATTEMPT + 1, keep=KEEP, asynchronous=False, say=said.append)
    whole = [Piece(k, "model", t, tuple(t.shape), (0,) * t.ndim, tuple(t.shape)) for k, t in tensors(3).items()]
    store.save(3, whole, run_state(3))
    must_succeed(store)
    again = shelf.newest_good()
    assert again is not None
    assert again.step == 3
    is_whole(again)
    assert os.listdir(root) == ["step-00000003"]
    return checkpoint.step


def kill_everywhere(folder: Path, workers: int = 4) -> list[tuple[int, int, bool, int]]:
    """Crash at each operation of each rank, before and after: (victim, point, after, step found). One thread writes,
    since a number must mean the same operation in every trial."""
    share.WRITING_THREADS = 1
    names = names_of_operations(folder)
    trials = [(v, point, after) for v in (0, 1) for point in range(len(names[v])) for after in (False, True)]
    pids = [fork_worker(folder, index, trials[index::workers]) for index in range(workers)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * workers, codes
    return [tuple(found) for index in range(workers) for found in json.loads((folder / f"found-{index}").read_text())]


def fork_worker(folder: Path, index: int, trials: list[tuple[int, int, bool]]) -> int:
    """A process that runs its part of the trials. Most of that time is waiting."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        found = []
        for victim, point, after in trials:
            root = folder / f"{victim}-{point}-{after}" / "checkpoints"
            root.parent.mkdir()
            crash(root, victim, point, after)
            found.append((victim, point, after, recover(root)))
            shutil.rmtree(root.parent)
        (folder / f"found-{index}").write_text(json.dumps(found))
        code = 0
    except BaseException:  # noqa: BLE001 - the exit code tells the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    share.FILE_BYTES = 40  # so that a rank writes several files per group
    if what == "names":
        print(json.dumps(names_of_operations(folder)))
    elif what == "record":
        record(folder)
        print("null")
    elif what == "kill":
        print(json.dumps({"found": kill_everywhere(folder), "names": names_in(folder)}))


def names_in(folder: Path) -> list[list[str]]:
    return [(folder / f"names-{rank}").read_text().split() for rank in (0, 1)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
