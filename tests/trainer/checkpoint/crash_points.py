"""Actions on a folder of checkpoints other than a save; each file operation is a crash point. Prints JSON by action.

It runs as a program (`python crash_points.py names|kill|kill-all|record FOLDER`): a process with threads may not fork.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.schema.checkpoint import KeepSection
from launch.checkpoint.convert.convert import convert, open_state
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.load.kinds import Kind
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

MODEL, FROZEN, OPTIM = (f"{group}/rank-00000.safetensors" for group in ("model", "frozen", "optim"))
EVERYTHING = KeepSection(last=99, best=False)


def tensors(step: int) -> dict[str, tuple[Group, torch.Tensor]]:
    generator, fixed = torch.Generator().manual_seed(step), torch.Generator().manual_seed(99)
    return {
        "w": ("model", torch.randn(5, 3, generator=generator)),
        "w.exp_avg": ("optim", torch.randn(5, 3, generator=generator)),
        "f": ("frozen", torch.randn(40, 2, generator=fixed).half()),
    }


def save(store: CheckpointStore, step: int, held: Sequence[str] = ("w", "w.exp_avg", "f")) -> None:
    """One process saves the tensors it holds. Frozen tensors are linked to the last save of the same store."""
    whole = {key: tensors(step)[key] for key in held}
    pieces = [Piece(k, g, t, tuple(t.shape), (0,) * t.ndim, tuple(t.shape)) for k, (g, t) in whole.items()]
    state = RunState(position={"consumed_samples": 8 * step}, step_counts={"w": step}, trained_steps={"f": 0})
    store.save(step, pieces, state)
    for result in store.wait():
        if not result.ok:
            raise RuntimeError(result.error)


def store_of(root: Path, attempt: int, keep: KeepSection = EVERYTHING) -> CheckpointStore:
    return CheckpointStore(root, attempt=attempt, keep=keep, asynchronous=False, say=lambda line: None)


def shelf_of(root: Path, keep: KeepSection = EVERYTHING) -> Shelf:
    return Shelf(root, keep, lambda line: None)


def is_whole(path: Path) -> None:
    """Check every block of a checkpoint, and assert that it holds exactly its step."""
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    expected = tensors(checkpoint.step)
    assert checkpoint.manifest.tensors.keys() == expected.keys()
    for key, (_, tensor) in expected.items():
        assert torch.equal(checkpoint.read(key).view(torch.uint8), tensor.view(torch.uint8)), key
    assert checkpoint.manifest.position == {"consumed_samples": 8 * checkpoint.step}
    assert path.name.startswith(f"step-{checkpoint.step:08d}")


def flip(path: Path, byte: int) -> None:
    """Flip a bit in place, so that every name of these bytes has the change."""
    with path.open("r+b") as file:
        content = bytearray(file.read())
        content[byte] ^= 4
        file.seek(0)
        file.write(content)


@dataclass(frozen=True)
class Action:
    """`prepare` makes the state before, in the process that then acts. `judge` returns what a start finds, "before" or
    "after", and raises AssertionError or BadCheckpoint when it is neither."""

    prepare: Callable[[Path], Any]
    act: Callable[[Path, Any], object]
    judge: Callable[[Path], str]


def _newest(root: Path, bad: tuple[str, ...] = ()) -> int:
    """Clean up and take the newest good one, as a start does. Everything with a committed name must be whole."""
    shelf = shelf_of(root)
    shelf.clean()
    for step in shelf.steps():
        if shelf.path(step).name not in bad:
            is_whole(shelf.path(step))
    found = shelf.newest_good()
    assert found is not None
    assert not [entry.name for entry in root.iterdir() if not entry.name.startswith("step-0000") or "ing" in entry.name]
    return found.step


# ---- a save whose frozen file is a link to that of the save before, and which prunes the save before that


def _two_saves(root: Path) -> CheckpointStore:
    store = store_of(root, 1, KeepSection(last=2, best=False))
    save(store, 1)
    save(store, 2)
    return store


def _one_of_before(root: Path) -> CheckpointStore:
    """Files of an earlier attempt hold the frozen tensors, and no rank holds them."""
    save(store_of(root, 1), 2)
    store = store_of(root, 2, KeepSection(last=2, best=False))
    store.adopt(Checkpoint(root / "step-00000002"), {"f": "f"}, lineage=True, foreign=False)
    return store


def _judge_carried(root: Path) -> str:
    return {2: "before", 3: "after"}[_newest(root)]


def _judge_save(root: Path) -> str:
    newest = _newest(root)
    steps = shelf_of(root).steps()
    assert steps in ([1, 2], [1, 2, 3], [2, 3]), steps
    return {2: "before", 3: "after"}[newest]


# ---- pruning


def _five(root: Path) -> None:
    store = store_of(root, 1)
    for step in (1, 2, 3, 4):
        save(store, step)
    save(store_of(root, 2), 5)


def _prune(root: Path, _: None) -> None:
    assert shelf_of(root, KeepSection(last=2, best=False)).prune("001") == [1, 2, 3]


def _judge_prune(root: Path) -> str:
    assert _newest(root) == 5
    steps = shelf_of(root).steps()
    assert steps[-2:] == [4, 5]
    return "after" if steps == [4, 5] else "before"


# ---- setting bad ones aside, when they are opened and when they are read


def _two_bad(root: Path) -> None:
    _five(root)
    flip(root / "step-00000005/manifest.json", 40)
    (root / "step-00000004" / MODEL).unlink()
    (root / "step-00000005.bad-0").mkdir()  # this name is already taken


def _judge_reject(root: Path) -> str:
    names = ("step-00000004", "step-00000005")
    there = [name for name in names if (root / name).exists()]
    assert _newest(root, names) == 3
    assert shelf_of(root).set_aside() == ["step-00000004.bad-0", "step-00000005.bad-0", "step-00000005.bad-1"]
    assert {entry.name for entry in (root / "step-00000005.bad-1").iterdir()} >= {"manifest.json", "model"}
    return "before" if there else "after"


def _bad_block(root: Path) -> None:
    _five(root)
    flip(root / "step-00000005" / OPTIM, -1)


def _set_aside(root: Path, _: None) -> None:
    shelf = shelf_of(root)
    path = shelf.path(5) / OPTIM
    if not shelf.mend(5, {path}):
        shelf.reject(5, "its block is bad")


def _judge_set_aside(root: Path) -> str:
    there = (root / "step-00000005").exists()
    assert _newest(root, ("step-00000005",)) == (5 if there else 4)
    assert not there or Checkpoint(root / "step-00000005").read("w") is not None
    return "before" if there else "after"


# ---- recovering a frozen file, missing (noticed on opening) or bad in a block (noticed on reading)


def _frozen_missing(root: Path) -> None:
    _five(root)
    shutil.rmtree(root / "step-00000005/frozen")


def _frozen_bad(root: Path) -> None:
    _five(root)
    flip(root / "step-00000005" / FROZEN, -1)
    leftover = root / "step-00000005/frozen/.rank-00000.safetensors.mending"
    leftover.write_bytes(b"of a start before")


def _mend(root: Path, _: None) -> None:
    assert shelf_of(root).mend(5, {root / "step-00000005" / FROZEN})


def _judge_recovery(root: Path) -> str:
    path, label = root / "step-00000005" / FROZEN, "after"
    try:
        is_whole(path.parent.parent)
    except BadCheckpoint:
        label = "before"
        if path.exists():  # the same bytes as before, nothing half written
            assert path.stat().st_size
            flip(path, -1)
            is_whole(path.parent.parent)
            flip(path, -1)
            assert shelf_of(root).mend(5, {path})
        assert shelf_of(root).newest_good() is not None
    assert _newest(root) == 5
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]
    return label


# ---- converting into each kind, from each kind: the source stays, the target is whole or missing


def _sources(root: Path) -> None:
    save(store_of(root, 1), 1)
    for kind in ("torch", "dcp"):
        convert(root / "step-00000001", root / f"source.{kind}", kind)
    (root / "target.partial-convert").mkdir()  # left by a conversion that was killed
    (root / "target.partial-convert/x").write_bytes(b"half")


def _converted(source: str, to: Kind) -> Action:
    def judge(root: Path) -> str:
        is_whole(root / "step-00000001")
        there = (root / "target").exists()
        if not there:
            convert(root / source, root / "target", to)  # again, although there are leftovers
        assert {entry.name for entry in root.iterdir()} == {"step-00000001", "source.torch", "source.dcp", "target"}
        state = open_state(root / "target")
        try:
            assert state.kind == to
            assert state.tensors.keys() == tensors(1).keys()
        finally:
            state.close()
        convert(root / "target", root / "back", "muster")
        checkpoint = Checkpoint(root / "back")
        checkpoint.verify()
        for key, (_, tensor) in tensors(1).items():
            assert torch.equal(checkpoint.read(key).view(torch.uint8), tensor.view(torch.uint8)), key
        shutil.rmtree(root / "back")
        return "after" if there else "before"

    return Action(_sources, lambda root, _: convert(root / source, root / "target", to), judge)


ACTIONS = {
    "linked save": Action(_two_saves, lambda root, store: save(store, 3), _judge_save),
    "carried save": Action(_one_of_before, lambda root, store: save(store, 3, held=("w", "w.exp_avg")), _judge_carried),
    "prune": Action(_five, _prune, _judge_prune),
    "reject": Action(_two_bad, lambda root, _: shelf_of(root).newest_good(), _judge_reject),
    "set aside": Action(_bad_block, _set_aside, _judge_set_aside),
    "recover missing": Action(_frozen_missing, lambda root, _: shelf_of(root).newest_good(), _judge_recovery),
    "recover bad": Action(_frozen_bad, _mend, _judge_recovery),
    "convert to torch": _converted("step-00000001", "torch"),
    "convert to dcp": _converted("step-00000001", "dcp"),
    "convert to muster": _converted("source.dcp", "muster"),
}


def forked(work: Callable[[], object]) -> int:
    """Run in a forked process; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the exit code tells the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def prepared(action: Action, folder: Path) -> tuple[Path, Any]:
    """The state before, made once: on disk in `folder/run`, with a copy in `folder/before`, the rest in memory."""
    root = folder / "run" / "checkpoints"
    state = action.prepare(root)
    assert threading.active_count() == 1, "a process may only be forked without other threads"
    copy_tree(folder / "run", folder / "before")
    return root, state


def copy_tree(source: Path, target: Path) -> None:
    """Copy a tree so that two names of one file stay one file. shutil would copy it twice."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def names_of(action: Action, folder: Path) -> list[str]:
    """The names of the action's operations, between two marks."""
    root, state = prepared(action, folder)
    (folder / "mark-begin").mkdir()
    names = [row[0] for row in recorded(action, root, state)]
    (folder / "mark-end").mkdir()
    assert action.judge(root) == "after"
    return names


def recorded(action: Action, root: Path, state: Any) -> list[list[Any]]:
    """Do the action; returns every operation of it."""
    rows: list[list[Any]] = []

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        data = None if operation.data is None else bytes(operation.data).hex()
        rows.append([operation.name, operation.path, operation.target, operation.offset, data])
        yield

    disk.observer = observe
    action.act(root, state)
    disk.observer = None
    return rows


def record(action: Action, folder: Path) -> list[list[Any]]:
    return recorded(action, *prepared(action, folder))


def killed_at(action: Action, root: Path, state: Any, point: int, points: int) -> None:
    """Do the action, and send SIGKILL right before operation number `point`, or after the last one."""
    seen, lock = -1, threading.RLock()

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        nonlocal seen
        with lock:
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
            yield
            if seen + 1 == point == points:
                os.kill(os.getpid(), signal.SIGKILL)

    disk.observer = observe
    action.act(root, state)


def kill_everywhere(action: Action, folder: Path, every: int = 1) -> dict[str, Any]:
    """Crash before each operation and after the last, and record what a start then finds. (One process acts, so
    right after an operation is right before the next.) Of the writes in the middle of a file, crash at one in
    `every` only."""
    root, state = prepared(action, folder)
    counted = folder / "operations"
    assert forked(lambda: counted.write_text(json.dumps([row[:2] for row in recorded(action, root, state)]))) == 0
    operations, found = json.loads(counted.read_text()), []
    names = [name for name, _ in operations]
    for point in range(len(operations) + 1):
        last = operations[max(0, point - 2) : point + 1]  # of one file: threads take turns, and each has its own file
        if point % every and len(last) == 3 and last == [["write", last[0][1]]] * 3:
            continue
        shutil.rmtree(folder / "run")
        copy_tree(folder / "before", folder / "run")
        code = forked(lambda point=point: killed_at(action, root, state, point, len(names)))
        assert code == -signal.SIGKILL, (point, code)
        found.append(action.judge(root))
    return {"names": names, "found": found}


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    thinned = partial(kill_everywhere, every=9)
    run = {"names": names_of, "kill": thinned, "kill-all": kill_everywhere, "record": record}[what]
    results = {}
    for name, action in ACTIONS.items():
        (folder / name / "run").mkdir(parents=True)
        results[name] = run(action, folder / name)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
