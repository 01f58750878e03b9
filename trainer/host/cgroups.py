"""The control groups around this process. Containers, Kubernetes and Slurm limit a process by them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def groups_above(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of the groups around it, where `controller` (cpu, memory) may limit it.

    A container often sees its own group as the outermost.
    """
    for line in lines_of("proc/self/cgroup"):
        if line.count(":") < 2:  # the end of the file, or a line that the kernel did not write
            continue
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = (controllers, controller) if controllers else ("", "unified")  # version 1, and 2 alone or beside it
        for mount in dict.fromkeys(mounts):
            top = ROOT / "sys/fs/cgroup" / mount
            yield from (top / parent for parent in (Path(inside.lstrip("/")), *Path(inside.lstrip("/")).parents))


def lines_of(path: str) -> list[str]:
    """The lines of one of the kernel's files; empty when the file does not exist."""
    try:
        return (ROOT / path).read_text("utf-8", "surrogateescape").split("\n")  # a group may have any name
    except OSError:
        return []
