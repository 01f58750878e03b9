"""The `slurm` section of the config, and of a cluster's own file."""

from __future__ import annotations

from typing import Literal

from configs.paths import PathText
from configs.schema.section import MILLION, MOST_PORT, Section, speed

_NAME = r"^[^\s\x00-\x1f\x7f]+$"


class SlurmSection(Section):
    """What `python -m slurm submit` asks for. A cluster's own file wins over this, flags and overrides over both."""

    nodes: int = speed(1, "nodes of a job", ge=1, le=MILLION)
    gpus_per_node: int | None = speed(
        None, "GPUs on each, one process per GPU; 0: two processes on the CPU", ge=0, le=MILLION
    )
    partition: str | None = speed(None, "partition; default: the cluster's", pattern=_NAME)
    account: str | None = speed(None, "account that is charged", pattern=_NAME)
    qos: str | None = speed(None, "quality of service", pattern=_NAME)
    time: str | None = speed(None, 'time limit as Slurm writes it, in quotes: "30" minutes, "12:00:00", "2-00:00:00"')
    cpus_per_task: int | None = speed(None, "CPUs on each node", ge=1, le=MILLION)
    mem: str | None = speed(None, "memory on each node, e.g. 200G; 0: all of it", pattern=_NAME)
    constraint: str | None = speed(None, "features that nodes must have", min_length=1)
    exclude: str | None = speed(None, "nodes to keep away from", pattern=_NAME)
    nodelist: str | None = speed(None, "nodes to run on", pattern=_NAME)
    reservation: str | None = speed(None, "reservation to run in", pattern=_NAME)
    dependency: str | None = speed(None, "jobs to wait for, e.g. afterok:1234", pattern=_NAME)
    mail_type: str | None = speed(None, "events to be mailed about, e.g. END,FAIL", pattern=_NAME)
    mail_user: str | None = speed(None, "who is mailed", pattern=_NAME)
    comment: str | None = speed(None, "comment on the job", min_length=1)
    warning_s: int = speed(120, "how long before the time limit the run is told to save and end", ge=10, le=MOST_PORT)
    requeue: Literal["scontrol", "exit", "chain"] = speed(
        "scontrol",
        "how a job asks to be started again: scontrol requeue; exit code 75, where the site's RequeueExit has it; "
        "a new job that waits for this one's end",
    )
    sbatch: dict[str, str] = speed({}, "more options of sbatch, without the dashes: {gpu-bind: closest}")
    srun: list[str] = speed([], "more arguments of srun, with the dashes")
    setup: list[str] = speed([], "lines of shell that the job begins with, e.g. `module load cuda`")
    container: PathText | None = speed(None, "image in which the job runs (srun --container-image, of pyxis)")
    python: PathText | None = speed(None, "Python on the nodes; default: this one, `python` in a container")
    snapshot: bool = speed(True, "run a copy of the code, made now: a requeue then runs what was submitted")
    hook: str | None = speed(
        None, "shell command told when the job finishes, is stopped, fails or is requeued: $MUSTER_TEXT", min_length=1
    )
    webhook: str | None = speed(
        None,
        "name of the environment variable with a URL, to which the same is posted",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
