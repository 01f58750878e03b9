"""Ask Slurm for another life of a job: by a requeue, by the exit code that the site requeues, or by a new job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import UserError
from launch.look.run_folder import JOB_FILE
from slurm.ask import ask, facts_of
from trainer.host.environment import SLURM_ARRAY_TASK_ID, SLURM_JOB_NUM_NODES, SLURM_RESTART_COUNT
from trainer.life.folder import RunFolder, write_json
from trainer.life.rows import facts_in

_CONTROLLER_PATIENCE_S = 600.0  # the controller may just be restarting
_NOBODY_ANSWERS = ("Unable to contact slurm controller", "Connection refused", "timed out", "Zero Bytes")
_USABLE = ("idle", "mixed", "allocated", "completing", "planned")


@dataclass(frozen=True)
class Job:
    """The job of this batch script, as the controller knows it. `runs`: Slurm is not ending the job. `requeued`: Slurm
    ends the job and starts it again. A cancelled job shows as COMPLETING too, but only a requeue raises the restart
    count."""

    number: str
    runs: bool
    requeued: bool
    timed_out: bool
    partition: str
    nodes: int
    excluded: list[str]


def patiently(*command: str, script: str | None = None) -> str:
    """`ask`, repeated until the controller answers."""
    deadline = time.monotonic() + _CONTROLLER_PATIENCE_S
    while True:
        try:
            return ask(*command, script=script)
        except UserError as error:
            if time.monotonic() > deadline or not any(words in str(error) for words in _NOBODY_ANSWERS):
                raise
            time.sleep(1.0)


def names(node_list: str) -> list[str]:
    """Node names in a list such as `node[1-2]`."""
    return patiently("scontrol", "show", "hostnames", node_list).split() if node_list not in ("", "(null)") else []


def ask_job(number: str) -> Job:
    """What Slurm knows of this job."""
    facts = facts_of(patiently("scontrol", "--oneliner", "show", "job", number))
    return Job(
        number,
        facts["JobState"] == "RUNNING",
        int(facts["Restarts"]) > (SLURM_RESTART_COUNT.read(os.environ) or 0),
        facts["JobState"] == "TIMEOUT" or facts.get("Reason") == "TimeLimit",
        facts["Partition"],
        SLURM_JOB_NUM_NODES.read(os.environ) or 1,
        names(facts.get("ExcNodeList", "")),
    )


def to_exclude(job: Job, failed: list[str], say: Callable[[str], None]) -> list[str]:
    """The nodes that the next life must avoid: those that failed, unless too few would be left."""
    wanted = sorted({*job.excluded, *failed})
    told = patiently("sinfo", "-h", "-N", "-p", job.partition, "-o", "%N %T")
    usable = {name for name, state in (line.split() for line in told.splitlines()) if state.startswith(_USABLE)}
    if len(usable - set(wanted)) >= job.nodes:
        return wanted
    say(f"{', '.join(failed)}: not excluded, as partition {job.partition} has too few other nodes")
    return job.excluded


def down(nodes: list[str]) -> list[str]:
    """The nodes that Slurm marks as down."""
    told = patiently("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T")
    return sorted({name for name, state in (line.split() for line in told.splitlines()) if state.startswith("down")})


def exclude(job: Job, excluded: list[str], say: Callable[[str], None]) -> None:
    """Keep a requeued job away from nodes while it waits."""
    try:
        if excluded != job.excluded:
            patiently("scontrol", "update", f"JobId={job.number}", f"ExcNodeList={','.join(excluded)}")
    except UserError as error:
        say(f"not kept away from {', '.join(excluded)}: {error}")  # the job goes on all the same


def by_scontrol(job: Job, excluded: list[str], folder: RunFolder, say: Callable[[str], None]) -> None:
    """Requeue this very job. After KillWait, Slurm kills this process too."""
    patiently("scontrol", "requeue", job.number)
    exclude(job, excluded, say)


def by_exit(job: Job, excluded: list[str], folder: RunFolder, say: Callable[[str], None]) -> None:
    """Ask for nothing: the site has 75 in its RequeueExit, so the exit code requeues the job."""
    if excluded != job.excluded:
        say(f"slurm.requeue=exit cannot keep the job away from {', '.join(excluded)}")


def by_chain(job: Job, excluded: list[str], folder: RunFolder, say: Callable[[str], None]) -> None:
    """Submit the same script as a new job, which begins once this one has ended."""
    flags = [f"--exclude={','.join(excluded)}"] if excluded else []
    task = SLURM_ARRAY_TASK_ID.read(os.environ)
    if task is not None:
        flags += [f"--array={task}"]  # the script asks for all tasks, but the other tasks have their own lives
    script = patiently("scontrol", "write", "batch_script", job.number, "-")
    words = ["sbatch", "--parsable", f"--dependency=afterany:{job.number}", *flags]
    told = patiently(*words, script=script)
    place = folder.root / JOB_FILE
    holder = facts_in(place)
    if holder:
        number = told.strip().partition(";")[0]
        write_json(place, holder | {"job": number if task is None else f"{number}_{task}"})


METHODS: dict[str, Callable[[Job, list[str], RunFolder, Callable[[str], None]], None]] = {
    "scontrol": by_scontrol,
    "exit": by_exit,
    "chain": by_chain,
}
