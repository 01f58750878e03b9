"""Killed, or without power, at any file operation of a linked save, of pruning, of setting aside, of recovering or of
converting. A start finds the folder either as before or as intended, and nothing half done."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import crash_points
import pytest
from power_loss import Disk, Step, choices, materialise
from test_crash import AS_CALL, TRACED, told_by, traced_calls

from configs.errors import UserError
from trainer.checkpoint.format.errors import BadCheckpoint


@pytest.mark.parametrize("points", ["kill", pytest.param("kill-all", marks=pytest.mark.full)])
def test_killed_at_every_operation(tmp_path: Path, points: str) -> None:
    """(Without most of the writes of one and the same file, which `make faults` adds.)"""
    for action, result in told_by(crash_points, points, tmp_path).items():
        names, found = result["names"], result["found"]
        print(f"{action}: {len(names)} operations, killed at {len(found)} of {len(names) + 1} points: {Counter(found)}")
        assert len(found) == len(names) + 1 or (points == "kill" and "convert" in action and len(found) > 10)
        assert found[0] == "before"
        assert found[-1] == "after"
        assert found == sorted(found, reverse=True), action  # once "after" is found, "before" never comes back


@pytest.mark.full
def test_the_counted_operations_are_all_there_are(tmp_path: Path) -> None:
    """strace sees the same actions from outside: no operation bypasses the disk layer."""
    strace = shutil.which("strace")
    assert strace, "strace is needed to count system calls (apt-get install strace)"
    trace = tmp_path / "trace"
    watched = [strace, "-f", "-y", "--seccomp-bpf", "-e", f"trace={TRACED}", "-o", str(trace)]
    done = told_by(crash_points, "names", tmp_path, watched)
    assert done.keys() == crash_points.ACTIONS.keys()
    for action, names in done.items():
        expected = Counter(AS_CALL.get(name, name) for name in names)
        assert traced_calls(trace.read_text(), str(tmp_path / action / "run")) == expected, action


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Step]]]:
    """Action -> the folder before it, and every operation of it."""
    folder = tmp_path_factory.mktemp("record")
    found = {}
    for action, rows in told_by(crash_points, "record", folder).items():

        def relative(path: str, base: Path = folder / action / "run") -> str:
            return os.path.relpath(path, base) if path else ""

        steps = [Step(n, relative(p), relative(t), offset, bytes.fromhex(d or "")) for n, p, t, offset, d in rows]
        found[action] = (folder / action / "before", steps)
    return found


class Judge:
    """Tells what a start finds in a tree. Trees repeat often, so each one is made and read once."""

    def __init__(self, action: str, folder: Path) -> None:
        self._judge, self._folder = crash_points.ACTIONS[action].judge, folder
        self._known: dict[int, str] = {}

    def find(self, tree: dict[str, bytes | None]) -> str:
        """ "before", "after", or what is wrong."""
        # A start removes a partial name unread, so its content does not distinguish trees.
        key = hash(
            frozenset((path, b"" if content and ".partial-" in path else content) for path, content in tree.items())
        )
        if key not in self._known:
            materialise(tree, self._folder)
            try:
                self._known[key] = self._judge(self._folder / "checkpoints")
            except (BadCheckpoint, UserError, AssertionError) as error:
                self._known[key] = f"{type(error).__name__}: {error}"
            shutil.rmtree(self._folder)
        return self._known[key]


def lose_power_everywhere(disk: Disk, steps: list[Step], judge: Judge, first: int = 0) -> Iterator[str]:
    """The faults over every prefix of the operations, from `first` on, and all choices of what survives. After all
    operations a start must find "after"."""
    rng = random.Random(7)
    for index, step in enumerate(steps):
        disk.run(step)
        if index < first:
            continue
        allowed = ("after",) if index == len(steps) - 1 else ("before", "after")
        for choice in choices(disk, rng):
            found = judge.find(disk.after_power_loss(choice))
            if found not in allowed:
                yield f"after operation {index} ({step.name} {step.path}): {found}"


@pytest.mark.parametrize("action", crash_points.ACTIONS)
def test_power_loss_at_every_operation(
    recorded: dict[str, tuple[Path, list[Step]]], tmp_path: Path, action: str
) -> None:
    before, steps = recorded[action]
    judge = Judge(action, tmp_path / "found")
    assert list(lose_power_everywhere(Disk.of(before), steps, judge)) == []
    print(f"{action}: {len(steps)} operations, {len(judge._known)} different trees found after a power loss")
    assert set(judge._known.values()) == {"before", "after"}


@pytest.mark.full
@pytest.mark.parametrize("action", crash_points.ACTIONS)
def test_no_fsync_can_be_left_out(recorded: dict[str, tuple[Path, list[Step]]], tmp_path: Path, action: str) -> None:
    """Without any one fsync, some power loss leaves neither "before" nor "after", or undoes the action."""
    before, steps = recorded[action]
    kinds: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        if step.name.startswith("fsync"):
            follows = re.sub(r"\d+", "n", steps[index - 1].target)  # two renames in a row need only one of their syncs
            kinds.setdefault(f"{step.name} {step.path} after {follows}", []).append(index)
    needless, judge = [], Judge(action, tmp_path / "found")
    for kind, left_out in kinds.items():
        fewer = [step for index, step in enumerate(steps) if index not in left_out]
        if next(lose_power_everywhere(Disk.of(before), fewer, judge, max(0, min(left_out) - 1)), None) is None:
            needless.append(kind)
    assert needless == []
