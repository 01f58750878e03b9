"""Every environment variable that this project reads: its meaning, and its allowed values. No torch.

All code reads these variables here. So a value that cannot be used is always refused in the same words, in one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from configs.errors import UserError

LOOPBACK = "127.0.0.1"  # the address where the processes of one node meet

T = TypeVar("T")
Environ = Mapping[str, str]


@dataclass(frozen=True)
class Variable(Generic[T]):
    """A variable: its name, the function from its text to a value (which may raise ValueError), and its meaning."""

    name: str
    kind: Callable[[str], T]
    what: str

    def read(self, environ: Environ) -> T | None:
        """The value; None when the variable is not set. Raises UserError when its text cannot be used."""
        text = environ.get(self.name)
        if text is None:
            return None
        try:
            return self.kind(text)
        except ValueError as error:
            raise UserError(f"{self.name}={text!r} {error} ({self.what}): unset it, or set it right") from None

    def need(self, environ: Environ) -> T:
        """The value. Raises UserError when the variable is not set, or its text cannot be used."""
        if (value := self.read(environ)) is None:
            raise UserError(f"{self.name} is not set ({self.what})")
        return value


# ---- kinds ----------------------------------------------------------------------------------------------------------


def text(value: str) -> str:
    """Any text, also empty."""
    return value


def word(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return value


def name(value: str) -> str:
    """Part of a file's name, also empty."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,200}", value):
        raise ValueError("is no name of a node")
    return value


def number(value: str) -> int:
    """A whole number from 0, in plain digits: int() would also take `1_0`, ` 1` and the digits of other scripts."""
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise ValueError("is no whole number")
    return int(value)


def port(value: str) -> int:
    if not 1 <= number(value) <= 65535:
        raise ValueError("is no port from 1 to 65535")
    return int(value)


def seconds(value: str) -> float:
    """A UNIX time, in plain digits as `number`. It may be negative: a clock may be set to before 1970."""
    if not re.fullmatch(r"-?[0-9]{1,10}(\.[0-9]{1,9})?", value):
        raise ValueError("is no time")
    return float(value)


def path(value: str) -> Path:
    if not value.startswith("/"):
        raise ValueError("is no absolute path")
    return Path(value)


def threads(value: str) -> int | None:
    """OpenMP also takes a list, one number per nesting level; the first one counts here. An empty text counts as not
    set: job scripts pass on values that Slurm may not have given them."""
    if not value.strip():
        return None
    counts = [number(part.strip(" \t")) for part in value.split(",")]
    if 0 in counts:
        raise ValueError("is no number of threads")
    return counts[0]


# ---- the list -------------------------------------------------------------------------------------------------------

# Set by torchrun for each process that it starts.
RANK = Variable("RANK", number, "which of all processes this is")
WORLD_SIZE = Variable("WORLD_SIZE", number, "how many processes there are")
LOCAL_RANK = Variable("LOCAL_RANK", number, "which of this node's processes this is")
LOCAL_WORLD_SIZE = Variable("LOCAL_WORLD_SIZE", number, "how many processes this node has")
MASTER_ADDR = Variable("MASTER_ADDR", word, "where the processes meet")
MASTER_PORT = Variable("MASTER_PORT", port, "the port at which the processes meet")
TORCHELASTIC_RUN_ID = Variable("TORCHELASTIC_RUN_ID", text, "set by torchrun")
TORCHELASTIC_USE_AGENT_STORE = Variable("TORCHELASTIC_USE_AGENT_STORE", text, "whether torchrun has the store")

# `launch run` sets these for the agent, the ranks and the monitor that it starts: see FromLauncher.
MUSTER_LAUNCHED = Variable("MUSTER_LAUNCHED", seconds, "when the launcher began, UNIX time")
MUSTER_CLOCK = Variable("MUSTER_CLOCK", seconds, "when this machine was booted, UNIX time by the run's clock")
MUSTER_PARENT = Variable("MUSTER_PARENT", number, "pid of the launcher or agent that started this process")
MUSTER_LEASE = Variable("MUSTER_LEASE", word, "the token of the launcher's lease")
MUSTER_STOP_REQUEST = Variable("MUSTER_STOP_REQUEST", path, "file in which the launcher passes on a stop")
MUSTER_USER_ERROR = Variable("MUSTER_USER_ERROR", path, "file that tells the launcher of a person's mistake")
MUSTER_FAILURES = Variable("MUSTER_FAILURES", path, "file that names the ranks that failed")
MUSTER_HEARTBEATS = Variable("MUSTER_HEARTBEATS", path, "memory with where each rank is")

# On a rehearsal cluster: how many GPUs a job got. The ranks of the job use the CPU.
MUSTER_PRETEND_GPUS = Variable("MUSTER_PRETEND_GPUS", number, "how many GPUs a rehearsal cluster pretends")

SLURM_JOB_ID = Variable("SLURM_JOB_ID", number, "this process's Slurm job")
SLURM_RESTART_COUNT = Variable("SLURM_RESTART_COUNT", number, "how often Slurm started this job again")
SLURM_STEP_ID = Variable("SLURM_STEP_ID", number, "this process's step of its Slurm job")
SLURM_ARRAY_TASK_ID = Variable("SLURM_ARRAY_TASK_ID", number, "this job's place in its array")
SLURM_JOB_NODELIST = Variable("SLURM_JOB_NODELIST", word, "the job's nodes")
SLURM_JOB_NUM_NODES = Variable("SLURM_JOB_NUM_NODES", number, "how many nodes the job has")
SLURM_STEP_NODELIST = Variable("SLURM_STEP_NODELIST", word, "the step's nodes")
SLURM_STEP_NUM_NODES = Variable("SLURM_STEP_NUM_NODES", number, "how many nodes the step has")
SLURM_STEP_NUM_TASKS = Variable("SLURM_STEP_NUM_TASKS", number, "how many tasks the step has")
SLURM_NODEID = Variable("SLURM_NODEID", number, "which of the step's nodes this is")
SLURMD_NODENAME = Variable("SLURMD_NODENAME", name, "this node's name in Slurm")

CUDA_VISIBLE_DEVICES = Variable("CUDA_VISIBLE_DEVICES", text, "the GPUs that may be used")
OMP_NUM_THREADS = Variable("OMP_NUM_THREADS", threads, "threads that a process computes with on the CPU")
PATH = Variable("PATH", text, "where programs are")
PYTHONPATH = Variable("PYTHONPATH", text, "where Python looks for modules")
TERM = Variable("TERM", text, "the kind of terminal")
XDG_CONFIG_HOME = Variable("XDG_CONFIG_HOME", text, "where a person's settings are")

VARIABLES = {found.name: found for found in list(globals().values()) if isinstance(found, Variable)}


def check(environ: Environ) -> None:
    """Raise UserError for the first variable whose text cannot be used. A command calls this when it starts, so that it
    can read them all later. It skips torchrun's: a launcher never reads them, and Kubernetes sets MASTER_PORT for a
    service of that name."""
    for variable in VARIABLES.values():
        if variable not in (*_RANKS, *_MEETING):
            variable.read(environ)


# ---- what belongs together ------------------------------------------------------------------------------------------

_RANKS = (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE)
_MEETING = (MASTER_ADDR, MASTER_PORT)


@dataclass(frozen=True)
class Ranks:
    """Which of all processes this is, as torchrun or a person says. Alone when nobody says."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    meeting: tuple[str, int] | None = None  # address and port where several processes meet
    by_torchrun: bool = False
    counted: bool = True  # whether `local_size` was given; else this node has at least that many

    @classmethod
    def read(cls, environ: Environ) -> Ranks:
        """Raises UserError when the variables contradict each other, or when only some are set. A WORLD_SIZE left from
        another program would make this process wait half an hour for others that do not exist.

        LOCAL_... may be missing where the rest is set: torch does not need them, and wrappers of srun and mpirun set
        only the rest.
        """
        values = {v.name: v.read(environ) for v in _RANKS}
        by_torchrun = TORCHELASTIC_RUN_ID.read(environ) is not None
        numbers = [value for value in values.values() if value is not None]
        if not numbers and not by_torchrun:
            return cls()
        rank, size, local_rank, local_size = values.values()
        by_hand = not by_torchrun and all(environ.get(variable.name) for variable in _MEETING)
        if rank is None or size is None or (len(numbers) < len(values) and not by_hand):
            _refuse_some(values, {TORCHELASTIC_RUN_ID.name: by_torchrun or None})
        counted = local_size is not None
        if local_rank is None:
            local_rank = rank % local_size if local_size else 0
        if local_size is None:
            local_size = local_rank + 1
        if rank >= size:
            _contradict(environ, RANK, WORLD_SIZE, "the first must be below the second")
        if local_rank >= local_size:
            _contradict(environ, LOCAL_RANK, LOCAL_WORLD_SIZE, "the first must be below the second")
        if local_size > size:
            _contradict(environ, LOCAL_WORLD_SIZE, WORLD_SIZE, "a node cannot have more processes than the run")
        if local_rank > rank:
            _contradict(environ, LOCAL_RANK, RANK, "the first cannot be above the second")
        if size == 1:
            return cls(by_torchrun=by_torchrun)
        address, where = MASTER_ADDR.read(environ), MASTER_PORT.read(environ)
        if address is None or where is None:
            missing = ", ".join(v.name for v in _MEETING if v.name not in environ)
            raise UserError(f"WORLD_SIZE={size} without {missing}: {_REMEDY}")
        return cls(rank, size, local_rank, local_size, (address, where), by_torchrun, counted)

    @property
    def one_node(self) -> bool:
        """Whether all processes are known to be on this machine. The answer is the same on all of them."""
        return self.counted and self.local_size == self.size


_REMEDY = "start with torchrun or python -m launch run, or unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE"


def _refuse_some(values: Mapping[str, object], also: Mapping[str, object]) -> NoReturn:
    given = [name for name, value in {**values, **also}.items() if value is not None]
    missing = [name for name, value in values.items() if value is None]
    verb = "is" if len(given) == 1 else "are"
    raise UserError(f"{', '.join(given)} {verb} set, but not {', '.join(missing)}: {_REMEDY} {' '.join(also)}")


def _contradict(environ: Environ, one: Variable[int], other: Variable[int], why: str) -> NoReturn:
    told = " and ".join(f"{v.name}={environ.get(v.name, 'not set')}" for v in (one, other))
    raise UserError(f"{told} contradict each other ({why}): {_REMEDY}")


@dataclass(frozen=True)
class FromLauncher:
    """What `launch run` tells the processes that it starts. `environment` writes it, `read` reads it."""

    launched: float  # when the launcher began, UNIX time
    parent: int  # pid of the process that started this one: the launcher, or the agent
    lease: str  # the token of the launcher's lease of the run folder
    stop_request: Path  # file in which the launcher passes on the signals that it took
    user_error: Path  # file in which a rank reports a person's mistake: then nothing is started again
    failures: Path  # file in which the agent names the ranks that failed
    heartbeats: Path  # the node's records, which its monitor reads
    clock: float  # when this machine was booted, UNIX time by the run's clock

    def environment(self) -> dict[str, str]:
        told = asdict(self) | {"launched": f"{self.launched:.3f}", "clock": f"{self.clock:.6f}"}
        return {f"MUSTER_{name.upper()}": str(value) for name, value in told.items()}

    @classmethod
    def read(cls, environ: Environ) -> FromLauncher | None:
        """What the launcher told; None without a launcher. Raises UserError when only some of it is set."""
        names = [f"MUSTER_{name.upper()}" for name in cls.__dataclass_fields__]
        missing = [name for name in names if name not in environ]
        if len(missing) == len(names):
            return None
        if missing:
            raise UserError(f"{_LEFT_OVER} ({missing[0]} is missing, others are set): {_UNSET}")
        values: list[Any] = [VARIABLES[name].need(environ) for name in names]
        return cls(*values)

    def refuse_as_left_over(self) -> None:
        """Raise UserError: the process that the variables name did not start this one."""
        raise UserError(f"{_LEFT_OVER} (MUSTER_PARENT={self.parent}, but pid {os.getppid()} started this): {_UNSET}")


_LEFT_OVER = "variables MUSTER_... are left over from a launcher that did not start this process"
_UNSET = "unset " + " ".join(f"MUSTER_{name.upper()}" for name in FromLauncher.__dataclass_fields__)


@dataclass(frozen=True)
class Job:
    """The Slurm job that this process is in. All fields are defaults outside a job."""

    id: str | None = None
    life: str = "0"  # how often Slurm has started the job again
    step: str | None = None

    @classmethod
    def read(cls, environ: Environ) -> Job:
        job, life, step = (v.read(environ) for v in (SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_STEP_ID))
        return cls(None if job is None else str(job), str(life or 0), None if step is None else str(step))
