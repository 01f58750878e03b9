"""The control groups around this process, by which containers, Kubernetes and Slurm limit it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def groups_above(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those around it, by which `controller` (cpu, memory) may limit it.

    A container often sees its own as the outermost.
    """
    for line in lines_of("proc/self/cgroup"):
        if line.count(":") < 2:  # the end of the file, or no line of the kernel's
            continue
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = (controllers, controller) if controllers else ("", "unified")  # version 1, and 2 alone or beside it
        for mount in dict.fromkeys(mounts):
            top = ROOT / "sys/fs/cgroup" / mount
            yield from (top / parent for parent in (Path(inside.lstrip("/")), *Path(inside.lstrip("/")).parents))


def lines_of(path: str) -> list[str]:
    """The lines of a file of the kernel's; none when it is not there."""
    try:
        return (ROOT / path).read_text("utf-8", "surrogateescape").split("\n")  # a group may have any name
    except OSError:
        return []
