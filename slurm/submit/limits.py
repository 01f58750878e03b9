"""The limits of this cluster, and whether a request fits them. Slurm is asked before anything is submitted."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema.slurm import SlurmSection
from slurm.ask import ask, facts_of
from slurm.minutes import minutes


@dataclass(frozen=True)
class Partition:
    """One partition's limits; `None` where there is none. `gpus`: the most on one of its nodes."""

    name: str
    default: bool
    up: bool
    nodes: int
    most_nodes: int | None
    most_minutes: float | None
    gpus: int


IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


def filesystem(path: Path) -> str | None:
    """The kind of filesystem that a path is on, or would be on; None where the system does not tell."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    real = Path(os.path.realpath(path))  # not resolve(), which raises for a link to itself
    over = {str(parent) for parent in (real, *real.parents)}
    found = [(len(place), kind) for place, kind in mounts if place in over]
    return sorted(found, key=lambda pair: pair[0])[-1][1] if found else None  # the last mount covers the earlier ones


class NoSlurm(UserError):
    """A job cannot be submitted from this machine."""


def partitions() -> list[Partition]:
    """All partitions of this cluster. Raises NoSlurm where no cluster answers."""
    try:
        shown = ask("scontrol", "--oneliner", "show", "partition")
    except UserError as error:
        raise NoSlurm(f"no Slurm answers here ({error}); submit from a login node") from error
    gpus: dict[str, int] = {}
    for line in ask("sinfo", "-h", "-o", "%R %G").splitlines():
        name, _, gres = line.partition(" ")
        gpus[name] = max(gpus.get(name, 0), gpus_of(gres))
    return [partition_of(line, gpus) for line in shown.splitlines() if line.strip()]


def gpus_of(gres: str) -> int:
    """The number of GPUs in a list such as `gpu:a100:8(S:0-1),nvme:1`."""
    return sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,()]+)*?:(\d+)(?=[(,]|$)", gres.strip()))


def partition_of(line: str, gpus: dict[str, int]) -> Partition:
    """The partition in one line of `scontrol --oneliner show partition`."""
    facts = facts_of(line)
    name, most = facts["PartitionName"], facts.get("MaxNodes", "UNLIMITED")
    return Partition(
        name,
        facts.get("Default") == "YES",
        facts.get("State", "UP") == "UP",
        int(facts.get("TotalNodes", 0)),
        int(most) if most.isdigit() else None,
        minutes(facts.get("MaxTime", "UNLIMITED")),
        gpus.get(name, 0),
    )


def check(request: SlurmSection, known: list[Partition]) -> None:
    """Raise UserError when no node or queue here could ever run this request."""
    names = [p.name for p in known]
    if request.partition is None:
        chosen = [p for p in known if p.default]
        if not chosen:
            raise UserError(f"this cluster has no default partition: name one: --partition {'|'.join(names)}")
    else:
        wanted = request.partition.split(",")  # Slurm takes the partition that can start first
        for name in wanted:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"there is no partition {name!r} here; {hint}(partitions: {', '.join(names)})")
        chosen = [p for p in known if p.name in wanted]
    problems = [problem for p in chosen if (problem := _problem(request, p))]
    if len(problems) == len(chosen):
        raise UserError(problems[0])


def _problem(request: SlurmSection, p: Partition) -> str | None:
    limit = minutes(request.time) if request.time is not None else None
    if not p.up:
        return f"partition {p.name} is not up"
    if request.nodes > p.nodes:
        return f"{request.nodes} nodes: partition {p.name} has {p.nodes}"
    if p.most_nodes is not None and request.nodes > p.most_nodes:
        return f"{request.nodes} nodes: partition {p.name} gives at most {p.most_nodes} to a job"
    if (request.gpus_per_node or 0) > p.gpus:
        return f"{request.gpus_per_node} GPUs per node: the nodes of partition {p.name} have at most {p.gpus}"
    if request.time is not None and p.most_minutes is not None and (limit is None or limit > p.most_minutes):
        return f"time {request.time}: partition {p.name} allows {p.most_minutes:g} minutes"
    return None
