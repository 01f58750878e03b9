"""A filesystem that keeps only what it promised: after a power loss it may hold any subset of what was not fsynced.

It replays the operations of a save. Bytes are durable once their file was fsynced, names once their folder was. Each
pending write or folder change is kept or lost, as chosen. A pending write may also be kept in part, or as zeros.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

EXHAUSTIVE_UP_TO = 4  # pending changes: up to this number every combination is tried
RANDOM_CHOICES = 6


@dataclass(frozen=True)
class Step:
    """One recorded operation. Paths are relative to the run folder."""

    name: str
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass
class Node:
    """A file or a folder: its durable content, and its pending changes in order."""

    is_folder: bool
    content: bytes = b""
    names: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[str, str, Node | None, int, bytes]] = field(default_factory=list)
    live: dict[str, Node] = field(default_factory=dict)


class Disk:
    def __init__(self) -> None:
        self.root = Node(is_folder=True)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """Everything below `folder`, all of it durable. Two names of one file stay one file."""
        disk = cls()
        files: dict[tuple[int, int], Node] = {}

        def enter(node: Node, path: Path) -> None:
            for child in sorted(path.iterdir()):
                found = child.lstat()
                if child.is_dir():
                    made = Node(is_folder=True)
                    enter(made, child)
                else:
                    made = files.setdefault((found.st_dev, found.st_ino), Node(False, child.read_bytes()))
                node.names[child.name] = node.live[child.name] = made

        enter(disk.root, folder)
        return disk

    def run(self, step: Step) -> None:
        """Do one operation as the running system sees it. Only the two fsyncs make anything durable."""
        folder, name = self._folder(step.path), PurePosixPath(step.path).name
        if step.name in ("mkdir", "create"):
            self._set(folder, name, Node(is_folder=step.name == "mkdir"))
        elif step.name == "write":
            folder.live[name].pending.append(("write", "", None, step.offset, step.data))
        elif step.name == "fsync":
            _settle(folder.live[name], ["kept"] * len(folder.live[name].pending))
        elif step.name == "fsync_dir":
            node = self.root if step.path == "." else folder.live[name]
            _settle(node, ["kept"] * len(node.pending))
        elif step.name == "link":
            self._set(self._folder(step.target), PurePosixPath(step.target).name, folder.live[name])
        elif step.name == "rename":
            target = PurePosixPath(step.target).name
            assert PurePosixPath(step.target).parent == PurePosixPath(step.path).parent
            folder.live[target] = folder.live.pop(name)
            folder.pending.append(("move", name, folder.live[target], 0, target.encode()))
        elif step.name in ("unlink", "rmdir"):
            node = folder.live.pop(name)
            assert step.name == "unlink" or not node.live
            folder.pending.append(("remove", name, None, 0, b""))
        else:
            raise AssertionError(step.name)

    def pending(self) -> list[tuple[Node, int]]:
        """Every pending change that a name could still show: (node, index)."""
        return [(node, index) for node in self._nodes() for index in range(len(node.pending))]

    def after_power_loss(self, kept: dict[tuple[int, int], str]) -> dict[str, bytes | None]:
        """The tree after a power loss, with the chosen fates of pending changes: path -> content, None for folders."""
        found: dict[str, bytes | None] = {}

        def walk(node: Node, path: str) -> None:
            copy = Node(node.is_folder, node.content, dict(node.names), list(node.pending))
            _settle(copy, [kept.get((id(node), index), "lost") for index in range(len(node.pending))])
            if not node.is_folder:
                found[path] = copy.content
                return
            found[path] = None
            for name, child in copy.names.items():
                walk(child, f"{path}/{name}" if path else name)

        walk(self.root, "")
        return found

    def _nodes(self) -> list[Node]:
        """Nodes that a name leads to, or may lead to."""
        seen: dict[int, Node] = {}

        def visit(node: Node) -> None:
            if id(node) in seen:
                return
            seen[id(node)] = node
            for child in [*node.names.values(), *node.live.values(), *(p[2] for p in node.pending if p[2])]:
                visit(child)

        visit(self.root)
        return list(seen.values())

    def _folder(self, path: str) -> Node:
        node = self.root
        for part in PurePosixPath(path).parent.parts:
            node = node.live[part]
        return node

    def _set(self, folder: Node, name: str, node: Node) -> None:
        folder.live[name] = node
        folder.pending.append(("set", name, node, 0, b""))


def _settle(node: Node, fates: Sequence[str]) -> None:
    """Apply pending changes by their fate: kept, lost, and for writes also half (the first bytes) or zeros."""
    for (kind, name, child, offset, data), fate in zip(node.pending, fates, strict=True):
        if fate == "lost":
            continue
        if kind == "write":
            data = {"kept": data, "half": data[: len(data) // 2], "zeros": bytes(len(data))}[fate]
            base = node.content.ljust(offset, b"\0")
            node.content = base[:offset] + data + base[offset + len(data) :]
        elif kind == "set":
            assert child is not None
            node.names[name] = child
        elif kind == "move":
            assert child is not None
            node.names.pop(name, None)
            node.names[data.decode()] = child
        else:
            node.names.pop(name, None)
    node.pending = []


def choices(disk: Disk, rng: random.Random) -> Iterator[dict[tuple[int, int], str]]:
    """Choices of fates for the pending changes: all combinations when there are few changes. Otherwise all kept, none,
    all but each one, each one alone, and random mixes with torn writes."""
    pending = [((id(node), index), node.pending[index][0] == "write") for node, index in disk.pending()]
    keys = [key for key, _ in pending]
    if len(pending) <= EXHAUSTIVE_UP_TO:
        fates = [("kept", "lost", "half", "zeros") if write else ("kept", "lost") for _, write in pending]
        for mix in itertools.product(*fates):
            yield dict(zip(keys, mix, strict=True))
        return
    yield {}
    yield dict.fromkeys(keys, "kept")
    for key in keys:
        yield {key: "kept"}
        yield {other: "kept" for other in keys if other != key}
    for _ in range(RANDOM_CHOICES):
        yield {
            key: rng.choice(("kept", "kept", "lost", "half", "zeros") if write else ("kept", "lost"))
            for key, write in pending
        }


def materialise(tree: dict[str, bytes | None], folder: Path) -> None:
    """Write the tree below `folder`."""
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).write_bytes(content)
