"""What Slurm knows about jobs: squeue for living jobs, sacct for every life of others, else scontrol."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from slurm.ask import ask, facts_of
from slurm.minutes import minutes

_PATIENCE_S = 20.0  # a person waits for this; a restarting controller answers later
_FIELDS = ("JobArrayID", "JobID", "State", "Reason", "NumNodes", "NodeList", "TimeLeft", "RestartCnt", "StdOut")
_LIFE = ("JobID", "State", "Start", "End", "NodeList", "ExitCode")
_OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"),
    *("BOOT_FAIL", "REVOKED"),
}
_OUTPUT = re.compile(r"(?P<run>/.+)/slurm/[^/]*_log\.out")  # where `slurm submit` sends a job's output
NUMBER = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class Job:
    """A job in the queue, waiting or running. `state` and `reason` are Slurm's own words."""

    number: str
    state: str
    reason: str
    nodes: int
    node_list: str
    left_s: float | None  # until its time limit
    restarts: int
    folder: Path | None  # its run folder, when `slurm submit` made the job


@dataclass(frozen=True)
class Life:
    """One life of a job, over or not. A requeued job has several."""

    job: str
    state: str
    began_s: float | None
    ended_s: float | None
    node_list: str
    exit_code: str


@dataclass(frozen=True)
class Queue:
    """One answer of squeue. `silent`: why there is no answer."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    silent: str | None = None


def mine() -> Queue:
    """All jobs of this user in the queue."""
    return _queue("--me")


def of(numbers: Iterable[str]) -> Queue:
    """The jobs of these numbers that are in the queue, whoever owns them."""
    wanted = sorted(set(numbers))
    return _queue(f"--jobs={','.join(wanted)}") if wanted else Queue()


def both(one: Queue, other: Queue) -> Queue:
    """Two answers combined into one."""
    return Queue({**one.jobs, **other.jobs}, one.silent or other.silent)


def _queue(which: str) -> Queue:
    form = ",".join(f"{name}:|" for name in _FIELDS)
    try:
        told = ask("squeue", "--noheader", "--array", which, f"--Format={form}", timeout_s=_PATIENCE_S)
    except UserError as error:
        return Queue() if "Invalid job id" in str(error) else Queue(silent=str(error))
    jobs: dict[str, Job] = {}
    for line in told.split("\n"):  # not splitlines: the path of a run may hold other line breaks
        words = line.split("|", len(_FIELDS) - 1)
        if len(words) == len(_FIELDS) and words[2] not in _OVER:
            job = _job(words)
            jobs[job.number] = jobs[words[1]] = job  # a task of an array is known by two numbers
    return Queue(jobs)


def _job(words: list[str]) -> Job:
    number, _, state, reason, nodes, node_list, left, restarts, output = words
    made_here = _OUTPUT.fullmatch(output.rstrip("|").replace("%%", "%"))
    return Job(
        number=number,
        state=state,
        reason=reason,
        nodes=int(nodes) if nodes.isdigit() else 0,
        node_list=node_list,
        left_s=_seconds(left),
        restarts=int(restarts) if restarts.isdigit() else 0,
        folder=Path(made_here["run"]) if made_here else None,
    )


def _seconds(left: str) -> float | None:
    try:
        found = minutes(left)
    except UserError:  # INVALID, NOT_SET
        return None
    return None if found is None else found * 60


def lives_of_jobs(numbers: Iterable[str]) -> tuple[dict[str, list[Life]], str | None]:
    """(job -> its lives in their order, why Slurm does not know all of them or None).

    Without accounting this asks the controller. It knows only the last life, and forgets a job after minutes.
    """
    wanted = sorted(set(numbers))
    if not wanted:
        return {}, None
    names = ",".join(_LIFE)
    command = ["sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", f"--format={names}"]
    try:
        told = ask(*command, f"--jobs={','.join(wanted)}", timeout_s=_PATIENCE_S, SLURM_TIME_FORMAT="%s")
    except UserError as error:
        return _remembered(wanted), str(error)
    found: dict[str, list[Life]] = {}
    for line in told.splitlines():
        words = line.split("|")
        if len(words) == len(_LIFE):
            job, state, began, ended, node_list, code = words
            life = Life(job, state.split()[0], _moment(began), _moment(ended), node_list, code)
            found.setdefault(job, []).append(life)
    return found, None


def _moment(told: str) -> float | None:
    return float(told) if told.isdigit() else None


def _remembered(numbers: list[str]) -> dict[str, list[Life]]:
    """Ask scontrol about all jobs at once: many calls would burden the controller."""
    try:
        told = ask("scontrol", "--oneliner", "show", "job", *numbers[:1] * (len(numbers) == 1), timeout_s=_PATIENCE_S)
    except UserError:
        return {}
    found = {}
    for line in told.splitlines():
        facts = facts_of(line)
        number = facts.get("JobId", "")
        if number in numbers:
            began, ended = (_iso(facts.get(key, "")) for key in ("StartTime", "EndTime"))
            node_list, code = facts.get("NodeList", ""), facts.get("ExitCode", "")
            found[number] = [Life(number, facts.get("JobState", ""), began, ended, node_list, code)]
    return found


def _iso(told: str) -> float | None:
    try:
        return time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):  # Unknown
        return None


def output_of(number: str) -> Path | None:
    """Where a job's output goes, while the controller remembers that."""
    try:
        line = ask("scontrol", "--oneliner", "show", "job", number, timeout_s=_PATIENCE_S)
    except UserError:
        return None
    match = re.search(r" StdOut=(.*?_log\.out)(?: |$)", line) or re.search(r" StdOut=(.*?)(?: Power=| \w+=|$)", line)
    return Path(match[1].strip().replace("%%", "%")) if match and match[1].strip() else None


def folder_of(number: str) -> Path | None:
    """The run folder of a job that `slurm submit` made, living or over."""
    output = output_of(number)
    match = _OUTPUT.fullmatch(str(output))
    if match and Path(match["run"]).is_dir():  # for a path with `%%j` scontrol shows another path
        return Path(match["run"])
    try:
        told = ask(
            *("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={number}", "--format=SubmitLine"),
            timeout_s=_PATIENCE_S,
        )
    except UserError:
        return None
    found = re.search(r" (/.+)/slurm/[^/]+\.sh", told)
    return Path(found[1]) if found else None
